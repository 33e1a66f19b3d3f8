"""Who sums which values of a flat gradient buffer, and in which order they travel: a plan, the same on all ranks. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from ds_recsys.comm.compressors.base import Compressor

_UNITS = 1_000_000  # that owners' shares are rounded to: integers cut alike on all ranks
_SMALLER = 4  # times, is the bucket that is summed last
_MANY, _SMALL = 32, 65_536  # chunks, of so many bytes at least, where owners are unlike


@dataclass(frozen=True)
class Segment:
    """A tensor, or a contiguous range of one, inside a flat fp32 buffer.

    Attributes:
        name: the parameter's; error feedback is kept under it.
        offset: of its first value in the buffer.
        start: of its first value in the flattened tensor, a multiple of `compressor.block`. It ends at such a multiple or
            at the tensor's end.
    """

    name: str
    offset: int
    numel: int
    compressor: Compressor
    start: int = 0


@dataclass(frozen=True)
class Part:
    """What is encoded in one go: values [start, stop) of a flattened tensor, at `offset` in the flat buffer.

    Attributes:
        shared: only some of these values belong to the owner, others encode the same block for another owner.
    """

    name: str
    start: int
    stop: int
    offset: int
    compressor: Compressor
    shared: bool = False

    @cached_property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def wire_bytes(self) -> int:
        return self.compressor.wire_bytes(self.numel)

    @cached_property
    def padded_bytes(self) -> int:
        """`wire_bytes` rounded up to 4, so that the next part of the payload starts where its scales can be stored."""
        return -(-self.wire_bytes // 4) * 4

    @cached_property
    def lossless(self) -> bool:
        return self.compressor.contraction(self.numel) == 0.0


@dataclass(frozen=True)
class Chunk:
    """What is on its way together: one tuple of parts per owner."""

    parts: tuple[tuple[Part, ...], ...]

    def bytes(self, owner: int) -> int:
        """Of the payload that holds that owner's parts."""
        return self.sizes[owner]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sum(part.padded_bytes for part in parts) for parts in self.parts)


def bucket_lengths(counts: Sequence[float], elements: int) -> list[int]:
    """How many of the tensors with these numbers of values, in the order of a forward pass, go into each bucket.

    The first bucket is summed last, with nothing left to cover it: it has a quarter of `elements` values at least, the next a
    half, all others `elements`, or what is left. A tensor of `elements` values is alone: it need not be copied into a bucket.
    """
    lengths: list[int] = []
    least, size, length = elements / _SMALLER, 0.0, 0
    for count in counts:
        if length and (size >= least or count >= elements):
            lengths.append(length)
            least, size, length = min(elements, 2 * least), 0.0, 0
        size, length = size + count, length + 1
    return lengths + [length] if length else lengths


def plan(segments, owners: int, chunk_bytes: int, shares: Sequence[float] | None = None) -> list[Chunk]:
    """Every value of `segments` to one of `owners`, who get about equal bytes of every chunk, or `shares` of them.

    Cuts fall between the compressors' blocks, so what a block is encoded as does not depend on the plan.

    Args:
        chunk_bytes: about the largest payload of one owner in one chunk.
        shares: by owner, in proportion; an owner may have none. One that has little sends in the first phase and receives
            in the second: for its link to be busy both ways there are many chunks, in both phases together.
    """
    parts = _whole(segments)
    weights = [1] * owners if shares is None else [round(_UNITS * share / sum(shares)) for share in shares]
    total = _bytes(parts)
    count = max(1, -(-total * max(weights) // (sum(weights) * chunk_bytes)))
    if min(weights) < max(weights):
        count = max(count, min(_MANY, total // _SMALL))
    pieces = _cut(parts, weights * count)
    return [Chunk(tuple(pieces[i : i + owners])) for i in range(0, len(pieces), owners)]


def plan_owned(segments, ranges, chunk_bytes: int) -> list[Chunk]:
    """To each owner the blocks that hold the values it wants; a block that two owners want parts of goes to both.

    Args:
        ranges: by owner, the [first, last) places in the flat buffer that it wants. They need not cover the buffer.
    """
    wanted = [_owned(_whole(segments), _joined(mine)) for mine in ranges]
    count = max(1, -(-max(_bytes(parts) for parts in wanted) // chunk_bytes))
    return [Chunk(tuple(pieces)) for pieces in zip(*(_cut(parts, [1] * count) for parts in wanted), strict=True)]


def _bytes(parts: list[Part]) -> int:
    return sum(part.padded_bytes for part in parts)


def _whole(segments) -> list[Part]:
    """A part per segment; neighbours that are sent as they are become one, for there a tensor's boundary means nothing."""
    parts = []
    for segment in segments:
        assert segment.start % segment.compressor.block == 0, f"{segment.name} starts inside a block"
        if not segment.numel:
            continue
        part = Part(segment.name, segment.start, segment.start + segment.numel, segment.offset, segment.compressor)
        last = parts[-1] if parts else None
        if last and _plain(last) and _plain(part) and last.offset + last.numel == part.offset:
            parts[-1] = replace(last, stop=last.stop + part.numel)
        else:
            parts.append(part)
    return parts


def _plain(part: Part) -> bool:
    return part.lossless and part.compressor.block == 1


def _slice(part: Part, first: int, last: int, **changes) -> Part:
    """Values [first, last) of `part`, counted from its first."""
    return replace(part, start=part.start + first, stop=part.start + last, offset=part.offset + first, **changes)


def _cut(parts: list[Part], weights: list[int]) -> list[tuple[Part, ...]]:
    """`parts`, cut at blocks into pieces with about these shares of the bytes: a block goes where its first byte would."""
    total, before, pieces = _bytes(parts), 0, [[] for _ in weights]
    ends = list(accumulate(weights))  # of the pieces, in units of which all bytes have ends[-1]
    for part in parts:
        size, block = part.padded_bytes, part.compressor.block
        blocks, first = -(-part.numel // block), 0
        while first < blocks:
            piece = bisect_right(ends, (before * blocks + size * first) * ends[-1] // (blocks * total))
            beyond = ends[piece] * total * blocks - before * blocks * ends[-1]
            last = min(blocks, -(-beyond // (size * ends[-1])))
            pieces[piece].append(_slice(part, first * block, min(last * block, part.numel)))
            first = last
        before += size
    return [tuple(piece) for piece in pieces]


def _joined(ranges) -> list[tuple[int, int]]:
    joined = []
    for first, last in sorted((first, last) for first, last in ranges if first < last):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _owned(parts: list[Part], ranges) -> list[Part]:
    """The blocks of `parts` that hold places in `ranges`; those that hold others too are marked as shared."""
    found = []
    for part in parts:
        block, edges, inner = part.compressor.block, set(), []
        for first, last in ranges:
            first, last = max(first - part.offset, 0), min(last - part.offset, part.numel)
            if first >= last:
                continue
            lower, upper = -(-first // block), -(-last // block) if last == part.numel else last // block
            edges |= {first // block} if first % block else set()
            edges |= {last // block} if last % block and last < part.numel else set()
            if lower < upper:
                inner.append(_slice(part, lower * block, min(upper * block, part.numel)))
        for edge in edges:
            inner.append(_slice(part, edge * block, min((edge + 1) * block, part.numel), shared=True))
        found += sorted(inner, key=lambda piece: piece.start)
    return found
