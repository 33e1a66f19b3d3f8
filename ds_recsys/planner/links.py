"""Measures sums over the replicas and messages between stages, on the groups of ranks that grids would have."""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from ds_recsys.comm.groups import group_of
from ds_recsys.comm.probe import reduction
from ds_recsys.comm.reducer import Reducer
from ds_recsys.config.compression import Compression
from ds_recsys.planner.facts import Line, SumFacts

_VALUES = 1_000_000  # of a sum that is timed
_SECONDS = 0.5  # spent on each measurement at least, in two runs or more
_LONG = 2.0  # a run that takes these is not repeated
_PRODUCT = 50_000_000  # multiplications of a product of matrices, milliseconds on a core
_WIDTH = 1024  # of these matrices at most: they are made for the measurement only
_MESSAGES = (4_096, 1_000_000)  # bytes
_ROUNDS = 5  # of hosts in pairs


def measure_sums(
    data: int,
    tensor: int,
    options: Sequence[Compression],
    pace: float,
    owners: tuple[float, ...] = (),
    width: int = 256,
) -> dict[str, SumFacts]:
    """Method -> cost of a value's sum over the data axis of a grid, all of its groups at once. Collective over the world.

    Args:
        options: one block for each method.
        pace: seconds of the fastest device in which one of the process's processor seconds passes; 0 on an accelerator,
            which goes on computing while gradients are encoded.
        owners: parts in which replicas might sum what is compressed, beside equal ones.
        width: the model's hidden size; the values make up matrices of four times as many rows, as a decoder's larger ones.
    """
    stage, rank, costs = data * tensor, dist.get_rank(), {}
    first = rank // stage * stage + rank % tensor
    group = group_of([first + place * tensor for place in range(data)])
    for block in options:
        costs[block.method] = _measure_sum(group, block, pace, width)
        if owners and block.method != "none":
            other = _measure_sum(group, block.model_copy(update={"owner_shares": list(owners)}), pace, width)
            costs[block.method] = replace(costs[block.method], unlike=replace(other, owners=owners))
    return costs


def _measure_sum(group: dist.ProcessGroup, block: Compression, pace: float, width: int) -> SumFacts:
    def make(method: str) -> Reducer:
        given = {key: getattr(block, key) for key in block.model_fields_set - {"method"}}
        return Reducer(group, method, **given)

    shape = min(4 * width, _VALUES // width), width
    values = _VALUES // math.prod(shape) * math.prod(shape)
    flat = torch.randn(values, device=_device(), generator=torch.Generator(_device()).manual_seed(0)).mul_(1e-3)
    work = reduction(group, block.method, make, shape)
    seconds, processor = _timed(work, flat)
    beside = _timed(_beside_compute(work, width), flat, connected=True)[0] if pace else seconds
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (seconds / values, pace * processor / values, beside / values))
    alone, processor, beside = (list(column) for column in zip(*found, strict=True))
    return SumFacts(max(alone), median(processor), beside=max(*alone, *beside))


def _beside_compute(work: Callable, width: int) -> Callable:
    """`work` in a thread of its own, as the reducer's is, while this one multiplies matrices as a decoder layer does."""
    width = min(width, _WIDTH)
    rows = _PRODUCT // (4 * width * width)
    left, right = torch.randn(rows, width), torch.randn(width, 4 * width)
    product = torch.empty(rows, 4 * width)

    def both(flat: torch.Tensor) -> None:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work, flat)
            while not done.done():
                torch.mm(left, right, out=product)
            done.result()

    return both


def measure_rates(hosts: Sequence[int]) -> list[float]:
    """Bytes a second of each host's link, both ways at once, to the fastest of a few others. Collective over the world.

    In each round the first ranks of all hosts exchange in pairs, so that every link serves one pair.

    Args:
        hosts: number of the host of each rank.
    """
    count, rank = max(hosts) + 1, dist.get_rank()
    first = [hosts.index(host) for host in range(count)]
    rates = [0.0] * count
    for number in range(min(_ROUNDS, count - 1 + count % 2)):
        pairs = pairs_of(count, number)
        other = next((b if rank == first[a] else a for a, b in pairs if rank in (first[a], first[b])), None)
        out = torch.zeros(_MESSAGES[-1] // 4, device=_device())
        arriving, operations = torch.empty_like(out), []
        if other is not None:
            peer = first[other]
            operations = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, arriving, peer)]
        seconds, _ = _timed(lambda _, operations=operations: _transfer(operations), out)
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, seconds)
        for a, b in pairs:
            rate = _MESSAGES[-1] / max(found[first[a]], found[first[b]])
            rates[a], rates[b] = max(rates[a], rate), max(rates[b], rate)
    return rates


def pairs_of(count: int, number: int) -> list[tuple[int, int]]:
    """Who meets whom in a round of a tournament of `count` players, who have all met after count - 1 (count, if odd)."""
    even = count + count % 2
    ring = [0, *(1 + (place + number) % (even - 1) for place in range(even - 1))]
    pairs = zip(ring[: even // 2], reversed(ring[even // 2 :]), strict=True)
    return [pair for pair in pairs if max(pair) < count]


def measure_transfers(stride: int) -> Line:
    """Seconds of a message from each rank to the one `stride` ranks on, all at once, by its bytes. Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    points = []
    for nbytes in _MESSAGES:
        out = torch.zeros(nbytes // 4, device=_device())
        arriving = torch.empty_like(out)
        operations = []
        if rank + stride < world:
            operations.append(dist.P2POp(dist.isend, out, rank + stride))
        if rank >= stride:
            operations.append(dist.P2POp(dist.irecv, arriving, rank - stride))

        points.append((nbytes, _timed(lambda _, operations=operations: _transfer(operations), out)[0]))
    found: list = [None] * world
    dist.all_gather_object(found, points)
    slowest = [max(point[number][1] for point in found) for number in range(len(_MESSAGES))]
    return Line.through(*zip(_MESSAGES, slowest, strict=True))


def _transfer(operations: list) -> None:
    for request in dist.batch_isend_irecv(operations) if operations else ():
        request.wait()


def _timed(work: Callable, flat: torch.Tensor, connected: bool = False) -> tuple[float, float]:
    """(seconds, processor seconds) of `work` on a copy of `flat`, mean over as many runs as all ranks agree on."""
    if not connected:
        work(flat.clone())  # connects the ranks
    spent = used = 0.0
    runs = 0
    while True:
        buffer = flat.clone()
        _wait()
        dist.barrier()
        begin, processor = time.perf_counter(), time.process_time()
        work(buffer)
        _wait()
        spent, used, runs = spent + time.perf_counter() - begin, used + time.process_time() - processor, runs + 1
        slowest = torch.tensor(spent, device=flat.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if float(slowest) >= (_SECONDS if runs > 1 else _LONG):
            return spent / runs, used / runs


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
