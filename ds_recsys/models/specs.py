"""HF causal LM -> the list of LayerSpecs of its pipeline.

`ModelBuilder` is what every spec carries: config, weights and seed, cheap and picklable; the skeleton is made on
first use, once per process, and shared by the layers of the stage.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_recsys.errors import UserError
from ds_recsys.head.shard import HeadShard, rows_of
from ds_recsys.head.split import SplitHead
from ds_recsys.models.initialise import fill_layer, leave_empty
from ds_recsys.models.layers import Block, Epilogue, Head, ItemTable, PipelineLayer, Prologue, pass_hidden
from ds_recsys.models.shards import Shard
from ds_recsys.models.skeleton import Skeleton
from ds_recsys.models.slices import parse, sliced
from ds_recsys.models.split_head import HeadEntry, HeadRows, Targets, check_split, head_rows
from ds_recsys.models.tensor.plan import BlockPlan, plan_block
from ds_recsys.models.unsupported import check_supported
from ds_recsys.models.weights import Weights
from ds_recsys.topology import ALONE, TensorAxis

TIED_KEY = "item_table"


class ModelBuilder:
    """Makes the layers of one model; any layer, on any rank, at any time, with the same values everywhere."""

    def __init__(
        self,
        config: PreTrainedConfig,
        weights: Weights | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        embedding_dropout: float = 0.0,
        tensor: TensorAxis = ALONE,
        sequence_parallel: bool = False,
        cosine_scale: float | None = None,
        sparse_table: bool = False,
        split_head: SplitHead | None = None,
    ):
        check_supported(config.model_type)
        self.embedding_dropout = embedding_dropout
        self.tensor, self._sequence_parallel = tensor, sequence_parallel
        self.cosine_scale, self.sparse_table = cosine_scale, sparse_table
        self.split_head, self.targets = split_head, Targets()
        self.config, self.weights, self.seed, self.dtype = config, weights, seed, dtype
        self._skeleton: Skeleton | None = None
        self._source = None
        self._plans: dict[tuple[int, int], BlockPlan] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._values = True
        self.initialised: set[str] = set()  # HF names that the weights did not provide, of the layers built here

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_skeleton": None, "_source": None, "_plans": {}, "_shapes": None}

    def __repr__(self) -> str:
        return f"ModelBuilder({self.config.model_type})"

    def set_tensor_axis(self, axis: TensorAxis) -> None:
        """Build this rank's parts from now on; before any layer is built."""
        self.tensor = axis
        self._plans = {}

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            self._skeleton = Skeleton(self.config)
        return self._skeleton

    @property
    def sequence_parallel(self) -> bool:
        return self._sequence_parallel and self.tensor.size > 1

    @property
    def source(self):
        """The weights seen through this model's names, or None when everything is random."""
        if self._source is None and self.weights is not None:
            self._source = self.weights.bind(self.skeleton)
        return self._source

    def fill(self, layer: PipelineLayer) -> None:
        """Give the meta parameters of a new layer their values: of this rank's parts on a tensor axis."""
        if not self._values:
            leave_empty(layer, self.skeleton, self.dtype, *layer.parts())
            return
        missing = fill_layer(layer, self.skeleton, self.source, self.seed, self.dtype, *layer.parts())
        self.initialised |= set(missing)

    @contextlib.contextmanager
    def without_values(self) -> Iterator[None]:
        """Layers made meanwhile have parameters of any values: for those that get them from another rank."""
        self._values = False
        try:
            yield
        finally:
            self._values = True

    def block_plan(self, index: int, size: int | None = None) -> BlockPlan:
        """How decoder layer `index` is shared out over `size` tensor ranks (None: this model's)."""
        key = (index, size or self.tensor.size)
        if key not in self._plans:
            if self.sequence_parallel and any(self.skeleton.glue[1:-1]):
                raise UserError(
                    f"model type {self.config.model_type!r} computes something between its layers, which is not split: set "
                    "sequence_parallel to false"
                )
            self._plans[key] = plan_block(self.skeleton, *key, self.sequence_parallel)
        return self._plans[key]

    def shards(self, size: int | None = None) -> dict[str, Shard]:
        """HF name -> the parts of each of `size` tensor ranks (None: this model's); other parameters are held whole."""
        size = size or self.tensor.size
        if size == 1:
            return {}
        skeleton = self.skeleton
        form, shards = skeleton.head_form, {}
        for name in (skeleton.table_name, form.weight, form.bias):
            if name is not None:
                rows = skeleton.outer[name].shape[0]
                shards[name] = Shard(0, tuple((rows_of(rows, size, rank),) for rank in range(size)))
        for index in range(len(skeleton.blocks)):
            plan, block = self.block_plan(index, size), skeleton.block_name(index)
            shards |= {f"{block}.{name}": shard for name, shard in plan.shards.items()}
        return shards

    def full_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the parameter or buffer with that HF name, or of the rows of it that the name has, on any grid."""
        if self._shapes is None:
            self._shapes = {n: tuple(t.shape) for n, t in self.skeleton.model.state_dict(keep_vars=True).items()}
        name, rows = parse(name)
        return self._shapes[name] if rows is None else (rows[1] - rows[0], *self._shapes[name][1:])

    def part(self, name: str) -> tuple[Shard, int] | None:
        """Which part of the HF parameter this rank holds under `name`, as (shard, place in it); None: all of it."""
        rows, shards = parse(name)[1], self.shards()
        if rows is not None:
            return Shard(0, ((rows,),)), 0
        return (shards[name], self.tensor.rank) if name in shards else None

    def row_names(self, index: int) -> list[str]:
        """Names of the parameters in block `index` of a split head."""
        form = self.skeleton.head_form
        return [sliced(name, *head_rows(self, index)) for name in (form.weight, form.bias) if name is not None]

    def head_places(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Of `names` those of the head's weight and bias, or rows of them -> the rows that this rank holds."""
        form, places = self.skeleton.head_form, {}
        for name in names:
            if parse(name)[0] in (form.weight, form.bias):
                part = self.part(name)
                places[name] = part[0].ranges[part[1]][0] if part else (0, self.num_rows)
        return places

    def specs(self) -> list[LayerSpec | TiedLayerSpec]:
        """Embedding, prologue, decoder layers, epilogue, head; the entries that would do nothing are left out."""
        skeleton = self.skeleton
        n = len(skeleton.blocks)
        specs: list[LayerSpec] = [
            TiedLayerSpec(TIED_KEY, ItemTable, self, tied_weight_attr=skeleton.table_name)
            if skeleton.tied
            else LayerSpec(ItemTable, self)
        ]
        if skeleton.glue[0]:
            specs.append(LayerSpec(Prologue, self))
        specs += [LayerSpec(Block, self, index) for index in range(n)]
        if skeleton.glue[n]:
            specs.append(LayerSpec(Epilogue, self))
        if self.split_head is not None:
            check_split(self)
            rows = [LayerSpec(HeadRows, self, index) for index in range(self.split_head.blocks)]
            return [*specs, LayerSpec(HeadEntry, self), *rows]
        if not skeleton.tied or len(skeleton.owned("head")) > 1:
            specs.append(LayerSpec(Head, self))
        if skeleton.tied:
            specs.append(
                TiedLayerSpec(TIED_KEY, ItemTable, self, forward_fn=pass_hidden, tied_weight_attr=skeleton.table_name)
            )
        return specs

    def parameter_counts(self) -> list[int]:
        """Parameters of each spec, trainable or not, counted on meta: nothing is built. A tied table counts twice."""
        skeleton = self.skeleton
        sizes = {name: p.numel() for name, p in skeleton.outer.items()}
        blocks = [sum(p.numel() for p in b.parameters()) for b in skeleton.blocks]
        table = sum(p.numel() for p in skeleton.embedding.parameters())
        item_rows = {skeleton.head_form.weight, skeleton.head_form.bias} - {None}
        counts = []
        for spec in self.specs():
            if spec.typename is ItemTable:
                counts.append(table)
            elif spec.typename is Block:
                index = spec.module_args[1]
                between = skeleton.owned(index) if index and skeleton.glue[index] else []
                counts.append(blocks[index] + sum(sizes[n] for n in between))
            elif spec.typename is HeadRows:
                start, stop = head_rows(self, spec.module_args[1])
                counts.append(sum(sizes[n] for n in item_rows) // self.num_rows * (stop - start))
            else:
                where = {Prologue: 0, Epilogue: len(blocks), Head: "head", HeadEntry: "head"}[spec.typename]
                elsewhere = item_rows if spec.typename is HeadEntry else {skeleton.table_name}
                counts.append(sum(sizes[n] for n in skeleton.owned(where) if n not in elsewhere))
        return counts

    def tail(self) -> int:
        """How many entries at the end of the list must share the last stage: `logits` reads their parameters."""
        return 2 if self.skeleton.tied and len(self.skeleton.owned("head")) > 1 else 1

    def head_parameters(self, layers: list[nn.Module]) -> dict[str, nn.Parameter]:
        """HF name -> parameter of the head, found in `layers`."""
        names = set(self.skeleton.owned("head"))
        params = {n: p for layer in layers for n, p in layer.named_parameters() if n in names}
        assert names == set(params), f"the head needs {sorted(names - set(params))}, which live on another stage"
        return params

    def logits(self, hidden: Tensor, layers: list[nn.Module], training: bool) -> Tensor:
        """HF's head on `last_hidden_state` [..., H] -> [..., I+1], or this tensor rank's columns of it."""
        return self.skeleton.logits(hidden, self.head_parameters(layers), training)

    def head_input(self, hidden: Tensor, layers: list[nn.Module], training: bool) -> Tensor:
        """What HF's head multiplies with the item table: [..., H] -> [..., E]."""
        if not self.skeleton.head_form.transform:
            return hidden
        return self.skeleton.head_input(hidden, self.head_parameters(layers), training)

    def head(self, layers: list[nn.Module]) -> HeadShard:
        """The rows of the item head in `layers`, as the losses and the ranking read them."""
        form, params = self.skeleton.head_form, self.head_parameters(layers)
        first_row = rows_of(self.num_rows, self.tensor.size, self.tensor.rank)[0]
        return self.shard(params[form.weight], None if form.bias is None else params[form.bias], first_row)

    @property
    def num_rows(self) -> int:
        """Of the item head, I + 1."""
        return self.skeleton.outer[self.skeleton.head_form.weight].shape[0]

    @property
    def head_width(self) -> int:
        """E, of what the item rows are multiplied with."""
        return self.skeleton.outer[self.skeleton.head_form.weight].shape[1]

    def shard(self, weight: Tensor, bias: Tensor | None, first_row: int) -> HeadShard:
        """Rows of this model's item head: weight [R, E], bias [R]."""
        form = self.skeleton.head_form
        return HeadShard(
            weight,
            self.num_rows,
            first_row=first_row,
            bias=bias,
            scale=form.scale if self.cosine_scale is None else self.cosine_scale,
            softcap=form.softcap,
            cosine=self.cosine_scale is not None,
            axis=self.tensor,
        )


def to_layer_specs(
    config: PreTrainedConfig,
    weights: Weights | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tensor: TensorAxis = ALONE,
) -> list[LayerSpec | TiedLayerSpec]:
    """The pipeline of a causal LM as DeepSpeed LayerSpecs: embedding, prologue, blocks, epilogue, head.

    Building a spec makes only that layer, or this rank's part of it on the `tensor` axis: slices of `weights`, or values
    that depend on (`seed`, HF name) alone.
    The last layer returns hidden states; `ModelBuilder.logits` or `RecommenderPipe.logits` turns them into scores.

    Raises:
        UserError: the model type cannot be cut into stages (the reason is named).
    """
    return ModelBuilder(config, weights, seed=seed, dtype=dtype, tensor=tensor).specs()
