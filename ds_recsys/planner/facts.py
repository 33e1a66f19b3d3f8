"""What a model costs on the devices and links of a run, as measured before training. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Line:
    """seconds(n) = fixed + each * n, of n windows, bytes or values."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, n: float) -> float:
        return self.fixed + self.each * n

    @classmethod
    def through(cls, *points: tuple[float, float]) -> "Line":
        """Through (n, seconds) of one or two measurements; neither part is below zero."""
        (n, seconds), (more, longer) = points[0], points[-1]
        if more == n:
            return cls(0.0, seconds / n)
        each = max(0.0, (longer - seconds) / (more - n))
        fixed = seconds - each * n
        return cls(fixed, each) if fixed >= 0 else cls(0.0, longer / more)


@dataclass(frozen=True)
class LayerFacts:
    """One pipeline layer on one rank of a tensor axis of some size, on the fastest device.

    Attributes:
        forward, backward: seconds of a micro-batch, by its windows; transfers on the tensor axis among them.
        boundary_bytes, activation_bytes: of a window, what leaves the layer and what it keeps for its backward pass.
        parameters: of the whole layer.
    """

    forward: Line
    backward: Line
    boundary_bytes: float = 0.0
    activation_bytes: float = 0.0
    parameters: int = 0


@dataclass(frozen=True)
class SumFacts:
    """A sum over the replicas, per value.

    Attributes:
        seconds: by itself.
        processor: those in which the fastest device cannot compute.
        owners: the replicas' parts of it with which it was measured; empty for equal parts.
        unlike: the same with owners of unlike parts, where it was measured: less on the wire, perhaps more for a device.
        beside: seconds while devices compute: more, where the sum has to wait for its turn on the processor; None is as many.
    """

    seconds: float
    processor: float = 0.0
    owners: tuple[float, ...] = ()
    unlike: "SumFacts | None" = None
    beside: float | None = None


@dataclass(frozen=True)
class Facts:
    """All that predictions are made from.

    Attributes:
        hosts: number of the host of each rank.
        slowdowns: of each rank's device, against the fastest.
        layers: tensor size -> the pipeline's layers in order.
        sums: (data size, tensor size) -> method -> cost of a sum over the data axis that such a grid has.
        transfers: ranks from one stage to the next -> seconds of a message by its bytes.
        optimizer, copy, ahead: seconds per parameter of its step, of copying an fp32 value, and of looking ahead, on the
            fastest device.
        tied: parameters of an item table that the first and the last stage share, else 0.
        looked_up: values of the rows of it that a window looks up, at most; 0 where they may not be summed apart.
        sent: method -> bytes of a value of it as it is sent.
        sparse: parameters whose gradients travel as rows while the mode is "sync".
        bucket: values that a compressed sum takes at once while the backward pass goes on; None waits for its end.
        shares: of the replicas, where the config gives them; else replicas take parts by their speed.
        tail: how many of the last layers must be on one stage.
        memory_limit: bytes of a device; None is no limit.
    """

    hosts: tuple[int, ...]
    slowdowns: tuple[float, ...]
    layers: Mapping[int, tuple[LayerFacts, ...]]
    sums: Mapping[tuple[int, int], Mapping[str, SumFacts]] = field(default_factory=dict)
    transfers: Mapping[int, Line] = field(default_factory=dict)
    optimizer: float = 0.0
    copy: float = 0.0
    ahead: float = 0.0
    tied: int = 0
    looked_up: int = 0
    sent: Mapping[str, float] = field(default_factory=dict)
    sparse: int = 0
    bucket: int | None = 1
    shares: tuple[float, ...] | None = None
    tail: int = 1
    memory_limit: int | None = None

    @property
    def world_size(self) -> int:
        return len(self.hosts)
