"""Ranking of the whole catalogue, streamed over blocks of items and over the ranks that hold them.

Scores exist one block at a time, [users, block]. The rules are those of ds_recsys/metrics.py: a higher score comes
first, ties go to the lowest item id, padding (row 0) never ranks, and 0 fills the places that no item is left for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.head.candidates import Best
from ds_recsys.head.reductions import combine
from ds_recsys.head.shard import HeadShard

Excluded = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ranking:
    """What one pass over the catalogue tells about B users.

    Attributes:
        ranks: int64 [B], place of the target among all items, from 1.
        items: int64 [B, k], the best ones first.
        scores: [B, k] of those items, -inf where `items` is 0; a score of -inf shows as the lowest finite number.
        losses: fp32 [B], cross-entropy of the target over all rows of the table, padding among them as in training.
    """

    ranks: Tensor
    items: Tensor
    scores: Tensor
    losses: Tensor


def rank_all(
    hidden: Tensor, target: Tensor, head: HeadShard, k: int, excluded: Excluded | None = None, block_rows=None
) -> Ranking:
    """Both `top_k` and `target_rank` in one pass over the items: 3 all-reduces and 1 all-gather in all."""
    stream = _Stream(hidden, head, excluded, block_rows)
    best, place = Best(stream.users, k, stream.dtype, stream.device), _Place(stream, target)
    stream.run([place, best])
    ranks, losses = place.result()
    scores, items = _gather(best, stream)
    return Ranking(ranks, items, scores, losses)


def top_k(
    hidden: Tensor, head: HeadShard, k: int, excluded: Excluded | None = None, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k best items of each user; one all-gather of k candidates per rank.

    Args:
        hidden: [B, H], the same on every rank of `head.axis`; also B is.
        excluded: (rows 0..B-1, items 0..I), int64 of one length: pairs left out, such as seen items or what is out of
            stock. Each rank takes what is in its shard.
        block_rows: items scored at a time; None chooses.

    Returns:
        (scores [B, k], items int64 [B, k]), as in `Ranking`; the same on every rank.

    Raises:
        ValueError: NaN scores, on all ranks alike; `excluded` outside the users or the catalogue.
    """
    stream = _Stream(hidden, head, excluded, block_rows)
    best = Best(stream.users, k, stream.dtype, stream.device)
    stream.run([best])
    return _gather(best, stream)


def target_rank(
    hidden: Tensor, target: Tensor, head: HeadShard, excluded: Excluded | None = None, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """(ranks int64 [B], losses fp32 [B]) of each user's held-out item, as in `Ranking`; 3 all-reduces.

    Args:
        target: int64 [B], 1..I; never left out, even when `excluded` lists it.
        hidden, excluded, block_rows: as in `top_k`. The losses are over all rows, whatever is excluded.

    Raises:
        ValueError: as `top_k`, and for a target outside the catalogue.
    """
    stream = _Stream(hidden, head, excluded, block_rows)
    place = _Place(stream, target)
    stream.run([place])
    return place.result()


@dataclass
class Block:
    """Scores [B, W] of items first .. first + W - 1, and what is known about them."""

    index: int
    first: int
    scores: Tensor
    peaks: Tensor  # [B, G], maxima of W / G neighbouring scores
    excluded: Excluded | None  # (rows, columns), no pair twice


class _Stream:
    """The blocks of this rank's shard, in order of item id. Padding is not among them."""

    GROUP = 64  # scores that share one maximum; one look at it tells whether any of them is wanted

    def __init__(self, hidden: Tensor, head: HeadShard, excluded: Excluded | None, block_rows: int | None):
        self.hidden, self.head = hidden.detach(), head
        self.users, self.device = len(hidden), hidden.device
        self.nan = torch.zeros(self.users, dtype=torch.bool, device=self.device)
        self.start = 1 if head.first_row == 0 else 0  # local
        self.bounds = self._cut(_block_rows(self.users, self.device) if block_rows is None else block_rows)
        self.excluded = None if excluded is None else self._sort(*excluded)
        self.dtype = self.score(0, 0).dtype

    def _cut(self, size: int) -> list[tuple[int, int]]:
        """(start, stop) local rows of each block; a length that is no multiple of GROUP ends in a block below it."""
        size = max(self.GROUP, size // self.GROUP * self.GROUP)
        rows = len(self.head.weight) if self.users else 0
        whole = self.start + max(0, rows - self.start) // self.GROUP * self.GROUP
        bounds = [(at, min(at + size, whole)) for at in range(self.start, whole, size)]
        return bounds + [(whole, rows)] if whole < rows else bounds

    def _sort(self, rows: Tensor, items: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """This shard's pairs once each in order of item, as (rows, local rows of items), and where blocks begin."""
        rows, items = rows.to(self.device), items.to(self.device)
        for what, values, stop in (("rows", rows, self.users), ("items", items, self.head.num_rows)):
            if len(values) and not (0 <= int(values.min()) and int(values.max()) < stop):
                raise ValueError(f"excluded {what} must be in 0..{stop - 1}")
        local, mine = self.head.local(items)
        pairs = torch.unique(local[mine] * max(1, self.users) + rows[mine])
        local, rows = pairs // max(1, self.users), pairs % max(1, self.users)
        starts = torch.tensor([start for start, _ in self.bounds] + [len(self.head.weight)], device=self.device)
        return rows, local, torch.searchsorted(local, starts).tolist()

    def score(self, start: int, stop: int) -> Tensor:
        """[B, stop - start], in fp32 or fp64."""
        scores = self.head.scores(self.hidden, slice(start, stop)).detach()
        return scores if scores.dtype == torch.float64 else scores.float()

    @torch.no_grad()
    def run(self, parts: list) -> None:
        """Show every block to each of `parts`. They run in this order; the last may write into the scores."""
        for block in self._blocks():
            self.nan |= block.peaks.isnan().any(1)
            for part in parts:
                part.update(block)

    def _blocks(self) -> Iterator[Block]:
        for index, (start, stop) in enumerate(self.bounds):
            scores = self.score(start, stop)
            peaks = scores.view(self.users, -1, min(self.GROUP, stop - start)).amax(-1)
            yield Block(index, self.head.first_row + start, scores, peaks, self._excluded(index))

    def _excluded(self, index: int) -> Excluded | None:
        if self.excluded is None:
            return None
        rows, local, starts = self.excluded
        here = slice(starts[index], starts[index + 1])
        return (rows[here], local[here] - self.bounds[index][0]) if here.start < here.stop else None


class _Place:
    """Rank and loss of the targets: counts what is ahead, and adds up the softmax's denominator."""

    def __init__(self, stream: _Stream, target: Tensor):
        head, num_rows = stream.head, stream.head.num_rows
        if len(target) != stream.users:
            raise ValueError(f"target_rank: {len(target)} targets for {stream.users} users")
        if len(target) and not (1 <= int(target.min()) and int(target.max()) < num_rows):
            raise ValueError(f"target_rank: targets must be in 1..{num_rows - 1}, item 0 being padding")
        self.stream, self.target = stream, target.to(stream.device)
        self.homes = self._homes()
        self.score = self._target_scores()
        # score > below is score >= self.score, which the items before the target need to be ahead of it.
        self.below = torch.nextafter(self.score, torch.full_like(self.score, -torch.inf))
        self.lost = self.score == -torch.inf  # there is nothing below
        self.ahead = torch.zeros(stream.users, dtype=torch.float64, device=stream.device)
        self.maximum = torch.full_like(self.ahead, -torch.inf)
        self.total = torch.zeros_like(self.ahead)
        if head.first_row == 0 and len(head.weight):
            self._add_exp(stream.score(0, 1))

    def _homes(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Block -> (users whose target is in it, the targets' columns)."""
        local, mine = self.stream.head.local(self.target)
        starts = torch.tensor([start for start, _ in self.stream.bounds], dtype=torch.int64, device=local.device)
        users = mine.nonzero()[:, 0]
        blocks = torch.searchsorted(starts, local[users], right=True) - 1
        return {
            index: (users[blocks == index], local[users[blocks == index]] - self.stream.bounds[index][0])
            for index in blocks.unique().tolist()
        }

    @torch.no_grad()
    def _target_scores(self) -> Tensor:
        """[B], from whole blocks: a direct dot could differ in the last bit from what ties are decided with."""
        found = torch.zeros(self.stream.users, dtype=self.stream.dtype, device=self.stream.device)
        for index, (users, columns) in self.homes.items():
            found[users] = self.stream.score(*self.stream.bounds[index])[users, columns]
        if self.stream.head.axis.size > 1:
            dist.all_reduce(found, group=self.stream.head.axis.group)
        return found

    def update(self, block: Block) -> None:
        width = block.scores.shape[1]
        before = self.target >= block.first + width  # the whole block has lower ids than the target
        level = torch.where(before, self.below, self.score)[:, None]
        ahead = torch.gt(block.scores, level, out=torch.empty_like(block.scores)).sum(1)  # floats add up fastest
        ahead[before & self.lost] = width
        if block.index in self.homes:
            users, columns = self.homes[block.index]
            ahead[users] = self._ahead(block, users[:, None], torch.arange(width, device=users.device)).sum(1).to(ahead)
        if block.excluded is not None:
            rows, columns = block.excluded
            ahead.index_add_(0, rows, -self._ahead(block, rows, columns).to(ahead))
        self.ahead += ahead
        self._add_exp(block.scores, block.peaks)

    def _ahead(self, block: Block, rows: Tensor, columns: Tensor) -> Tensor:
        scores, level = block.scores[rows, columns], self.score[rows]
        return (scores > level) | ((scores == level) & (block.first + columns < self.target[rows]))

    def _add_exp(self, scores: Tensor, peaks: Tensor | None = None) -> None:
        peak = (scores if peaks is None else peaks).amax(1)
        lowest = torch.finfo(scores.dtype).min  # -inf - -inf is no number
        largest = torch.maximum(self.maximum, peak.double()).clamp(min=lowest)
        added = (scores - largest.to(scores.dtype)[:, None]).exp_().sum(1)
        self.total = self.total * (self.maximum - largest).exp() + added
        self.maximum = largest

    def result(self) -> tuple[Tensor, Tensor]:
        """(ranks, losses) over all ranks of the axis; raises on all of them alike."""
        maximum = self.maximum.masked_fill(self.stream.nan, 0)  # what MAX makes of NaN is left open
        counts = torch.stack([self.ahead, self.stream.nan.double()], 1)
        maximum, total, counts = combine(maximum, self.total, counts, self.stream.head.axis)
        _refuse_nan(counts[:, 1] > 0)
        losses = total.log() + maximum - self.score.double()
        return 1 + counts[:, 0].long(), losses.float()


def _gather(best: Best, stream: _Stream) -> tuple[Tensor, Tensor]:
    """The best of all ranks' bests. fp64 holds an item id and a score exactly, so that one message takes both."""
    values, items = best.result()
    axis, k = stream.head.axis, best.k
    if axis.size == 1:
        _refuse_nan(stream.nan)
        return values, items
    mine = torch.cat([values.double(), items.double(), stream.nan.double()[:, None]], 1)
    parts = [torch.empty_like(mine) for _ in range(axis.size)]
    dist.all_gather(parts, mine, group=axis.group)
    _refuse_nan(torch.stack([part[:, -1] for part in parts]).sum(0) > 0)
    # Stable, and a higher rank holds higher ids, so ties stay in order of id.
    values = torch.cat([part[:, :k] for part in parts], 1).to(values)
    items = torch.cat([part[:, k : 2 * k] for part in parts], 1).long()
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), items.gather(1, order[:, :k])


def _refuse_nan(rows: Tensor) -> None:
    if rows.any():
        row = int(rows.nonzero()[0])
        raise ValueError(f"scores of row {row} hold NaN, so they have no ranking; has the training diverged?")


def _block_rows(users: int, device: torch.device) -> int:
    """A block of scores that stays in a core's cache, or that fills a GPU."""
    elements = 2**17 if device.type == "cpu" else 2**26
    return min(max(256, elements // max(1, users)), 2**20)
