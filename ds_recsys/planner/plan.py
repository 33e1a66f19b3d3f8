"""One way to train, and all ways that a cluster and a config leave open. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

METHODS = ("none", "int8", "int4")
MODES = ("sync", "delayed")


@dataclass(frozen=True)
class Plan:
    """A grid of ranks, how a replica's share of the batch is cut, and what the data axis does.

    Attributes:
        micro_batch: windows.
        micro_batches: of a replica in a step.
        method, mode: of the blocks "compression" and "data_parallel".
        look_ahead: of "delayed".
        bounds: of the stages; empty for one stage, or before they are known.
        shares: windows of each replica in a micro-batch of all; empty for equal parts, or before they are known.
        owners: what each replica sums for all, in proportion; likewise.
    """

    pipe: int
    data: int
    tensor: int
    micro_batch: int
    micro_batches: int
    method: str = "none"
    mode: str = "sync"
    look_ahead: bool = False
    bounds: tuple[int, ...] = field(default=(), compare=False)
    shares: tuple[int, ...] = field(default=(), compare=False)
    owners: tuple[float, ...] = field(default=(), compare=False)

    def values(self) -> dict[str, Any]:
        """As dotted keys of a config, but for the bounds."""
        shares = {"recsys.data_shares": list(self.shares)} if self.shares else {}
        owners = {"recsys.compression.owner_shares": list(self.owners)} if self.owners else {}
        return {
            "recsys.pipe": self.pipe,
            "recsys.data": self.data,
            "recsys.tensor": self.tensor,
            **shares,
            **owners,
            "recsys.compression.method": self.method,
            "recsys.data_parallel.mode": self.mode,
            **({"recsys.data_parallel.look_ahead": True} if self.look_ahead else {}),
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.micro_batches,
        }

    def __str__(self) -> str:
        words = [f"pipe {self.pipe} x data {self.data} x tensor {self.tensor}"]
        sizes = "/".join(map(str, self.shares)) or self.micro_batch
        words.append(f"{self.micro_batches} micro-batches of {sizes}")
        if self.data > 1:
            words.append(
                f"{'fp32' if self.method == 'none' else self.method} gradients, {self.mode}{' looking ahead' * self.look_ahead}"
            )
        if self.owners:
            words.append("summed in parts of " + "/".join(f"{share:.2g}" for share in self.owners))
        return ", ".join(words)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def grids(hosts: Sequence[int], fixed: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """(pipe, data, tensor) of all grids over the ranks, whose tensor axes each stay within a host.

    Args:
        hosts: of each rank.
        fixed: axes whose size is given; other keys do not count.
    """
    world = len(hosts)
    for tensor in divisors(world):
        axes = [hosts[first : first + tensor] for first in range(0, world, tensor)]
        if any(len(set(axis)) > 1 for axis in axes):
            continue
        for data in divisors(world // tensor):
            grid = {"pipe": world // tensor // data, "data": data, "tensor": tensor}
            if all(grid[axis] == fixed.get(axis, grid[axis]) for axis in grid):
                yield grid["pipe"], data, tensor


def plans(
    hosts: Sequence[int],
    batch: int,
    largest: int,
    fixed: dict[str, int],
    methods: Sequence[str] = METHODS,
    modes: Sequence[str] = MODES,
    look_ahead: bool = True,
) -> Iterator[Plan]:
    """All plans for a global batch of `batch` windows in micro-batches of `largest` at most.

    `fixed` may also give "micro_batch" and "micro_batches". With one replica there is nothing to compress or to delay.
    `look_ahead` is what "delayed" does.
    """
    for pipe, data, tensor in grids(hosts, fixed):
        if batch % data:
            continue
        for micro_batch in divisors(batch // data):
            micro_batches = batch // data // micro_batch
            sizes = {"micro_batch": micro_batch, "micro_batches": micro_batches}
            if any(sizes[name] != fixed.get(name, sizes[name]) for name in sizes):
                continue
            if micro_batch > largest and "micro_batch" not in fixed and "micro_batches" not in fixed:
                continue
            for method in methods if data > 1 else ["none"]:
                for mode in modes if data > 1 else ["sync"]:
                    ahead = look_ahead and mode == "delayed"
                    yield Plan(pipe, data, tensor, micro_batch, micro_batches, method, mode, ahead)
