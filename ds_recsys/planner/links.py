"""Measures sums over the replicas and messages between stages, on the groups of ranks that grids would have."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ds_recsys.comm.groups import group_of
from ds_recsys.comm.probe import reduction
from ds_recsys.comm.reducer import Reducer
from ds_recsys.config.compression import Compression
from ds_recsys.planner.facts import Line, SumFacts

_VALUES = 1_000_000  # of a sum that is timed
_SECONDS = 0.5  # spent on each measurement at least
_MESSAGES = (4_096, 1_000_000)  # bytes


def measure_sums(data: int, tensor: int, options: Sequence[Compression], pace: float) -> dict[str, SumFacts]:
    """Method -> cost of a value's sum over the data axis of a grid, all of its groups at once. Collective over the world.

    Args:
        options: one block for each method.
        pace: seconds of the device in which one of the process's processor seconds passes; 0 on an accelerator, which
            goes on computing while gradients are encoded.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    stage = data * tensor
    first = rank // stage * stage + rank % tensor
    group = group_of([first + place * tensor for place in range(data)])
    costs = {}
    for block in options:

        def make(method: str, block=block) -> Reducer:
            given = {key: getattr(block, key) for key in block.model_fields_set - {"method"}}
            return Reducer(group, method, **given)

        flat = torch.randn(_VALUES, device=_device(), generator=torch.Generator(_device()).manual_seed(0)).mul_(1e-3)
        seconds, processor = _timed(reduction(group, block.method, make), flat)
        found: list = [None] * world
        dist.all_gather_object(found, (seconds / _VALUES, pace * processor / _VALUES))
        costs[block.method] = SumFacts(max(one[0] for one in found), max(one[1] for one in found))
    return costs


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

        def transfer(_, operations=operations) -> None:
            for request in dist.batch_isend_irecv(operations) if operations else ():
                request.wait()

        points.append((nbytes, _timed(transfer, out)[0]))
    found: list = [None] * world
    dist.all_gather_object(found, points)
    slowest = [max(point[number][1] for point in found) for number in range(len(_MESSAGES))]
    return Line.through(*zip(_MESSAGES, slowest, strict=True))


def _timed(work: Callable, flat: torch.Tensor) -> tuple[float, float]:
    """(seconds, processor seconds) of `work` on a copy of `flat`, mean over as many runs as all ranks agree on."""
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
        if float(slowest) >= _SECONDS and runs > 1:
            return spent / runs, used / runs


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
