"""The sum over ranks of compressed gradients against the same sum worked out in one process."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid

from ds_recsys.comm import payload
from ds_recsys.comm.aggregation import Aggregator
from ds_recsys.comm.compressors.base import Compressor
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.error_feedback import ErrorFeedback
from ds_recsys.comm.layout import Segment
from ds_recsys.comm.transport import Collective, PointToPoint, transport_for


class Rounded(Compressor):
    """Each block of 8 as int8 codes and an fp32 scale of absmax/100; `seed` moves the grid, and so what is rounded to."""

    name, block = "rounded", 8

    def wire_bytes(self, numel):
        return numel + 4 * -(-numel // self.block)

    def contraction(self, numel):
        return 0.01

    def encode(self, gradient, payload, *, residual=None, multiplier=1.0, error=None, seed=0):
        x = gradient if residual is None else gradient + multiplier * residual
        blocks = -(-x.numel() // self.block)
        padded = torch.zeros(blocks * self.block)
        padded[: x.numel()] = x
        rows = padded.view(blocks, self.block)
        scales = rows.abs().amax(dim=1) / 100
        scales[~rows.isfinite().all(dim=1)] = float("nan")
        codes = (torch.nan_to_num(rows / scales[:, None]) + self._shift(blocks, seed)).round()
        payload[: 4 * blocks].view(torch.float32).copy_(scales)
        payload[4 * blocks :].view(torch.int8).copy_(codes.flatten()[: x.numel()])
        if error is not None:
            self.decode(payload, error, seed=seed)
            torch.sub(x, error, out=error)
        return bool(x.isfinite().all())

    def decode(self, payload, out, *, add=False, last=False, seed=0):
        blocks = -(-out.numel() // self.block)
        codes = torch.zeros(blocks * self.block)
        codes[: out.numel()] = payload[4 * blocks :].view(torch.int8)
        rows = (codes.view(blocks, self.block) - self._shift(blocks, seed)) * payload[: 4 * blocks].view(torch.float32)[
            :, None
        ]
        values = rows.flatten()[: out.numel()]
        out.add_(values) if add else out.copy_(values)

    def _shift(self, blocks, seed):
        return ((seed + torch.arange(blocks)) % 7)[:, None] / 14


SIZES = [("table", 203), ("norm", 5), ("bias", 3), ("weight", 90), ("one", 1), ("none", 0)]


def layout(order=range(6), gap=0):
    """Segments in an order; vectors are sent as they are."""
    segments, offset = [], gap
    for name, size in (SIZES[index] for index in order):
        segments.append(Segment(name, offset, size, Float32() if name in ("norm", "bias") else Rounded()))
        offset += size + gap
    return segments, offset


def gradients(rank, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return {name: torch.randn(size, generator=generator) * 10.0 ** (rank % 3) for name, size in SIZES}


def filled(segments, length, values):
    flat = torch.full((length,), 77.0)
    for segment in segments:
        flat[segment.offset : segment.offset + segment.numel] = values[segment.name]
    return flat


def read(segments, flat):
    return {s.name: flat[s.offset : s.offset + s.numel].clone() for s in segments}


def reference(ranks, step=0, seed=0, worker=None, server=None, phases=None):
    """What `ranks` send and sum, each tensor whole, in one process; residuals, if any, are read from and written to dicts."""
    result = {}
    for segment in layout()[0]:
        codec = payload.Codec(torch.empty(0), ErrorFeedback(False), step)
        part = payload.Part(segment.name, 0, segment.numel, 0, segment.compressor)
        chance = codec._seed(part)

        def sent(x, segment=segment, chance=chance):
            message = torch.empty(segment.compressor.wire_bytes(x.numel()), dtype=torch.uint8)
            segment.compressor.encode(x, message, seed=chance)
            out = torch.empty_like(x)
            segment.compressor.decode(message, out, seed=chance)
            return out

        total = None
        for rank in range(ranks):
            x = gradients(rank, seed)[segment.name]
            if worker is not None:
                x = x + 1.0 * worker.get((rank, segment.name), 0.0)
            out = sent(x)
            if worker is not None:
                worker[rank, segment.name] = x - out
            total = out.clone() if total is None else total + out
        if (phases or (1 if ranks == 2 else 2)) == 2:
            if server is not None:
                total = total + 1.0 * server.get(segment.name, 0.0)
            out = sent(total)
            if server is not None:
                server[segment.name] = total - out
            total = out
        result[segment.name] = total
    return result


def check_equal(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name


def sums_everywhere():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    expected = reference(ranks, step=3)
    for transport in (PointToPoint(), Collective()):
        for chunk_bytes, depth, checksum in ((64, 1, False), (64, 2, True), (10**6, 1, False), (8, 3, False)):
            aggregator = Aggregator(transport, ErrorFeedback(False), chunk_bytes, depth, checksum)
            for order, gap in ((range(6), 0), ((3, 5, 0, 4, 2, 1), 3)):
                segments, length = layout(order, gap)
                flat = filled(segments, length, gradients(rank))
                outside = filled(segments, length, {name: torch.zeros(size) for name, size in SIZES}) == 77
                assert aggregator.all_reduce(flat, segments, step=3)
                check_equal(read(segments, flat), expected)
                assert (flat[outside] == 77).all()
    return expected["table"].numel()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_are_those_of_the_decoded_payloads_whatever_the_layout_and_the_transport(ranks):
    assert run_on_grid(sums_everywhere, ranks) == [203] * ranks


def sums_of_unlike_owners():
    """Whoever sums what, the sums are the same bits, and what is held back is all there."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for transport in (PointToPoint(), Collective()):
        for shares in ((0.0, *[1.0] * (ranks - 1)), (*[0.0] * (ranks - 1), 2.0), tuple(range(1, ranks + 1))):
            feedback, worker, server = ErrorFeedback(), {}, {}
            aggregator = Aggregator(transport, feedback, chunk_bytes=64, checksum=True, shares=shares)
            segments, length = layout()
            for step in range(3):
                flat = filled(segments, length, gradients(rank, seed=step))
                assert aggregator.all_reduce(flat, segments, step)
                check_equal(read(segments, flat), reference(ranks, step, seed=step, worker=worker, server=server))
                feedback.commit()
            owned = {name for side, name, *_ in feedback.state_dict() if side == "server"}
            assert bool(owned) == bool(shares[rank])


@pytest.mark.parametrize("ranks", [3, 4])
def test_unlike_owners_change_nothing_of_the_sums(ranks):
    run_on_grid(sums_of_unlike_owners, ranks)


def tiny_sums():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for sizes in ([1], [1, 0, 1], [9], []):
        segments = [Segment(f"t{i}", sum(sizes[:i]), size, Rounded()) for i, size in enumerate(sizes)]
        flat = torch.full((sum(sizes),), 100.0 * 2**rank)
        aggregator = Aggregator(transport_for(), ErrorFeedback(), chunk_bytes=8)
        aggregator.all_reduce(flat, segments, step=0)
        torch.testing.assert_close(flat, torch.full((sum(sizes),), 100.0 * (2**ranks - 1)), rtol=0.02, atol=0)


def test_fewer_blocks_than_owners():
    run_on_grid(tiny_sums, 3)


def sums_for_owners():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for chunk_bytes in (24, 10**6):
        for ranges in (
            [[(0, 101)], [(101, 103), (106, 230)], [(103, 106), (230, 302)]],  # two cuts in one block
            [[(150, 302)], [(0, 150)], []],
            [[(0, 13), (26, 39)], [(13, 26), (39, 150)], [(160, 302)]],
        ):
            ranges = [*ranges, *[[] for _ in range(ranks - 3)]]
            segments, length = layout()
            feedback = ErrorFeedback()
            residuals, expected = {}, None
            for step in range(3):
                expected = filled(segments, length, reference(ranks, step, seed=step, worker=residuals, phases=1))
                flat = filled(segments, length, gradients(rank, seed=step))
                aggregator = Aggregator(transport_for(), feedback, chunk_bytes)
                assert aggregator.reduce_to_owners(flat, segments, ranges, step)
                feedback.commit()
                for first, last in ranges[rank]:
                    assert torch.equal(flat[first:last], expected[first:last]), (step, first, last)


@pytest.mark.parametrize("ranks", [3, 4])
def test_owners_get_the_sums_of_their_ranges_with_cuts_inside_blocks_and_error_feedback(ranks):
    run_on_grid(sums_for_owners, ranks)


def feedback_over_steps():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    segments, length = layout()
    feedback = ErrorFeedback()
    aggregator = Aggregator(transport_for(), feedback, chunk_bytes=64)
    worker, server = {}, {}
    received, given = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for step in range(50):
        flat = filled(segments, length, gradients(rank, seed=step))
        given += flat
        assert aggregator.all_reduce(flat, segments, step)
        check_equal(read(segments, flat), reference(ranks, step, seed=step, worker=worker, server=server))
        feedback.commit()
        received += flat
    kept = torch.zeros(length, dtype=torch.float64)
    for (_, name, start, _stop), value in feedback.state_dict().items():
        offset = next(s.offset for s in segments if s.name == name) + start
        kept[offset : offset + value.numel()] += value
    for total in (given, kept):
        dist.all_reduce(total)
    torch.testing.assert_close(received, given - kept, rtol=1e-6, atol=1e-3)
    assert kept.abs().max() > 0.1


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_was_received_is_what_was_given_less_the_residuals(ranks):
    run_on_grid(feedback_over_steps, ranks)


def sums_with_a_bad_value(bad):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    segments, length = layout()
    aggregator = Aggregator(transport_for(), ErrorFeedback(), chunk_bytes=64)
    flat = filled(segments, length, gradients(rank))
    if rank == 1:
        flat[[18, 204]] = bad  # the third block of the table, and a value that is sent as it is
    assert aggregator.all_reduce(flat, segments, step=0) == (rank != 1 and (ranks == 2 or rank not in owners(flat)))
    places = (~flat.isfinite()).nonzero().flatten().tolist()
    assert places == [*range(16, 24), 204], places


def owners(flat):
    """The ranks whose sum held what is not finite: those who found it when they encoded it again."""
    segments, _ = layout()
    from ds_recsys.comm.layout import plan

    chunks = plan(segments, dist.get_world_size(), 64)
    return {
        owner
        for chunk in chunks
        for owner, parts in enumerate(chunk.parts)
        for part in parts
        if not flat[part.offset : part.offset + part.numel].isfinite().all()
    }


@pytest.mark.parametrize("ranks, bad", [(2, float("nan")), (3, float("nan")), (3, float("-inf"))])
def test_what_is_not_finite_on_one_rank_is_so_on_all_in_its_block_alone(ranks, bad):
    run_on_grid(sums_with_a_bad_value, ranks, bad=bad)


def damaged_sum(phase):
    original, calls = PointToPoint.open, []

    def damage(self, incoming, tag):
        exchange = original(self, incoming, tag)
        calls.append(exchange)
        if self.rank == 1 and len(calls) == 1 + phase:
            wait = exchange.wait

            def damaged():
                wait()
                incoming[2][3] ^= 16

            exchange.wait = damaged
        return exchange

    PointToPoint.open = damage
    segments, length = layout()
    aggregator = Aggregator(transport_for(), ErrorFeedback(), chunk_bytes=10**6, checksum=True)
    try:
        aggregator.all_reduce(filled(segments, length, gradients(dist.get_rank())), segments, step=0)
    except payload.ChecksumError as error:
        return str(error)
    except RuntimeError:
        return "a peer left"


@pytest.mark.parametrize("phase", [0, 1])
def test_a_damaged_payload_is_named(phase):
    assert (
        run_on_grid(damaged_sum, 3, phase=phase)[1] == "chunk 0 from rank 2 of the group is damaged: its crc32 differs"
    )


def counted_bytes():
    segments = [Segment("table", 0, 1600, Rounded()), Segment("weight", 1600, 800, Rounded())]
    sent = []
    for checksum in (False, True):
        transport = transport_for()
        aggregator = Aggregator(transport, ErrorFeedback(), chunk_bytes=300, checksum=checksum)
        aggregator.all_reduce(torch.randn(2400), segments, step=0)
        all_of_it = transport.bytes_sent
        if checksum:
            continue
        ranges = [[(2400 * r // transport.size, 2400 * (r + 1) // transport.size)] for r in range(transport.size)]
        aggregator.reduce_to_owners(torch.randn(2400), segments, ranges, step=0)
        sent += [all_of_it, transport.bytes_sent - all_of_it]
    padded = Collective()
    Aggregator(padded, ErrorFeedback(), chunk_bytes=300).all_reduce(torch.randn(2400), segments, step=0)
    return [*sent, all_of_it, padded.bytes_sent]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_sent_are_those_of_the_formula(ranks):
    size = 2400 + 4 * 300
    sent = run_on_grid(counted_bytes, ranks)
    chunks = -(-size // 300) if ranks == 2 else -(-size // (300 * ranks))
    messages = chunks * (ranks - 1) * (1 if ranks == 2 else 2) * ranks
    assert sum(one[0] for one in sent) == (2 * size if ranks == 2 else 2 * (ranks - 1) * size)
    assert sum(one[1] for one in sent) == (ranks - 1) * size
    assert sum(one[2] for one in sent) == sum(one[0] for one in sent) + 4 * messages
    assert 1.0 <= sum(one[3] for one in sent) / sum(one[0] for one in sent) < 1.02  # all-gathers are padded


def bytes_of_unlike_owners(shares, kind):
    segments = [Segment("table", 0, 160_000, Rounded())]
    transport = kind()
    Aggregator(transport, ErrorFeedback(), 3000, shares=shares).all_reduce(torch.randn(160_000), segments, step=0)
    return transport.bytes_sent


@pytest.mark.parametrize("kind", [PointToPoint, Collective])
@pytest.mark.parametrize("shares", [(0, 0.5, 0.3, 0.2), (0, 1, 0)])
def test_an_owner_of_less_sends_less(shares, kind):
    ranks, size = len(shares), 160_000 + 4 * 20_000
    for share, sent in zip(shares, run_on_grid(bytes_of_unlike_owners, ranks, shares=shares, kind=kind), strict=True):
        assert sent == pytest.approx((1 + (ranks - 2) * share) * size, rel=0.02)


def alone():
    flat = torch.tensor([1.0, 2.3])
    aggregator = Aggregator(transport_for(), ErrorFeedback())
    assert aggregator.all_reduce(flat, [Segment("a", 0, 2, Rounded())], step=0)
    assert aggregator.reduce_to_owners(flat, [Segment("a", 0, 2, Rounded())], [[(0, 2)]], step=0)
    assert flat.tolist() == [1.0, torch.tensor(2.3).item()]
    flat[0] = float("inf")
    assert not aggregator.all_reduce(flat, [Segment("a", 0, 2, Rounded())], step=0)


def test_one_rank_keeps_what_it_has():
    run_on_grid(alone, 1)
