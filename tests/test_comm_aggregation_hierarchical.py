"""The sum in two levels, fp32 on a host and compressed between hosts, against the same worked out in one process."""

import os

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid
from test_comm_aggregation import Rounded, check_equal, filled, gradients, layout, read

from ds_recsys.comm import payload
from ds_recsys.comm.error_feedback import ErrorFeedback
from ds_recsys.comm.hierarchical import HierarchicalAggregator, neighbours, subgroups
from ds_recsys.comm.layout import Segment
from ds_recsys.comm.shared_memory import SharedMemory, local_transport_for
from ds_recsys.comm.transport import Collective, PointToPoint


@pytest.mark.parametrize(
    "hosts, rank, expected",
    [
        ([0, 0, 1, 1], 1, ([0, 1], [1, 3])),
        ([0, 1, 0, 1], 1, ([1, 3], [0, 1])),
        ([5, 5, 5, 2, 2, 2], 4, ([3, 4, 5], [1, 4])),
    ],
)
def test_neighbours_share_a_host_or_a_place(hosts, rank, expected):
    assert neighbours(hosts, rank) == expected


@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 1, 2], [0, 0, 1], [0]])
def test_where_there_are_no_two_levels_it_says_so(hosts):
    with pytest.raises(ValueError, match="a hierarchical sum needs two or more hosts"):
        neighbours(hosts, 0)


def coded(x, name, step):
    """What arrives of a tensor `x`."""
    codec = payload.Codec(torch.empty(0), ErrorFeedback(False), step)
    segment = next(s for s in layout()[0] if s.name == name)
    seed = codec._seed(payload.Part(name, 0, x.numel(), 0, segment.compressor))
    message, out = torch.empty(segment.compressor.wire_bytes(x.numel()), dtype=torch.uint8), torch.empty_like(x)
    segment.compressor.encode(x, message, seed=seed)
    segment.compressor.decode(message, out, seed=seed)
    return out


def reference(hosts, step, residuals):
    """Residuals by (host or "server", tensor), added and renewed."""
    sums = {}
    for name in gradients(0):
        total = None
        for host in sorted(set(hosts), key=hosts.index):
            x = None
            for rank in (rank for rank, one in enumerate(hosts) if one == host):
                value = gradients(rank, seed=step)[name]
                x = value.clone() if x is None else x + value
            x = x + 1.0 * residuals.get((host, name), 0.0)
            out = coded(x, name, step)
            residuals[host, name] = x - out
            total = out.clone() if total is None else total + out
        if len(set(hosts)) > 2:
            total = total + 1.0 * residuals.get(("server", name), 0.0)
            out = coded(total, name, step)
            residuals["server", name] = total - out
            total = out
        sums[name] = total
    return sums


def sums_in_two_levels(hosts):
    rank = dist.get_rank()
    local, across = subgroups(hosts)
    orders = (range(6), 0), ((3, 5, 0, 4, 2, 1), 3)
    kinds = (PointToPoint, PointToPoint), (Collective, Collective), (SharedMemory, PointToPoint)
    for within, between in kinds:
        for (order, gap), chunk_bytes, depth, checksum in ((orders[0], 32, 1, True), (orders[1], 32, 2, False)):
            feedback, residuals = ErrorFeedback(), {}
            aggregator = HierarchicalAggregator(within(local), between(across), feedback, chunk_bytes, depth, checksum)
            segments, length = layout(order, gap)
            for step in range(3):
                flat = filled(segments, length, gradients(rank, seed=step))
                assert aggregator.all_reduce(flat, segments, step)
                check_equal(read(segments, flat), reference(hosts, step, residuals))
                feedback.commit()


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
def test_sums_are_those_of_the_encoded_sums_of_hosts(hosts):
    run_on_grid(sums_in_two_levels, len(hosts), hosts=hosts)


def sums_of_unlike_hosts(hosts, shares):
    rank = dist.get_rank()
    local, across = (PointToPoint(group) for group in subgroups(hosts))
    feedback, residuals = ErrorFeedback(), {}
    aggregator = HierarchicalAggregator(local, across, feedback, chunk_bytes=32, shares=shares)
    segments, length = layout()
    for step in range(3):
        flat = filled(segments, length, gradients(rank, seed=step))
        assert aggregator.all_reduce(flat, segments, step)
        check_equal(read(segments, flat), reference(hosts, step, residuals))
        feedback.commit()
    return any(side == "server" for side, *_ in feedback.state_dict())


def test_a_host_may_sum_nothing():
    assert run_on_grid(sums_of_unlike_hosts, 6, hosts=[0, 0, 1, 1, 2, 2], shares=(1, 0, 2)) == [
        True, True, False, False, True, True,
    ]  # fmt: skip


def tiny_and_bad(kind):
    local, across = subgroups([0, 0, 1, 1])
    aggregator = HierarchicalAggregator(kind(local), PointToPoint(across), ErrorFeedback(), chunk_bytes=64)
    for size in (0, 1, 9):
        flat = torch.full((size,), 100.0 * 2 ** dist.get_rank())
        aggregator.all_reduce(flat, [Segment("a", 0, size, Rounded())], step=0)
        torch.testing.assert_close(flat, torch.full((size,), 1500.0), rtol=0.02, atol=0)
    segments, length = layout()
    flat = filled(segments, length, gradients(dist.get_rank()))
    if dist.get_rank() == 3:
        flat[[18, 204]] = float("nan")
    aggregator.all_reduce(flat, segments, step=0)
    assert (~flat.isfinite()).nonzero().flatten().tolist() == [*range(16, 24), 204]


@pytest.mark.parametrize("kind", [PointToPoint, SharedMemory])
def test_tiny_buffers_and_a_nan_on_one_rank(kind):
    run_on_grid(tiny_and_bad, 4, kind=kind)


def counted_bytes(kind):
    segments = [Segment("table", 0, 1600, Rounded()), Segment("weight", 1600, 800, Rounded())]
    local, across = subgroups([0, 0, 1, 1])
    local, across = kind(local), PointToPoint(across)
    HierarchicalAggregator(local, across, ErrorFeedback(), 300).all_reduce(torch.randn(2400), segments, step=0)
    return local.bytes_sent, across.bytes_sent


@pytest.mark.parametrize("kind", [PointToPoint, SharedMemory])
def test_a_host_sends_each_payload_once(kind):
    size = 2400 + 4 * 300
    sent = run_on_grid(counted_bytes, 4, kind=kind)
    assert sent[0][1] + sent[1][1] == sent[2][1] + sent[3][1] == size
    assert sent[0][0] + sent[1][0] == 4 * 2400 + 2 * size  # fp32 values one way, both hosts' payloads the other


def memory_of_others(fault):
    if fault and dist.get_rank() == 1:
        if fault == "another process":  # such as one of another container, whose numbers mean other processes
            SharedMemory.block_of = lambda *_: torch.zeros(64, dtype=torch.uint8)
        else:
            os.memfd_create = lambda *_: fault_error()
    return type(local_transport_for()).__name__


def fault_error():
    raise OSError("no memfd")


@pytest.mark.parametrize("fault", [None, "another process", "no memfd"])
def test_where_one_rank_cannot_read_the_others_memory_all_use_messages(fault):
    kinds = set(run_on_grid(memory_of_others, 3, fault=fault))
    assert kinds == {"PointToPoint" if fault else "SharedMemory"}


def many_rounds():
    """How many blocks are in use after rounds of several sizes."""
    transport = SharedMemory()
    for number in range(30):
        size = 100 + 70_000 * (number % 3)
        incoming = [torch.zeros(size, dtype=torch.uint8) for _ in range(3)]
        exchange = transport.open(incoming, number)
        exchange.spread(torch.full((size,), 10 * dist.get_rank() + number % 7, dtype=torch.uint8))
        exchange.wait()
        exchange.close()
        for rank in transport.others:
            assert incoming[rank].unique().tolist() == [10 * rank + number % 7]
    return {size: len(blocks) for size, blocks in transport._free.items()}


def test_blocks_are_used_again():
    assert run_on_grid(many_rounds, 3)[0] == {1 << 16: 1, 1 << 17: 1, 1 << 18: 1}
