"""The plan of an aggregation: what every owner gets, where the cuts are, and how evenly bytes are spread."""

import random

import pytest

from ds_recsys.comm.compressors.base import Compressor
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.layout import Segment, bucket_lengths, plan, plan_owned


class Blocks(Compressor):
    """A byte per value and 4 per block, as int8 has."""

    name = "blocks"

    def __init__(self, block):
        self.block = block

    def wire_bytes(self, numel):
        return numel + 4 * -(-numel // self.block)

    def contraction(self, numel):
        return 0.5


def segments_of(sizes, compressor, gap=0):
    segments, offset = [], gap
    for index, size in enumerate(sizes):
        segments.append(Segment(f"tensor{index}", offset, size, compressor))
        offset += size + gap
    return segments


def places(parts):
    return [place for part in parts for place in range(part.offset, part.offset + part.numel)]


@pytest.mark.parametrize("owners", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_bytes", [16, 100, 10**6])
@pytest.mark.parametrize("sizes", [[1], [0, 3], [1000], [7, 64, 65, 1, 0, 300], [16] * 20])
def test_every_value_has_one_owner_and_cuts_are_at_blocks(owners, chunk_bytes, sizes):
    segments = segments_of(sizes, Blocks(16), gap=3)
    chunks = plan(segments, owners, chunk_bytes)
    parts = [part for chunk in chunks for owned in chunk.parts for part in owned]
    assert all(len(chunk.parts) == owners for chunk in chunks)
    assert places(parts) == places(
        [part for chunk in plan(segments, 1, 10**9) for owned in chunk.parts for part in owned]
    )
    assert sorted(places(parts)) == [p for s in segments for p in range(s.offset, s.offset + s.numel)]
    ends = {segment.name: segment.numel for segment in segments}
    for part in parts:
        assert part.start % 16 == 0 and (part.stop % 16 == 0 or part.stop == ends[part.name])
        assert part.offset - part.start == next(s.offset for s in segments if s.name == part.name)


@pytest.mark.parametrize("owners", [1, 2, 4])
def test_owners_get_about_equal_bytes_of_every_chunk(owners):
    segments = segments_of([4096, 70_000, 33, 768, 250_000], Blocks(256))
    chunks = plan(segments, owners, 4096)
    assert len(chunks) > 10
    sizes = [chunk.bytes(owner) for chunk in chunks for owner in range(owners)]
    assert max(sizes) <= 4096 + 520 and min(sizes) >= 4096 - 3 * 520
    assert sum(sizes) == sum(-(-s.compressor.wire_bytes(s.numel) // 4) * 4 for s in segments)


@pytest.mark.parametrize("shares", [(1, 1, 1, 0), (0, 0.5, 0, 2), (3, 1), (0.333, 0.333, 0.334, 0.0)])
def test_owners_get_their_shares_of_every_chunk(shares):
    segments = segments_of([4096, 70_000, 33, 768, 250_000], Blocks(256))
    chunks, share = plan(segments, len(shares), 4096, shares), [share / sum(shares) for share in shares]
    assert len(chunks) > 10
    for chunk in chunks:
        assert max(chunk.sizes) <= 4096 + 520
        for size, part in zip(chunk.sizes, share, strict=True):
            assert abs(size - part * sum(chunk.sizes)) <= 3 * 520 if part else size == 0
    held = [part for chunk in chunks for owned in chunk.parts for part in owned]
    assert sorted(places(held)) == [p for s in segments for p in range(s.offset, s.offset + s.numel)]


def test_equal_shares_are_the_plan_without_shares():
    segments = segments_of([4096, 70_000, 33, 768, 250_000], Blocks(256))
    assert plan(segments, 4, 4096, (2, 2, 2, 2)) == plan(segments, 4, 4096)


def test_unlike_owners_work_in_many_chunks():
    """Else a link whose host owns nothing is busy one way at a time."""
    large, small = segments_of([4_000_000], Blocks(256)), segments_of([140_000], Blocks(256))
    assert len(plan(large, 4, 10**7)) == len(plan(large, 4, 10**7, (1, 1, 1, 1))) == 1
    assert len(plan(large, 4, 10**7, (1, 1, 1, 0))) == 32
    assert len(plan(small, 4, 10**7, (1, 1, 1, 0))) == 2  # not of less than 64 KB


def test_neighbours_that_are_sent_as_they_are_become_one_part():
    vectors = segments_of([5, 6, 7], Float32())
    (chunk,) = plan([*vectors, Segment("far", 30, 4, Float32())], 1, 10**6)
    assert [(part.offset, part.numel) for part in chunk.parts[0]] == [(0, 18), (30, 4)]
    (chunk,) = plan(segments_of([16, 16], Blocks(16)), 1, 10**6)
    assert len(chunk.parts[0]) == 2


def test_a_segment_that_starts_inside_a_block_is_refused():
    with pytest.raises(AssertionError, match="tensor starts inside a block"):
        plan([Segment("tensor", 0, 32, Blocks(16), start=8)], 2, 100)


@pytest.mark.parametrize("seed", range(20))
def test_owned_ranges_come_with_their_whole_blocks(seed):
    draw = random.Random(seed)
    segments = segments_of([draw.randrange(1, 90) for _ in range(6)], Blocks(16), gap=draw.choice([0, 5]))
    total = segments[-1].offset + segments[-1].numel
    cuts = [0, *sorted(draw.randrange(total + 1) for _ in range(7)), total]
    ranges = [[], [], []]
    for first, last in zip(cuts, cuts[1:], strict=False):
        ranges[draw.randrange(3)].append((first, last))
    chunks = plan_owned(segments, ranges, draw.choice([24, 10**6]))
    blocks = {  # place -> the block it is in
        place: (segment.name, (place - segment.offset) // 16)
        for segment in segments
        for place in range(segment.offset, segment.offset + segment.numel)
    }
    for owner, wanted in enumerate(ranges):
        mine = {place for first, last in wanted for place in range(first, last) if place in blocks}
        parts = [part for chunk in chunks for part in chunk.parts[owner]]
        got = places(parts)
        assert len(got) == len(set(got))
        assert set(got) == {place for place in blocks if blocks[place] in {blocks[one] for one in mine}}
        for part in parts:
            assert part.shared == (not set(places([part])) <= mine)
            assert not part.shared or part.numel <= 16
            assert part.start % 16 == 0


def test_an_owner_that_wants_nothing_gets_nothing():
    chunks = plan_owned(segments_of([64], Blocks(16)), [[(0, 64)], []], 40)
    assert [len(chunk.parts[1]) for chunk in chunks] == [0] * len(chunks) and len(chunks) == 2


@pytest.mark.parametrize(
    "counts, elements, expected",
    [
        ([10] * 8, 40, [1, 2, 4, 1]),
        ([40] * 3, 40, [1, 1, 1]),
        ([3, 3, 3, 39, 5], 40, [4, 1]),
        ([3, 3, 3, 40, 5], 40, [3, 1, 1]),
        ([5, 50, 60], 40, [1, 1, 1]),
        ([1, 1], 40, [2]),
        ([], 40, []),
    ],
)
def test_the_bucket_that_is_summed_last_is_small(counts, elements, expected):
    assert bucket_lengths(counts, elements) == expected
