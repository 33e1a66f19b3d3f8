"""Parts of a decoder layer that are cut together: attention by heads, a feed-forward by its inner features."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_recsys.errors import UserError
from ds_recsys.models.shards import Shard
from ds_recsys.models.tensor.fused import LAYOUTS, fused_shard, layout_of
from ds_recsys.models.tensor.split import HeadSplit, Split, even, share_heads
from ds_recsys.models.tensor.styles import (
    Attributes,
    Colwise,
    HeadArgument,
    OwnConfig,
    PartialGradient,
    Rowwise,
    SharedBias,
    SharedRows,
)

KEY_VALUE = {"k_proj", "v_proj", "key", "value", "Wk", "Wv"}
HEADED = KEY_VALUE | {"q_proj", "q_b_proj", "q_gate_proj", "kv_b_proj", "query_key_value", "query", "Wq"}
# Parameters beside the cut ones that work on whole activations, before heads or features are split or after the sum.
OUTSIDE = {"q_a_proj", "q_a_layernorm", "kv_a_layernorm", "kv_a_proj_with_mqa", "indexer", "global_scale"}
OUTSIDE |= {"dense_bias", "LayerNorm", "router_gate", "down_embed", "up_embed"}
FEATURE_UNIT = 8  # the grouped kernels of experts want rows of a multiple of 16 bytes
# What HF's attention modules call the numbers that their forward reads.
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
GROUPS = ("num_key_value_groups", "num_kv_groups")
QUERY_WIDTHS = ("split_size", "embed_dim", "hidden_size", "all_head_size", "d_model_size")
KV_WIDTHS = ("kv_dim",)


class Region:
    """Plans one region: `shards` by parameter name inside the layer, `steps` to install.

    `entries` are paths inside the layer and their styles; `parent` is the module that computes the region.
    """

    def __init__(self, block: nn.Module, parent: str, entries: dict[str, str], config: Any, size: int):
        self.block, self.parent, self.entries, self.size = block, parent, entries, size
        self.module = block.get_submodule(parent)
        self.shards: dict[str, Shard] = {}
        self.steps: list[Any] = []
        self.random = drops(self.module)
        self.heads: HeadSplit | None = None
        self.features: Split | None = None
        if any(style in LAYOUTS or style == "colwise" and self._role(p) in HEADED for p, style in entries.items()):
            self.heads = share_heads(*count_heads(self.module, entries, block, config), size)
            self._head_numbers()
        elif any(style in ("colwise", "rowwise", "packed_colwise", "packed_rowwise") for style in entries.values()):
            self.features = even(self._inner(), size, f"features of {parent or 'the layer'}", FEATURE_UNIT)
        for path, style in entries.items():
            self._cut(path, style)
        if parent and (self.heads or self.features):
            self._rest()

    def _role(self, path: str) -> str:
        """`q_proj` of `self_attn.q_proj` or `self_attn.q_proj.linear`."""
        return path.removeprefix(f"{self.parent}.").split(".")[0]

    def _cut(self, path: str, style: str) -> None:
        if style.startswith("argument "):
            assert self.heads is not None
            self.steps += [HeadArgument(path, key, self.heads.query) for key in style.split()[1:]]
            return
        if style == "own_config":
            assert self.heads is not None
            counts = tuple((self.heads.query.held(rank), self.heads.kv.held(rank)) for rank in range(self.size))
            self.steps.append(OwnConfig(path, counts))
            return
        value = find(self.block, path)
        if style == "replicated_with_grad_allreduce":
            self.steps += [PartialGradient(f"{path}.{name}") for name, _ in value.named_parameters()]
        elif style == "shared_bias":
            self.steps.append(SharedBias(*path.rsplit(".", 1)))
        elif style in LAYOUTS:
            self._cut_fused(path, value, layout_of(self.module, style))
        elif style == "colwise_gather_output":
            outputs = linear_shape(value)[0]
            split = even(outputs, self.size, f"outputs of {path}")
            self._cut_linear(path, value, True, split.shard(0, outputs))
            self.steps.append(Colwise(path, gather=split))
        elif style == "rowwise_split_input":
            inputs = linear_shape(value)[1]
            split = even(inputs, self.size, f"inputs of {path}")
            self._cut_linear(path, value, False, split.shard(0, inputs))
            self.steps.append(Rowwise(path, split=split))
        else:
            rows, parts = "colwise" in style, 2 if "packed" in style else 1
            shard = self._shard(path, cut_length(value, rows), parts)
            if isinstance(value, nn.Parameter):
                self._add(path, Shard(cut_dim(value, rows), shard.ranges))
            else:
                self._cut_linear(path, value, rows, shard)
                self.steps.append(Colwise(path, random=self.random) if rows else Rowwise(path))

    def _cut_linear(self, path: str, module: nn.Module, rows: bool, shard: Shard) -> None:
        """`shard` along a linear layer's outputs (`rows`) or inputs; HF's Conv1D keeps them the other way round."""
        dim = int(rows == isinstance(module, Conv1D))
        self._add(f"{path}.weight", Shard(dim, shard.ranges))
        if rows and module.bias is not None:
            self._add(f"{path}.bias", shard)

    def _cut_fused(self, path: str, module: nn.Module, layout: str) -> None:
        assert self.heads is not None
        rows = linear_shape(module)[0]
        shard = fused_shard(layout, self.heads, rows, path)
        if not self.heads.duplicated:
            self._cut_linear(path, module, True, shard)
            self.steps.append(Colwise(path, random=self.random))
        else:  # ranks need overlapping rows, of which each may hold its own only
            split = even(rows, self.size, f"outputs of {path}")
            self._cut_linear(path, module, True, split.shard(0, rows))
            self.steps.append(Colwise(path, gather=split, select=shard, random=self.random))

    def _add(self, path: str, shard: Shard) -> None:
        self.shards[path] = shard
        if any(shard.ranges[rank] in shard.ranges[:rank] for rank in range(self.size)):
            self.steps.append(SharedRows(path, shard))

    def _shard(self, path: str, length: int, parts: int) -> Shard:
        split = self.features
        if self.heads is not None:
            split = self.heads.kv if self._role(path) in KEY_VALUE else self.heads.query
        assert split is not None
        if length % (split.count * parts):
            raise UserError(f"{length} rows of {path!r} are not {split.count} equal shares; set tensor to 1")
        return split.shard(0, length, parts)

    def _inner(self) -> int:
        """Width of a feed-forward's inside: its smallest cut dimension (gate and up may be packed or interleaved)."""
        cut = {p: s for p, s in self.entries.items() if s.removeprefix("packed_") in ("colwise", "rowwise")}
        lengths = {p: cut_length(find(self.block, p), "colwise" in s) for p, s in cut.items()}
        return min(length // (2 if "packed" in cut[path] else 1) for path, length in lengths.items())

    def _head_numbers(self) -> None:
        assert self.heads is not None
        heads = self.heads
        values = []
        for rank in range(self.size):
            query, kv = heads.query.held(rank), heads.kv.held(rank)
            numbers = dict.fromkeys(QUERY_HEADS, query) | dict.fromkeys(KV_HEADS, kv)
            numbers |= dict.fromkeys(GROUPS, heads.groups(rank))
            for names, held, count in ((QUERY_WIDTHS, query, heads.query.count), (KV_WIDTHS, kv, heads.kv.count)):
                for name in names:
                    if isinstance(width := getattr(self.module, name, None), int) and width % count == 0:
                        numbers[name] = width // count * held
            values.append({k: v for k, v in numbers.items() if isinstance(getattr(self.module, k, None), int)})
        self.steps.append(Attributes(self.parent, tuple(values)))

    def _rest(self) -> None:
        """What else the module holds: used on this rank's heads or features only, or on whole activations."""
        for name, param in self.module.named_parameters():
            path, role = f"{self.parent}.{name}", name.split(".")[0]
            if role in OUTSIDE or any(f"{path}.".startswith(f"{known}.") for known in self._known()):
                continue
            if param.numel() == 1 or self._norm_of_one_head(name, param):
                self.steps.append(PartialGradient(path))
            elif (heads := self._heads_of_norm(role)) and param.dim() == 2 and param.shape[0] == heads.count:
                self._add(path, heads.shard(0, param.shape[0]))
            else:
                raise UserError(f"no plan says what becomes of parameter {path!r}; set tensor to 1")

    def _heads_of_norm(self, role: str) -> Split | None:
        """The heads that a norm of queries or keys works on."""
        if self.heads is None or "norm" not in role or role[0] not in "qk":
            return None
        return self.heads.query if role[0] == "q" else self.heads.kv

    def _norm_of_one_head(self, name: str, param: nn.Parameter) -> bool:
        """Whether it is applied to each head alike, not to all of them in a row or, in a list, to one."""
        width = getattr(self.module, "head_dim", None)
        return bool(self._heads_of_norm(name)) and name.count(".") == 1 and param.shape == (width,)

    def _known(self) -> list[str]:
        return [path for path in self.entries if path != self.parent]


def find(block: nn.Module, path: str) -> Any:
    """The module or parameter at `path`."""
    parent, _, child = path.rpartition(".")
    return getattr(block.get_submodule(parent), child)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer.

    Raises:
        UserError: it is none that can be cut.
    """
    if isinstance(module, nn.Linear):
        return tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape[::-1])
    raise UserError(f"a {type(module).__name__} cannot be cut; set tensor to 1")


def cut_dim(param: nn.Parameter, rows: bool) -> int:
    """Of a parameter without a module of its own, such as all experts' [E, O, I]: the last dimension but one, or the
    last.
    """
    return 0 if param.dim() == 1 else param.dim() - (2 if rows else 1)


def cut_length(value: Any, rows: bool) -> int:
    """How long the dimension is that gets cut."""
    return (
        value.shape[cut_dim(value, rows)] if isinstance(value, nn.Parameter) else linear_shape(value)[0 if rows else 1]
    )


def count_heads(module: nn.Module, entries: dict[str, str], block: nn.Module, config: Any) -> tuple[int, int]:
    """(query heads, key-value heads) of an attention module, which may differ from layer to layer."""
    keys = next((path for path in entries if path.endswith("k_proj")), None)
    if keys is not None and hasattr(module, "head_dim") and hasattr(module, "num_key_value_groups"):
        kv_heads = linear_shape(find(block, keys))[0] // module.head_dim
        return kv_heads * module.num_key_value_groups, kv_heads
    heads = next((v for n in QUERY_HEADS if isinstance(v := getattr(module, n, None), int)), config.num_attention_heads)
    return heads, next((v for n in KV_HEADS if isinstance(v := getattr(module, n, None), int)), heads)


def drops(module: nn.Module) -> bool:
    """Whether anything in `module` may drop values in training."""
    numbers = [value for name, value in vars(module).items() if "drop" in name]
    numbers += [child.p for child in module.modules() if isinstance(child, nn.Dropout)]
    return any(isinstance(value, float) and value > 0 for value in numbers)
