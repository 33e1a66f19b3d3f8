"""PowerSGD over ranks against the same worked out in one process; what it leaves out, and what it survives."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid

from ds_recsys.comm.aggregation import Aggregator
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.error_feedback import ErrorFeedback
from ds_recsys.comm.layout import Segment
from ds_recsys.comm.low_rank import LowRank, factor_bytes
from ds_recsys.comm.transport import transport_for

SHAPES = {"weight": (12, 7), "conv": (5, 3, 4), "thin": (1, 9)}


def layout():
    matrices, offset = [], 2
    for name, shape in SHAPES.items():
        numel = torch.Size(shape).numel()
        matrices.append((Segment(name, offset, numel, Float32()), shape))
        offset += numel + 1
    return matrices, offset


def gradient(rank, step):
    flat = torch.randn(layout()[1], generator=torch.Generator().manual_seed(100 * step + rank))
    flat[2:86].view(12, 7).mul_(10.0 ** -torch.arange(7.0))  # as gradients are: some directions dominate
    return flat


def build(rank=2, feedback=True):
    feedback = ErrorFeedback(feedback)
    return LowRank(rank, feedback), Aggregator(transport_for(), feedback, chunk_bytes=64), feedback


def read(flat, name):
    segment, shape = next(one for one in layout()[0] if one[0].name == name)
    return flat[segment.offset : segment.offset + segment.numel].view(shape[0], -1)


def steps_against_one_process():
    low_rank, aggregator, feedback = build()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    queries, residuals = {}, {}
    received, given = torch.zeros(layout()[1]), torch.zeros(layout()[1])
    for step in range(50):
        flat = gradient(rank, step)
        given += flat
        assert low_rank.all_reduce(flat, layout()[0], aggregator, step)
        low_rank.commit()
        feedback.commit()
        received += flat
        others = [torch.empty_like(flat) for _ in range(ranks)]
        dist.all_gather(others, flat)
        matrices = [segment for segment, _ in layout()[0]]
        inside = torch.cat([torch.arange(s.offset, s.offset + s.numel) for s in matrices])
        assert all(torch.equal(other[inside], flat[inside]) for other in others)
        if step > 8:  # later, rounding differs more than it should be compared with
            continue
        for name in SHAPES:
            given_now = [read(gradient(one, step), name) + residuals.get((one, name), 0) for one in range(ranks)]
            query = queries.get(name)
            if query is not None:
                basis = torch.linalg.qr(sum(m @ query for m in given_now)).Q
                queries[name] = sum(m.T @ basis for m in given_now)
                torch.testing.assert_close(read(flat, name), basis @ queries[name].T, rtol=1e-3, atol=1e-4)
            else:  # its first Q is its own affair; the span it found is not
                queries[name] = low_rank.state_dict()[name]
                left, size, _ = torch.linalg.svd(read(flat, name))
                basis = left[:, : queries[name].shape[1]]
                torch.testing.assert_close(read(flat, name), basis @ basis.T @ sum(given_now), rtol=1e-3, atol=1e-4)
            for one in range(ranks):
                residuals[one, name] = given_now[one] - basis @ basis.T @ given_now[one]
    kept = torch.zeros(layout()[1])
    for (_, name, _, _), value in feedback.state_dict().items():
        read(kept, name).copy_(value.view_as(read(kept, name)))
    for total in (given, kept):
        dist.all_reduce(total)
    for name in SHAPES:
        torch.testing.assert_close(read(received, name), read(given - kept, name), rtol=1e-4, atol=1e-3)
    assert read(kept, "weight").abs().max() > 0.01 and read(kept, "thin").abs().max() < 1e-5


@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_power_iteration_on_the_sum_and_what_it_lacks_is_kept(ranks):
    run_on_grid(steps_against_one_process, ranks)


def degenerate_matrices():
    low_rank, aggregator, feedback = build(rank=3)
    rank = dist.get_rank()
    total = torch.zeros(layout()[1])
    for step, kind in enumerate(["zero", "zero", "rank one", "rank one", "lower rows", "lower rows", "tiny", "huge"]):
        flat = torch.zeros(layout()[1])
        weight = read(flat, "weight")
        if kind == "rank one":
            weight.copy_(torch.outer(torch.arange(12.0), torch.arange(7.0)) * (rank + 1))
        elif kind == "lower rows":
            weight[6:8] = torch.arange(14.0).view(2, 7)
        elif kind in ("tiny", "huge"):
            weight.copy_(torch.outer(torch.arange(12.0), torch.ones(7)) * {"tiny": 1e-35, "huge": 1e30}[kind])
        expected = weight.clone()
        dist.all_reduce(expected)
        assert low_rank.all_reduce(flat, layout()[0], aggregator, step)
        assert flat.isfinite().all()
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        low_rank.commit()
        feedback.discard()
        total += flat
    assert all(query.any(dim=0).all() for query in low_rank.state_dict().values())


def test_zero_and_lower_rank_matrices_are_summed_and_forgotten():
    run_on_grid(degenerate_matrices, 2)


def bad_steps(bad):
    low_rank, aggregator, feedback = build()
    rank = dist.get_rank()
    low_rank.all_reduce(gradient(rank, 0), layout()[0], aggregator, 0)
    low_rank.commit()
    feedback.commit()
    before = low_rank.state_dict()
    flat = gradient(rank, 1)
    if rank == 1:
        read(flat, "weight")[3, 4] = bad
    assert low_rank.all_reduce(flat, layout()[0], aggregator, 1) == (rank != 1 and dist.get_world_size() == 2)
    assert read(flat, "weight").isnan().all() and read(flat, "conv").isfinite().all()
    low_rank.discard()
    feedback.discard()
    after = low_rank.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    repeated, clean = gradient(rank, 1), gradient(rank, 1)
    low_rank.all_reduce(repeated, layout()[0], aggregator, 1)
    low_rank.discard()
    feedback.discard()
    again, _, _ = build()
    again.load_state_dict(before)
    again.feedback = feedback
    again.all_reduce(clean, layout()[0], aggregator, 1)
    assert torch.equal(repeated, clean) and repeated.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_on_one_rank_is_nan_on_all_and_the_step_can_be_forgotten(bad):
    run_on_grid(bad_steps, 2, bad=bad)


def bytes_and_start():
    low_rank, aggregator, _ = build()
    low_rank.all_reduce(gradient(0, 0), layout()[0], aggregator, 0)
    low_rank.commit()
    expected = sum(factor_bytes(low_rank.rank, shape) for shape in SHAPES.values())
    assert expected == 4 * (2 * (12 + 7) + 2 * (5 + 12) + 1 * (1 + 9))
    assert aggregator.transport.bytes_sent == expected
    assert low_rank.all_reduce(torch.zeros(3), [], aggregator, 1)
    # One matrix alone, elsewhere in the buffer: the same.
    alone, aggregator, _ = build()
    alone.all_reduce(
        read(gradient(0, 0), "weight").flatten(), [(Segment("weight", 0, 84, Float32()), (12, 7))], aggregator, 0
    )
    alone.commit()
    assert torch.equal(alone.state_dict()["weight"], low_rank.state_dict()["weight"])


def test_bytes_sent_and_a_start_from_the_name_alone():
    run_on_grid(bytes_and_start, 2)


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="rank 0: at least 1"):
        LowRank(0, ErrorFeedback())
