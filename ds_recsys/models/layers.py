"""The layers a stage is made of. Each holds HF parameters under HF's full names and leaves the computing to HF's code.

`state_dict()` of a layer therefore reads `model.layers.3.mlp.up_proj.weight`, whatever the stage; the parameters sit
in a tree of empty modules that spells the name. One float tensor [B, S, H] goes in and out of every layer but the
first.
"""

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.functional import dropout

from ds_recsys.head.row_sparse import own_gradient
from ds_recsys.models.shards import Shard
from ds_recsys.regions import gather_from_region, reduce_from_region, split_sequence

if TYPE_CHECKING:
    from ds_recsys.models.specs import ModelBuilder


def attach(root: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    """Register `value` under the dotted `name` below `root`, making the modules between."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.add_module(last, value)


class PipelineLayer(nn.Module):
    """Parameters of one entry of the list; `module_names` are the HF modules held whole, the rest are single
    parameters.
    """

    def __init__(self, builder: "ModelBuilder", modules: list[str], parameters: list[str]):
        super().__init__()
        self.builder = builder  # not a module: the skeleton must not be registered
        self.module_names = tuple(modules)
        skeleton = builder.skeleton
        for name in modules:
            module = copy.deepcopy(skeleton.model.get_submodule(name))
            module.__dict__.pop("forward", None)  # the skeleton's stub
            attach(self, name, module)
        for name in parameters:
            attach(self, name, nn.Parameter(skeleton.outer[name], skeleton.outer[name].requires_grad))
        builder.fill(self)

    def parts(self) -> tuple[dict[str, Shard], int]:
        """(HF name -> how a parameter is cut, which of the parts this layer holds); the others it holds whole."""
        return self.builder.shards(), self.builder.tensor.rank

    def hf_parameters(self) -> dict[str, nn.Parameter]:
        """HF name -> parameter."""
        return dict(self.named_parameters())


class ItemTable(PipelineLayer):
    """HF's token embedding, one row per item, with our dropout behind it: ids [B, S] int64 -> [B, S, E].

    On a tensor axis each rank holds some of the rows, looks up what it has, and the lookups are added up.
    """

    def __init__(self, builder: "ModelBuilder"):
        super().__init__(builder, [builder.skeleton.embedding_name], [])
        embedding = self.embedding
        embedding.sparse = builder.sparse_table
        self.first_row = 0
        if builder.tensor.size > 1:
            shard = builder.shards()[builder.skeleton.table_name]
            self.first_row = shard.ranges[builder.tensor.rank][0][0]
            if self.first_row:  # the padding row, which gets no gradient from lookups, is on rank 0
                embedding.padding_idx = None

    @property
    def embedding(self) -> nn.Embedding:
        """HF's."""
        return self.get_submodule(self.module_names[0])

    def forward(self, ids: Tensor) -> Tensor:
        embedding = self.embedding
        if self.builder.tensor.size == 1:
            embedded = embedding(ids)
            if embedding.sparse:
                embedded = own_gradient(embedded)
        else:
            rows = ids - self.first_row
            mine = (rows >= 0) & (rows < len(embedding.weight))
            found = embedding(rows[mine])  # a row looked up for another rank's item would be in a sparse gradient
            embedded = found.new_zeros(*ids.shape, found.shape[-1]).masked_scatter(mine[..., None], found)
            embedded = reduce_from_region(embedded, self.builder.tensor)
        return dropout(embedded, self.builder.embedding_dropout, self.training)


class Prologue(PipelineLayer):
    """What HF does between the embedding and layer 0: positions, norm, dropout, projection. [B, S, E] -> [B, S, H]."""

    def __init__(self, builder: "ModelBuilder"):
        super().__init__(builder, [], builder.skeleton.owned(0))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.builder.skeleton.boundary(0, hidden, self.hf_parameters(), self.training).contiguous()


class Block(PipelineLayer):
    """HF decoder layer `index`, called as HF calls it. [B, S, H] -> [B, S, H].

    With sequence parallelism each rank of the tensor axis holds S / T positions between the first and the last block.
    """

    def __init__(self, builder: "ModelBuilder", index: int):
        skeleton = builder.skeleton
        between = index > 0 and skeleton.glue[index]  # HF computes something between layers index - 1 and index
        super().__init__(builder, [skeleton.block_name(index)], skeleton.owned(index) if between else [])
        self.index, self.between = index, between
        if builder.tensor.size > 1:
            builder.block_plan(index).apply(self.get_submodule(self.module_names[0]), builder.tensor)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.builder.sequence_parallel:
            return self._forward_split(hidden)
        skeleton = self.builder.skeleton
        call = skeleton.arguments(hidden, self.training)[self.index]
        if self.between:
            outer = {n: p for n, p in self.named_parameters() if n in skeleton.outer}
            hidden = skeleton.boundary(self.index, hidden, outer, self.training)
        return call.apply(self.get_submodule(self.module_names[0]), hidden).contiguous()

    def _forward_split(self, hidden: Tensor) -> Tensor:
        """[B, S / T, H] -> the same; the first block is given all positions, the last one returns them."""
        skeleton, axis = self.builder.skeleton, self.builder.tensor
        if self.index == 0:
            hidden = split_sequence(hidden, axis)
        batch, length, _ = hidden.shape
        call = skeleton.arguments(hidden.new_empty(batch, length * axis.size, 0), self.training)[self.index]
        hidden = call.apply(self.get_submodule(self.module_names[0]), hidden).contiguous()
        if self.index == len(skeleton.blocks) - 1:
            hidden = gather_from_region(hidden, axis, [length] * axis.size, dim=1)
        return hidden


class Epilogue(PipelineLayer):
    """From the last layer to `last_hidden_state`: final norm, projection. [B, S, H] -> [B, S, E]."""

    def __init__(self, builder: "ModelBuilder"):
        super().__init__(builder, [], builder.skeleton.owned(len(builder.skeleton.blocks)))

    def forward(self, hidden: Tensor) -> Tensor:
        skeleton = self.builder.skeleton
        return skeleton.boundary(len(skeleton.blocks), hidden, self.hf_parameters(), self.training).contiguous()


class Head(PipelineLayer):
    """The head's own parameters (all but a tied table). Returns hidden states: the loss asks for the logits it
    needs.
    """

    def __init__(self, builder: "ModelBuilder"):
        super().__init__(builder, [], [n for n in builder.skeleton.owned("head") if n != builder.skeleton.table_name])

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


def pass_hidden(table: ItemTable, hidden: Tensor) -> Tensor:
    """`forward_fn` of the tied table's second place: its weight is used by `logits`."""
    return hidden
