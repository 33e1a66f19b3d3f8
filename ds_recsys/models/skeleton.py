"""The per-process skeleton of an HF causal LM: no weights, all of its wiring.

HF's own forward is the only place that knows which masks, rotary tables, position ids and cache arguments each decoder
layer is given. So it is replayed, not rewritten: the model is built with its parameters on the meta device, every
decoder layer is replaced by a stub that records how it is called and returns its input, and parameters that live on
another stage are replaced by constants of the right shape that take no memory. What one replay yields

* `arguments(hidden)`: how each layer is called for this shape; cached, since it must not depend on hidden values;
* `boundary(i, hidden, params)`: what HF computes between layer i-1 and layer i (0: embedding -> layer 0, n: last
layer ->
  `last_hidden_state`), differentiable in `hidden` and `params`;
* `logits(hidden, params)`: what the causal LM does to `last_hidden_state`;
* `head_input(hidden, params)`, `head_output(products)`: the parts of that before and after the item table.

`probe.py` checks at construction that the model can be cut this way. Layers are cut out by `models.layers`.
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ds_recsys.errors import UserError
from ds_recsys.models.head_form import HeadForm
from ds_recsys.models.probe import probe
from ds_recsys.models.replay import Call, Done, Replay

CACHED_SHAPES = 32  # one entry per (batch, length, dtype, device, training); windows are bucketed, so few are live


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal LM of `config`, parameters on meta, buffers real (rotary frequencies are not in any checkpoint)."""
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    model.tie_weights()  # re-registering parameters on meta breaks the ties made by the constructor
    model.config.use_cache = False
    return model.train()


class Skeleton:
    """Holds every layer's blueprint on the meta device; owns no weight, so it can serve any set of layers at any
    time.
    """

    def __init__(self, config: PreTrainedConfig):
        self.model = empty_model(config)
        self.config = self.model.config
        self._find_parts()
        self._index_parameters()
        self._patch()
        self.wrap: Callable[[Tensor], Any] = lambda hidden: hidden  # how layers return hidden states; set by the probe
        self.glue: list[bool] = []  # boundary i computes something; set by the probe
        self.owner: dict[
            str, int | str
        ] = {}  # outer parameter -> the boundary, or "head", that uses it; set by the probe
        self.tied = False  # the head reads the token table
        self.hidden_width = 0  # of `last_hidden_state`; set by the probe
        self.head_form = HeadForm()  # set by the probe
        self._cache: OrderedDict[tuple, list[Call]] = OrderedDict()
        self.buffer_device = torch.device("cpu")
        self._fills: dict[tuple, dict[str, Tensor]] = {}
        self.canned: Any = (
            None  # the trunk's output object, set by the probe; `logits` puts its hidden states into a copy
        )
        probe(self)

    # ---- anatomy ------------------------------------------------------------------------------------------------

    def _find_parts(self) -> None:
        name = self.config.model_type
        self.embedding = self.model.get_input_embeddings()
        if not isinstance(getattr(self.embedding, "weight", None), Tensor):
            raise UserError(f"model type {name!r} has no single token embedding table to put items in")
        self.embedding_name = next(n for n, m in self.model.named_modules() if m is self.embedding)
        self.head = self.model.get_output_embeddings()
        if not isinstance(self.head, nn.Linear):
            raise UserError(f"model type {name!r} has no single linear head to score items with")
        self.head_name = next(n for n, m in self.model.named_modules() if m is self.head)
        lists = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        towers = tuple(
            n + "."
            for n, m in self.model.named_modules()
            if isinstance(m, PreTrainedModel) and m.main_input_name != "input_ids"  # image and audio encoders
        )
        # Whisper's decoder claims to be one, so the rule yields when nothing is left.
        lists = {n: m for n, m in lists.items() if not n.startswith(towers)} or lists
        outer = {n: m for n, m in lists.items() if not any(n.startswith(o + ".") for o in lists)}
        if not outer:
            raise UserError(f"model type {name!r} keeps its decoder layers in no ModuleList")
        depth = getattr(self.config, "num_hidden_layers", None)
        self.list_name = max(
            outer, key=lambda n: (len(outer[n]) == depth, sum(p.numel() for p in outer[n].parameters()))
        )
        self.blocks: list[nn.Module] = list(outer[self.list_name])
        path = self.list_name.split(".")
        self.trunk_names = [".".join(path[:i]) for i in range(1, len(path))]
        self.trunk_name: str | None = None  # the outermost module around the layers that the causal LM calls

    def block_name(self, index: int) -> str:
        """HF's name of decoder layer `index`, such as `model.layers.3`."""
        return f"{self.list_name}.{index}"

    def owned(self, where: int | str) -> list[str]:
        """HF names of the outer parameters that boundary `where` (0..n) or the "head" uses; the probe found them."""
        return [name for name in self.outer if self.owner.get(name) == where]

    def _index_parameters(self) -> None:
        """`outer`: parameters outside the layers by canonical name; `_slots`: every place (ties too) they are read
        from.
        """
        table = self.embedding.weight
        self.table_name = f"{self.embedding_name}.weight"
        canonical: dict[int, str] = {id(table): self.table_name}
        block_of: dict[int, int | None] = {}
        self.outer: dict[str, nn.Parameter] = {}
        self.aliases: dict[str, str] = {}
        self._slots: list[tuple[dict, str, str]] = []
        in_block = {id(m): i for i, b in enumerate(self.blocks) for m in b.modules()}
        for module_name, module in self.model.named_modules():
            block = in_block.get(id(module))
            for attr, param in module._parameters.items():
                if param is None:
                    continue
                full = f"{module_name}.{attr}" if module_name else attr
                if block_of.setdefault(id(param), block) != block:
                    raise UserError(
                        f"model type {self.config.model_type!r} shares parameter {full!r} between layers "
                        "of the pipeline; only the token table may be shared"
                    )
                name = canonical.setdefault(id(param), full)
                self.aliases[full] = name
                if block is None:
                    self.outer[name] = param
                    self._slots.append((module._parameters, attr, name))

    def _patch(self) -> None:
        """Instance-level forwards: attributes that HF reads off a layer (`attention_type`) stay where they are."""
        self._active: Replay | None = None
        for index, block in enumerate(self.blocks):
            block.forward = self._stub("block", index)
        self.embedding.forward = self._stub("embed")
        self.head.forward = self._stub("linear", self.head.forward)
        self._accepts_use_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        for name in self.trunk_names:
            module = self.model.get_submodule(name)
            if not isinstance(module, nn.ModuleList):
                module.forward = self._stub("trunk", name, module.forward)

    def _stub(self, what: str, *bound: Any) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._active is not None, "the skeleton's layers run only inside a replay"
            return getattr(self._active, what)(*bound, args, kwargs)

        return forward

    # ---- replay -------------------------------------------------------------------------------------------------

    def fill(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Stand-ins for the parameters of other stages: ones of the right shape in one element of memory."""
        key = (dtype, device)
        if key not in self._fills:
            one = torch.ones((), dtype=dtype, device=device)
            self._fills[key] = {name: one.expand(p.shape) for name, p in self.outer.items()}
        return self._fills[key]

    @contextmanager
    def _bound(self, params: Mapping[str, Tensor], device: torch.device) -> Iterator[None]:
        """Put `params` where HF reads the outer parameters, and the buffers outside the layers on `device`."""
        if self.buffer_device != device:
            inside = {id(m) for b in self.blocks for m in b.modules()}
            for module in self.model.modules():
                if id(module) not in inside:
                    for attr, buffer in module._buffers.items():
                        module._buffers[attr] = None if buffer is None else buffer.to(device)
            self.buffer_device = device
        kept = [slots[attr] for slots, attr, _ in self._slots]
        for slots, attr, name in self._slots:
            slots[attr] = params[name]
        try:
            yield
        finally:
            for (slots, attr, _), param in zip(self._slots, kept, strict=True):
                slots[attr] = param

    def run(self, replay: Replay, ids: Tensor, params: Mapping[str, Tensor], training: bool) -> Any:
        """HF's whole forward with `replay` answering for the stubs -> its output, or the value a stub stopped with."""
        if self.model.training != training:
            self.model.train(training)
        self._active = replay
        extra = {"use_cache": False} if self._accepts_use_cache else {}
        try:
            with self._bound(params, ids.device):
                return self.model(input_ids=ids, **extra)
        except Done as done:
            return done.value
        finally:
            self._active = None

    def arguments(self, hidden: Tensor, training: bool) -> list[Call]:
        """How HF calls every layer for `hidden` [B, S, H]; a function of shape, dtype, device and mode only."""
        key = (*hidden.shape[:2], hidden.dtype, hidden.device, training)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        # A replay may draw from the generator (dropout before layer 0); a cache hit must leave the same state as a
        # miss.
        devices = [hidden.device] if hidden.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            calls = self.record(hidden.shape[0], hidden.shape[1], hidden.dtype, hidden.device, training).calls
        self._cache[key] = calls
        if len(self._cache) > CACHED_SHAPES:
            self._cache.popitem(last=False)
        return calls

    def record(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, training: bool, *,
        embedded: Tensor | None = None, ids: Tensor | None = None, params: Mapping[str, Tensor] | None = None,
    ) -> Replay:  # fmt: skip
        """One replay up to `last_hidden_state`: the scores of a large catalogue would fill the memory.

        `embedded` [B, S, E], `ids` [B, S] and `params` may be anything: no argument depends on them.
        """
        ids = torch.ones(batch, length, dtype=torch.int64, device=device) if ids is None else ids
        if embedded is None:
            embedded = torch.zeros(batch, length, self.embedding.weight.shape[1], dtype=dtype, device=device)
        replay = Replay(self, {"embed": embedded}, stop="trunk")
        self.run(replay, ids, self.fill(dtype, device) if params is None else params, training)
        return replay

    def boundary(
        self, index: int, hidden: Tensor, params: Mapping[str, Tensor], training: bool, *, ids: Tensor | None = None
    ) -> Tensor:
        """What HF computes between layer `index` - 1 and layer `index`: [B, S, *] -> [B, S, *], differentiable.

        `index` 0 starts from the embedding's output, `index` = number of layers ends at `last_hidden_state`. `params`
        holds the outer parameters used here by HF name; the others are stood in for.
        """
        batch, length = hidden.shape[:2]
        inject: dict[Any, Tensor] = {"embed": hidden} if index == 0 else {index - 1: hidden}
        if index:
            width = self.embedding.weight.shape[1]
            inject["embed"] = torch.zeros(batch, length, width, dtype=hidden.dtype, device=hidden.device)
        ids = torch.ones(batch, length, dtype=torch.int64, device=hidden.device) if ids is None else ids
        stop = index if index < len(self.blocks) else "trunk"
        every = {**self.fill(hidden.dtype, hidden.device), **params}
        return self.run(Replay(self, inject, stop), ids, every, training)

    def logits(self, hidden: Tensor, params: Mapping[str, Tensor], training: bool) -> Tensor:
        """HF's causal LM head on `last_hidden_state` of any leading shape: [..., H] -> [..., V]."""
        return self._run_head(hidden, params, training)

    def head_input(self, hidden: Tensor, params: Mapping[str, Tensor], training: bool) -> Tensor:
        """What the item table is multiplied with: `last_hidden_state`, or HF's transform of it. [..., H] -> [..., E]."""
        return self._run_head(hidden, params, training, stop="linear")

    def head_output(self, products: Tensor) -> Tensor:
        """What HF makes of the products with the item table: [..., V] -> [..., V], any V."""
        hidden = products.new_zeros(*products.shape[:-1], self.hidden_width)
        return self._run_head(hidden, {}, False, linear=products)

    def _run_head(self, hidden: Tensor, params: Mapping[str, Tensor], training: bool, stop=None, linear=None) -> Any:
        shape = hidden.shape[:-1]
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        ids = torch.ones(rows.shape[:2], dtype=torch.int64, device=hidden.device)
        inject = {"trunk": rows}
        if linear is not None:
            inject["linear"] = linear.reshape(1, -1, linear.shape[-1])
        every = {**self.fill(hidden.dtype, hidden.device), **params}
        out = self.run(Replay(self, inject, stop), ids, every, training)
        if not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple) else out.logits
        return out.reshape(*shape, out.shape[-1])
