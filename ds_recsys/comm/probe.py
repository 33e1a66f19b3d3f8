"""Which method is fastest on these links: each is timed once, on values like a gradient's. Dense is one of them."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

_CANDIDATES = ("none", "int8", "int4")  # in the order of their error
_MUST_GAIN = 0.9  # of the time of the best one with less error
_SECONDS = 0.3  # spent on a method at least, in repeats
_MAX_VALUES = 4_000_000


@dataclass(frozen=True)
class Choice:
    """The method of choice, and the seconds that each took to sum `values` fp32 values."""

    method: str
    seconds: dict[str, float]
    values: int

    def __str__(self) -> str:
        name = {"none": "fp32"}
        times = ", ".join(f"{name.get(method, method)} {1e3 * time:.1f} ms" for method, time in self.seconds.items())
        return f"{name.get(self.method, self.method)}, for {self.values:,} values took {times}"


def choose(group: dist.ProcessGroup | None, make_reducer: Callable, values: int) -> Choice:
    """Time fp32, int8 and int4 and take the first that no later one beats by a tenth. Collective over `group`.

    Args:
        make_reducer: method -> Reducer over the group.
        values: how many a step reduces; 4 million at most are tried.
    """
    values = min(values, _MAX_VALUES)
    seconds = {method: _time(group, method, make_reducer, values) for method in _CANDIDATES}
    return decide(seconds, values)


def decide(seconds: dict[str, float], values: int) -> Choice:
    """The rule, for times that all ranks agree on."""
    best = _CANDIDATES[0]
    for method in _CANDIDATES[1:]:
        if seconds[method] < _MUST_GAIN * seconds[best]:
            best = method
    return Choice(best, seconds, values)


def agreed(choice: Choice, world: dist.ProcessGroup | None) -> Choice:
    """The choice that the slowest group's times make. Collective over `world`, whose groups each chose for themselves."""
    seconds = torch.tensor(list(choice.seconds.values()))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=world)
    return decide(dict(zip(choice.seconds, seconds.tolist(), strict=True)), choice.values)


def _time(group, method: str, make_reducer: Callable, values: int) -> float:
    """Of the slowest rank, the best of as many runs as `_SECONDS` allow, at least two."""
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    flat = torch.randn(values, device=device, generator=torch.Generator(device).manual_seed(0)).mul_(1e-3)
    reduce = reduction(group, method, make_reducer)
    reduce(flat.clone()[: max(1, values // 16)])  # connects the ranks
    best, spent, runs = float("inf"), 0.0, 0
    while spent < _SECONDS or runs < 2:
        buffer = flat.clone()
        dist.barrier(group)
        begin = time.perf_counter()
        reduce(buffer)
        _wait_for(device)
        took = torch.tensor(time.perf_counter() - begin, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group)  # and so all ranks stop together
        best, spent, runs = min(best, float(took)), spent + float(took), runs + 1
    return best


def reduction(
    group: dist.ProcessGroup | None, method: str, make_reducer: Callable, shape: tuple[int, int] | None = None
) -> Callable:
    """What sums a flat buffer in place by `method`; "none" is the backend's own sum.

    The buffer holds matrices of `shape`, whole ones, or one with a single row.
    """
    if method == "none":
        return lambda flat: dist.all_reduce(flat, group=group)
    reducer = make_reducer(method)

    def reduce(flat):
        one = shape or (1, flat.numel())
        count = flat.numel() // math.prod(one)
        reducer.all_reduce(flat, [(f"probe {flat.numel()}, {number}", one) for number in range(count)])
        reducer.commit()

    return reduce


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
