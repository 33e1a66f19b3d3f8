"""Batches of one size on every rank, cut from windows (training) or histories (evaluation)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset

from ds_recsys.data.interactions import Interactions
from ds_recsys.data.splits import Split, Which
from ds_recsys.errors import UserError

IGNORE = -100
TrainMicroBatch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
EvalBatch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class TrainBatches:
    """The micro-batches of one data rank, a deterministic function of (seed, epoch, step).

    The global batch of a step is `micro_batch * micro_batches * data_size` windows of similar length. Which windows
    it holds depends on that product alone, so a different grid with the same product trains on the same batches, and
    the ranks of a grid together hold each window of an epoch once. The last global batch of an epoch is filled up with
    empty rows (all padding, all labels -100); nothing is dropped.

    A micro-batch is `(input_ids, (labels, scale))`: int64 [micro_batch, S] twice, right-padded with 0 and -100, and a
    float64 scalar. S is shared by all micro-batches of all ranks of a step, as pipeline stages require; it is a
    multiple of `length_multiple`.

    Why `scale`: the loss of a step should be sum(CE) / P over the P supervised positions of the whole global batch.
    With loss_m = scale * sum(CE over micro-batch m) and scale = micro_batches * data_size / P, DeepSpeed's mean of the
    losses over micro_batches and its mean of the gradients over data_size cancel the factor and leave exactly that. A
    mean of micro-batch means would weigh a position in a sparse micro-batch more than one in a full one.

    `moments`, from `moments_of`, draws the order of interactions that happened at the same time anew in each epoch, within
    a window: the order that the file gives them means nothing, and a fixed one would be learned by heart.

    `shares`, one number per data rank, gives ranks unlike parts of each `micro_batch * data_size` windows (`apportion`): a
    micro-batch is larger on a fast device than on a slow one. As the scale counts the positions of all ranks, the step stays
    the same but for rounding.

    Lengths are grouped within random pools of `pool` global batches: a small pool mixes better, a large one pads less.
    """

    def __init__(
        self,
        windows: Dataset,
        *,
        micro_batch: int,
        micro_batches: int,
        data_size: int = 1,
        data_rank: int = 0,
        seed: int = 0,
        length_multiple: int = 1,
        pool: int = 100,
        moments: np.ndarray | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if min(micro_batch, micro_batches, data_size, length_multiple, pool) < 1 or not 0 <= data_rank < data_size:
            raise UserError(
                f"batches need positive sizes and a rank below data_size: micro_batch={micro_batch}, "
                f"micro_batches={micro_batches}, data_size={data_size}, data_rank={data_rank}, "
                f"length_multiple={length_multiple}, pool={pool}"
            )
        self._shape = (micro_batches, data_size * micro_batch)
        self._data_size, self._seed, self._multiple, self._pool = data_size, seed, length_multiple, pool
        counts = apportion(shares or [1] * data_size, data_size * micro_batch)
        start = sum(counts[:data_rank])
        self._mine = slice(start, start + counts[data_rank])
        self._tokens, self._starts, self._inputs, self._context = _mapped(windows)
        self._moments, self._first = moments, windows.data.column("first").to_numpy()
        self._planned: tuple[int, np.ndarray] | None = None

    @property
    def global_batch(self) -> int:
        """Windows in a step, over all ranks."""
        return int(np.prod(self._shape))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._inputs) // self.global_batch)

    def epoch_iterator(self, epoch: int, start_step: int = 0) -> Iterator[list[TrainMicroBatch]]:
        """Per step from `start_step` of the epoch on, the list of this rank's `micro_batches` micro-batches."""
        for step, rows in enumerate(self._plan(epoch)[start_step:], start=start_step):
            positions = self._supervised(rows)
            scale = torch.tensor(self._shape[0] * self._data_size / positions, dtype=torch.float64)
            length = self._padded_length(rows)
            mine = rows.reshape(self._shape)[:, self._mine]
            noise = [None] * len(mine)
            if self._moments is not None:  # drawn for all ranks, so that it does not depend on the grid
                drawn = np.random.default_rng((self._seed, epoch, step)).random((len(rows), length + 1))
                noise = drawn.reshape(*self._shape, length + 1)[:, self._mine]
            parts = (self._collate(part, length, draw) for part, draw in zip(mine, noise, strict=True))
            yield [(inputs, (labels, scale)) for inputs, labels in parts]

    def supervised(self, step: int) -> int:
        """Supervised positions of the whole global batch of `step`, counted from the start of training."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return self._supervised(self._plan(epoch)[step])

    @property
    def padding_fraction(self) -> float:
        """The part of epoch 0's input tokens that is padding, empty rows included."""
        plan = self._plan(0)
        tokens = sum(self._padded_length(rows) for rows in plan) * self.global_batch
        return 1 - int(self._inputs.sum()) / tokens

    def _supervised(self, rows: np.ndarray) -> int:
        rows = rows[rows >= 0]
        return int((self._inputs[rows] - self._context[rows]).sum())

    def _padded_length(self, rows: np.ndarray) -> int:
        longest = int(self._inputs[rows[rows >= 0]].max())
        return -(-longest // self._multiple) * self._multiple

    def _plan(self, epoch: int) -> np.ndarray:
        """int64 [steps, global_batch]: the windows of each step in their places, -1 for an empty row."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._make_plan(np.random.default_rng((self._seed, epoch))))
        return self._planned[1]

    def _make_plan(self, rng: np.random.Generator) -> np.ndarray:
        size, count, steps = self.global_batch, len(self._inputs), self.steps_per_epoch
        order = rng.permutation(count)
        pool = np.arange(count) // (self._pool * size)
        order = order[np.lexsort((self._inputs[order], pool))]  # stable: equal lengths stay in random order
        full, rest = divmod(count, size)
        if rest:  # the incomplete batch is cut out at a random place of the last pool: not always the longest windows
            begin = rng.integers(full // self._pool * self._pool, full + 1) * size
            order = np.concatenate((order[:begin], order[begin + rest :], order[begin : begin + rest]))
        plan = np.full((steps, size), -1)
        plan.reshape(-1)[:count] = order
        plan[:full] = rng.permuted(plan[rng.permutation(full)], axis=1)
        return plan

    def _collate(self, rows: np.ndarray, length: int, noise: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
        counts = np.where(rows >= 0, self._inputs[rows], -1)[:, None]  # a window has one item more than inputs
        column = np.arange(length + 1)
        filled = column <= counts
        items = np.where(filled, self._tokens[np.where(filled, self._starts[rows][:, None] + column, 0)], 0)
        if noise is not None:
            place = np.where(filled, self._first[rows][:, None] + column, 0)
            order = np.argsort(np.where(filled, self._moments[place] + noise, np.inf), axis=1, kind="stable")
            items = np.take_along_axis(items, order, axis=1)
        inputs = np.where(column[:-1] < counts, items[:, :-1], 0)
        supervised = filled[:, 1:] & (column[:-1] >= self._context[rows][:, None])
        labels = np.where(supervised, items[:, 1:], IGNORE)
        return torch.from_numpy(inputs.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """`total` things in about these shares, at least one to each: the next one goes where it adds least to a share's load.

    >>> apportion([2, 1, 1], 8)
    [4, 2, 2]
    """
    counts = [1] * len(shares)
    for _ in range(total - len(shares)):
        loads = [(count + 1) / share for count, share in zip(counts, shares, strict=True)]
        counts[loads.index(min(loads))] += 1
    return counts


def moments_of(interactions: Interactions) -> np.ndarray:
    """int32 [N]: the number of the moment (user and timestamp) of each place in `Interactions.sequence`, ascending.

    UserError without timestamps.
    """
    if interactions.timestamps is None:
        raise UserError(
            f"{interactions.report.source}: shuffling ties needs timestamps; turn recsys.dataset.shuffle_ties off"
        )
    changed = np.empty(len(interactions), dtype=bool)
    changed[1:] = np.diff(interactions.timestamps) != 0
    changed[interactions.offsets[:-1]] = True
    return np.cumsum(changed, dtype=np.int32)


def _mapped(windows: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of all windows, a view of the mapped file; per window its start there, its inputs and its context."""
    if len(windows) == 0:
        raise UserError("there are no training windows")
    if windows._indices is not None:  # a selection or a shuffle: the rows must be put in place first
        windows = windows.flatten_indices()
    column = windows.data.column("items")
    items = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = items.offsets.to_numpy()
    inputs = np.diff(offsets).astype(np.int64) - 1
    return items.values.to_numpy(), offsets[:-1].astype(np.int64), inputs, windows.data.column("context").to_numpy()


class EvalBatches:
    """The histories of all users with a target, each once, longest first, divided between the data ranks.

    Yields `(input_ids, (position, target, user))`: int64 [batch_size, S] right-padded with 0 and cut to the newest
    `max_length` items, and int64 [batch_size] three times: the place of the last history item in the row, the model
    index of the target, the number of the user. Filler rows have user -1, target 0 and position 0. The number of
    batches and the S of each are the same on all data ranks.

    UserError when no user has a target.
    """

    def __init__(
        self,
        interactions: Interactions,
        split: Split,
        which: Which = "valid",
        *,
        max_length: int,
        batch_size: int,
        data_size: int = 1,
        data_rank: int = 0,
        length_multiple: int = 1,
    ) -> None:
        if min(max_length, batch_size, data_size, length_multiple) < 1 or not 0 <= data_rank < data_size:
            raise UserError(
                f"evaluation needs positive sizes and a rank below data_size: max_length={max_length}, batch_size="
                f"{batch_size}, data_size={data_size}, data_rank={data_rank}, length_multiple={length_multiple}"
            )
        users, stops = split.targets(which)
        if not len(users):
            raise UserError(f"{interactions.report.source}: no user has a {which} target ({split.describe()})")
        lengths = np.minimum(stops - split.offsets[users], max_length)
        order = np.argsort(-lengths, kind="stable")
        self._sequence = interactions.sequence
        self._users, self._stops, self._lengths = users[order], stops[order], lengths[order]
        self._batch, self._size, self._rank = batch_size, data_size, data_rank
        self._multiple = length_multiple

    @property
    def num_users(self) -> int:
        """Users evaluated, over all ranks."""
        return len(self._users)

    def __len__(self) -> int:
        return -(-len(self._users) // (self._batch * self._size))

    def __iter__(self) -> Iterator[EvalBatch]:
        for step in range(len(self)):
            first = step * self._batch * self._size
            length = int(self._lengths[first])  # the longest of the batch, on every rank
            length = -(-length // self._multiple) * self._multiple
            # Ranks take turns, so that all of them hold users until the last are out.
            rows = first + self._rank + np.arange(self._batch) * self._size
            yield self._collate(rows, length)

    def _collate(self, rows: np.ndarray, length: int) -> EvalBatch:
        live = rows < len(self._users)
        rows = np.where(live, rows, 0)
        stops, counts = self._stops[rows], np.where(live, self._lengths[rows], 0)
        column = np.arange(length)
        filled = column < counts[:, None]
        place = np.where(filled, (stops - counts)[:, None] + column, 0)
        inputs = np.where(filled, self._sequence[place], 0).astype(np.int64)
        position = np.maximum(counts - 1, 0)
        target = np.where(live, self._sequence[stops], 0).astype(np.int64)
        user = np.where(live, self._users[rows], -1)
        labels = (torch.from_numpy(position), torch.from_numpy(target), torch.from_numpy(user))
        return torch.from_numpy(inputs), labels
