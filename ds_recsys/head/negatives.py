"""Negatives of a micro-batch, shared by all of its positions: each tensor rank draws from its own rows of the table.

A sampler is built once and called per micro-batch, `sampler(target, seed)`. What it draws is stratified: a rank's items
lie on a line in order of their ids, as long as their weights, the line is cut into as many equal pieces as are to be
drawn, and each piece gives one item. So how often an item is expected to be drawn is known exactly, which makes
exp(score - log_expected) summed over the draw an unbiased estimate of the sum of exp(score) over the catalogue. Draws
are made on the CPU: they are few, and so the same on every device. Padding (row 0) is never drawn.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.head.shard import HeadShard


@dataclass(frozen=True)
class Negatives:
    """What one tensor rank drew.

    Attributes:
        rows: int64 [n], rows of this rank's shard in rising order; with popularity one may come several times.
        log_expected: fp32 [n], log of how often the item is expected to be drawn (logQ; 0: it always is, once).
        total: how many all ranks of the axis drew.
    """

    rows: Tensor
    log_expected: Tensor
    total: int


class UniformNegatives:
    """Every item equally often, none twice. With `number` = all items each is drawn, and nothing is left to chance.

    Args:
        head: says which rows this rank has; the weights are not read.
        number: of draws over all ranks, shared out in proportion to their items and rounded up on each.

    Building one is collective over `head.axis`.
    """

    def __init__(self, head: HeadShard, number: int):
        _check_number(number)
        self.head = head
        self.first = 1 if head.first_row == 0 else 0
        items = max(0, len(head.weight) - self.first)
        self.share, self.total = _share(number, items, head)
        edges = torch.arange(self.share + 1) * items // max(1, self.share)
        self.starts, self.lengths = edges[:-1] + self.first, edges.diff()

    def __call__(self, target: Tensor, seed: int) -> Negatives:
        """`target` is not looked at. `seed` is another one for every step, micro-batch and data rank: `mix_seed`."""
        rows = self.starts + (_uniform(self.share, seed, self.head) * self.lengths).long()
        return _negatives(rows, -self.lengths.double().log(), self.total, self.head)


class PopularityNegatives:
    """Items in proportion to max(count, 1) ** power, with replacement; an item heavier than a piece comes repeatedly.

    Building takes one cumulative sum over the shard, a draw one binary search each. Building is collective.

    Args:
        head, number: as in `UniformNegatives`, in proportion to the ranks' weights.
        counts: [I + 1] of the whole catalogue, such as occurrences in the training data; that of row 0 is not read.
            An item that never occurred counts as one: what cannot be drawn would be missing from the softmax.
        power: 1 is popularity itself, 0 uniform; word2vec's 0.75 (https://arxiv.org/abs/1310.4546) lies between.
    """

    def __init__(self, head: HeadShard, number: int, counts: Tensor, power: float = 0.75):
        _check_number(number)
        self.head = head
        weights = _weights(counts, head) ** power
        weights[: 1 if head.first_row == 0 else 0] = 0
        self.cumulative = weights.cumsum(0)
        self.mass = float(self.cumulative[-1]) if len(weights) else 0.0
        self.share, self.total = _share(number, self.mass, head)
        self.log_expected = (weights * (self.share / self.mass)).log() if self.mass else weights

    def __call__(self, target: Tensor, seed: int) -> Negatives:
        """As `UniformNegatives`."""
        place = (torch.arange(self.share) + _uniform(self.share, seed, self.head)) * (self.mass / max(1, self.share))
        rows = torch.searchsorted(self.cumulative, place, right=True)
        rows = rows.clamp(max=len(self.cumulative) - 1)  # a place may round up to the very end
        return _negatives(rows, self.log_expected[rows], self.total, self.head)


class InBatchNegatives:
    """The distinct targets of the micro-batch itself. Nothing is drawn, and building is not collective.

    How often an item is expected among them: 1 - (1 - p) ** (N - 1) for one of the N - 1 other positions to have it,
    p being its share of `counts`. That is exact as far as targets are independent draws by popularity.

    Args:
        head, counts: as in `PopularityNegatives`.
    """

    def __init__(self, head: HeadShard, counts: Tensor):
        self.head = head
        whole = counts.cpu().double().clamp(min=1)
        self.log_others = torch.log1p(-(_weights(counts, head) / whole[1:].sum()).clamp(max=1))

    def __call__(self, target: Tensor, seed: int = 0) -> Negatives:
        """target: int64 [N], the supervised positions of the micro-batch, the same on every rank of the axis."""
        distinct = target.unique()
        rows, mine = self.head.local(distinct)
        rows = rows[mine].cpu()
        log_expected = (-torch.expm1(self.log_others[rows] * max(1, len(target) - 1))).log()
        return _negatives(rows, log_expected, len(distinct), self.head)


def mix_seed(*parts: int) -> int:
    """One seed from several numbers, such as (seed, data rank, step, micro-batch); neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def _uniform(number: int, seed: int, head: HeadShard) -> Tensor:
    generator = torch.Generator().manual_seed(mix_seed(seed, head.axis.rank))
    return torch.rand(number, generator=generator, dtype=torch.float64)


def _weights(counts: Tensor, head: HeadShard) -> Tensor:
    if len(counts) != head.num_rows:
        raise ValueError(f"{len(counts)} counts for a table of {head.num_rows} rows, padding among them")
    rows = slice(head.first_row, head.first_row + len(head.weight))
    return counts[rows].cpu().double().clamp(min=1)


def _share(number: int, mass: float, head: HeadShard) -> tuple[int, int]:
    """(this rank's number of draws, that of all ranks); at least one where there is an item, or it could not be drawn."""
    masses = torch.tensor([mass], dtype=torch.float64, device=head.weight.device)
    if head.axis.size > 1:
        parts = [torch.empty_like(masses) for _ in range(head.axis.size)]
        dist.all_gather(parts, masses, group=head.axis.group)
        masses = torch.cat(parts)
    masses = masses.tolist()
    shares = [math.ceil(number * part / sum(masses) - 1e-9) if part else 0 for part in masses]
    return shares[head.axis.rank], sum(shares)


def _negatives(rows: Tensor, log_expected: Tensor, total: int, head: HeadShard) -> Negatives:
    device = head.weight.device
    return Negatives(rows.to(device), log_expected.float().to(device), total)


def _check_number(number: int) -> None:
    if number < 1:
        raise ValueError(f"number={number}: draw at least one negative")
