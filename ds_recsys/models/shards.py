"""Which rows or columns of a parameter each tensor rank holds; cutting a tensor up and putting it together again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shard:
    """`ranges[rank]` are the (start, stop) along dimension `dim` that `rank` holds, one behind the other.

    Ranges of two ranks are either disjoint or the same (key-value heads where there are fewer of them than ranks).
    """

    dim: int
    ranges: tuple[Ranges, ...]

    def shape(self, full: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of `rank`'s part of a tensor of shape `full`."""
        shape = list(full)
        shape[self.dim] = sum(stop - start for start, stop in self.ranges[rank])
        return tuple(shape)

    def take(self, full: Tensor, rank: int) -> Tensor:
        """`rank`'s part, in memory of its own."""
        pieces = [full.narrow(self.dim, start, stop - start) for start, stop in self.ranges[rank]]
        return (
            torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)
        )

    def owner(self, rank: int) -> bool:
        """Whether `rank` is the first to hold its part, and so the one that counts it in a sum over parameters."""
        return self.ranges[rank] not in self.ranges[:rank]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from every rank's part."""
        size = max(stop for ranges in self.ranges for _, stop in ranges)
        shape = list(parts[0].shape)
        shape[self.dim] = size
        full = parts[0].new_empty(shape)
        for part, ranges in zip(parts, self.ranges, strict=True):
            at = 0
            for start, stop in ranges:
                full.narrow(self.dim, start, stop - start).copy_(part.narrow(self.dim, at, stop - start))
                at += stop - start
        return full
