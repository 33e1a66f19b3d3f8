"""Sharing a number of heads or features out among the ranks of a tensor group."""

from dataclasses import dataclass

from ds_recsys.errors import UserError
from ds_recsys.head.shard import rows_of
from ds_recsys.models.shards import Ranges, Shard


@dataclass(frozen=True)
class Split:
    """`bounds[rank]` is the (start, stop) of the `count` heads or features that `rank` computes."""

    count: int
    bounds: tuple[tuple[int, int], ...]

    def held(self, rank: int) -> int:
        """How many of them `rank` has."""
        start, stop = self.bounds[rank]
        return stop - start

    def ranges(self, rank: int, rows: int, parts: int = 1) -> Ranges:
        """Rows of `rank` in a dimension of `rows`, made of `parts` equal parts that each hold every head or feature."""
        unit = rows // (parts * self.count)
        start, stop = self.bounds[rank]
        return tuple((rows // parts * p + start * unit, rows // parts * p + stop * unit) for p in range(parts))

    def shard(self, dim: int, rows: int, parts: int = 1) -> Shard:
        """The same for all ranks, along dimension `dim` of a parameter."""
        return Shard(dim, tuple(self.ranges(rank, rows, parts) for rank in range(len(self.bounds))))


@dataclass(frozen=True)
class HeadSplit:
    """Who computes which query heads, and with which key-value heads; a rank's heads form whole groups of equal size."""

    query: Split
    kv: Split

    def groups(self, rank: int) -> int:
        """Query heads per key-value head on `rank`."""
        return self.query.held(rank) // self.kv.held(rank)

    @property
    def duplicated(self) -> bool:
        """Whether a key-value head is held by several ranks."""
        return len(set(self.kv.bounds)) < len(self.kv.bounds)


def even(count: int, size: int, what: str, unit: int = 1) -> Split:
    """`count` of `what` over `size` ranks, shares differing by at most one, or by `unit` where that divides `count`.

    Raises:
        UserError: there are fewer of them than ranks.
    """
    if count < size:
        raise UserError(f"tensor {size} is more than the {count} {what}: set tensor to {count} or less")
    while count % unit or count // unit < size:
        unit //= 2
    bounds = (rows_of(count // unit, size, rank) for rank in range(size))
    return Split(count, tuple((start * unit, stop * unit) for start, stop in bounds))


def share_heads(heads: int, kv_heads: int, size: int, what: str = "query heads") -> HeadSplit:
    """Query heads over `size` ranks in whole key-value groups; with fewer groups than ranks, several ranks hold a
    group's key-value head and share its query heads.

    Raises:
        UserError: there are more ranks than query heads.
    """
    group = heads // kv_heads
    if kv_heads >= size:
        kv = even(kv_heads, size, what)
        return HeadSplit(Split(heads, tuple((a * group, b * group) for a, b in kv.bounds)), kv)
    even(heads, size, what)
    query_bounds: list[tuple[int, int]] = []
    kv_bounds: list[tuple[int, int]] = []
    for head in range(kv_heads):
        first, last = rows_of(size, kv_heads, head)  # the ranks that hold this key-value head
        inside = (rows_of(group, last - first, r) for r in range(last - first))
        query_bounds += [(head * group + a, head * group + b) for a, b in inside]
        kv_bounds += [(head, head + 1)] * (last - first)
    return HeadSplit(Split(heads, tuple(query_bounds)), Split(kv_heads, tuple(kv_bounds)))
