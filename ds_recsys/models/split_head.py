"""The layers of an item head that is split: one that adds the targets, then blocks of rows of the table.

Targets come with the data, which DeepSpeed gives to the first and the last stage alone. `give_targets` hands them to the
stage whose layers begin the head, wherever that is at that step. Without targets, as in an evaluation, which ranks all
items itself, the layers pass the hidden states on.
"""

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_recsys import compat
from ds_recsys.errors import UserError
from ds_recsys.head import split
from ds_recsys.head.shard import HeadShard, rows_of
from ds_recsys.method_hook import MethodHook
from ds_recsys.models.layers import PipelineLayer
from ds_recsys.models.shards import Shard
from ds_recsys.models.slices import parse

if TYPE_CHECKING:
    from ds_recsys.models.specs import ModelBuilder


class HeadEntry(PipelineLayer):
    """HF's transform of the hidden states where the head has one, then the targets: [B, S, H] -> [B, S, E + C].

    Its second call for a micro-batch would take the next one's targets, so it is never recomputed.
    """

    def __init__(self, builder: "ModelBuilder"):
        form = builder.skeleton.head_form
        own = [name for name in builder.skeleton.owned("head") if name not in (form.weight, form.bias)]
        super().__init__(builder, [], own)

    def forward(self, hidden: Tensor) -> Tensor:
        builder = self.builder
        states = hidden
        if builder.skeleton.head_form.transform:
            states = builder.skeleton.head_input(hidden, self.hf_parameters(), self.training)
        target = builder.targets.next()
        if target is None:
            if self.training:
                raise UserError("a split head has no targets: make the engine with ds_recsys.engine.pipeline_engine")
            return states
        if builder.cosine_scale is not None:
            states = F.normalize(states, dim=-1)
        return split.begin(states, target.to(states.device), builder.split_head)


class HeadRows(PipelineLayer):
    """Block `index` of the item head's rows, and of its bias. [B, S, E + C] -> the same; [B, S, E] passes through."""

    def __init__(self, builder: "ModelBuilder", index: int):
        self.rows, self.names = head_rows(builder, index), builder.row_names(index)
        super().__init__(builder, [], [parse(name)[0] for name in self.names])
        for name in self.names:
            path, _, attribute = parse(name)[0].rpartition(".")
            owner = self.get_submodule(path)
            parameter = owner._parameters.pop(attribute)
            owner.register_parameter(name.removeprefix(f"{path}."), parameter)

    def parts(self) -> tuple[dict[str, Shard], int]:
        return dict.fromkeys(self.hf_parameters(), Shard(0, ((self.rows,),))), 0

    def forward(self, carried: Tensor) -> Tensor:
        head = self.head()
        if carried.shape[-1] == head.weight.shape[1]:
            return carried
        return split.add_block(carried, head, self.builder.split_head)

    def head(self) -> HeadShard:
        """These rows alone."""
        parameters = self.hf_parameters()
        weight, *bias = (parameters[name] for name in self.names)
        return self.builder.shard(weight, bias[0] if bias else None, self.rows[0])


def check_split(builder: "ModelBuilder") -> None:
    """Raise `UserError` unless the head of this model can be split as asked for."""
    blocks, rows = builder.split_head.blocks, builder.num_rows
    what = f"a head in {blocks} blocks (recsys.head.blocks)"
    if builder.skeleton.tied:
        raise UserError(
            f"{what} needs rows of its own, and this model shares them with the item embedding: set recsys.model.tie to "
            'false, or "tie_word_embeddings": false in the model\'s config'
        )
    if builder.tensor.size > 1:
        raise UserError(
            f"{what} does not work with recsys.tensor {builder.tensor.size}, which splits it already: use 1"
        )
    if not 1 <= blocks <= rows:
        raise UserError(f"{what}: the table has {rows} rows; ask for at least 1 block and no more than that")
    if rows > split.LARGEST_TABLE:
        raise UserError(f"{what}: {rows:,} rows are more than the {split.LARGEST_TABLE:,} that it can tell apart")


def head_rows(builder: "ModelBuilder", index: int) -> tuple[int, int]:
    """(first, past the last) row of block `index`."""
    return rows_of(builder.num_rows, builder.split_head.blocks, index)


def stage_rows(builder: "ModelBuilder", layers: Iterable[nn.Module], like: Tensor) -> HeadShard:
    """All rows of the blocks in `layers`, which lie one behind the other; none, of the dtype and device of `like`."""
    found = [layer.head() for layer in layers if isinstance(layer, HeadRows)]
    if not found:
        bias = None if builder.skeleton.head_form.bias is None else like.new_empty(0)
        return builder.shard(like.new_empty(0, builder.head_width), bias, 0)
    if len(found) == 1:
        return found[0]
    bias = None if found[0].bias is None else torch.cat([shard.bias for shard in found])
    return builder.shard(torch.cat([shard.weight for shard in found]), bias, found[0].first_row)


class Targets:
    """The targets of the micro-batches whose forward pass is to come, in order."""

    def __init__(self):
        self._waiting: deque[Tensor] = deque()

    def give(self, targets: Iterable[Tensor]) -> None:
        """In place of what is left."""
        self._waiting = deque(targets)

    def next(self) -> Tensor | None:
        """Of the next micro-batch; None when there are none."""
        return self._waiting.popleft() if self._waiting else None


def give_targets(engine) -> None:
    """Let an engine over a `RecommenderPipe` with a split head train and compute losses.

    Every rank must be given the data: `train_batch` and `eval_batch` take the micro-batches from the iterator on all of
    them, so that whichever stage the head begins on at the next step has them.
    """
    pipe = engine.module
    compat.keep_buffer_dtypes(engine)

    def take(data_iter, count: int):
        if data_iter is None:
            raise UserError("a split head needs the targets on every stage: give train_batch and eval_batch the data")
        batches = list(islice(data_iter, count))
        if any(isinstance(layer, HeadEntry) for _, layer in pipe.local_layers()):
            pipe.builder.targets.give(labels[0] for _, labels in batches)
        return iter(batches)

    def train_batch(method, data_iter=None):
        return method(take(data_iter, engine.micro_batches))

    def eval_batch(method, data_iter, *args, **options):
        compute_loss = options.get("compute_loss", args[1] if len(args) > 1 else True)
        if not compute_loss:
            pipe.builder.targets.give([])
            return method(data_iter, *args, **options)
        count = options.get("num_micro_batches", args[4] if len(args) > 4 else None)
        return method(take(data_iter, count or engine.micro_batches), *args, **options)

    MethodHook(engine, "train_batch", train_batch)
    MethodHook(engine, "eval_batch", eval_batch)
