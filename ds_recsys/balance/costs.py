"""What layers, devices and links cost, in seconds and bytes, and the step time that a cut of the layers then has. Pure."""

import math
from dataclasses import dataclass, fields
from itertools import pairwise


@dataclass(frozen=True)
class LayerCost:
    """One layer. Seconds are those of one micro-batch on a device of slowdown 1.

    Attributes:
        forward, backward: seconds; recomputation counts as backward.
        weight_bytes: of all weights and buffers, frozen ones too.
        trainable_bytes: of the gradients that are kept, reduced and optimised; 0 for a frozen layer.
        optimizer_bytes: fp32 masters and moments on one rank.
        activation_bytes: kept for the backward pass by each micro-batch in flight, the layer's input among them.
        boundary_bytes: of the tensor that leaves it, should a stage end after it; the gradient that comes back is as large.
        needed: what every stage must hold one layer with, such as a parameter in each of the optimizer's groups.
        joined: whether it must be on the stage of the layer before it.
    """

    forward: float
    backward: float
    weight_bytes: int = 0
    trainable_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    boundary_bytes: int = 0
    needed: frozenset[str] = frozenset()
    joined: bool = False

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class StageCost:
    """The device of one stage.

    Attributes:
        slowdown: its time for the same work over that of the reference device.
        memory_limit: bytes for weights, gradients, optimizer state and activations; None is no limit.
        overhead: seconds that every micro-batch takes beyond its layers and transfers (instructions of the schedule).
        reduction: seconds per trainable byte on the data axis; 0 with one replica.
        optimizer: seconds per trainable byte of the optimizer's step, on a device of slowdown 1.
    """

    slowdown: float = 1.0
    memory_limit: int | None = None
    overhead: float = 0.0
    reduction: float = 0.0
    optimizer: float = 0.0

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class Link:
    """Between two neighbouring stages: a message of n bytes takes `latency + n * seconds_per_byte` seconds."""

    seconds_per_byte: float = 0.0
    latency: float = 0.0
    crosses_hosts: bool = False

    def __post_init__(self):
        _check(self)

    def round_trip(self, nbytes: float) -> float:
        """Seconds for an activation of `nbytes` one way and its gradient back."""
        return 2 * (self.latency + nbytes * self.seconds_per_byte)


@dataclass(frozen=True)
class PipelineCosts:
    """All layers of a model in order, the devices of its stages, and the links between them.

    Attributes:
        links: the one after each stage but the last; left out, transfers are free and stay on a host.
    """

    layers: tuple[LayerCost, ...]
    stages: tuple[StageCost, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self):
        for name in ("layers", "stages", "links"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.stages or not self.layers:
            raise ValueError(f"a pipeline of {len(self.layers)} layers and {len(self.stages)} stages cannot be cut")
        if not self.links:
            object.__setattr__(self, "links", (Link(),) * (self.num_stages - 1))
        if len(self.links) != self.num_stages - 1:
            raise ValueError(f"{self.num_stages} stages have {self.num_stages - 1} links, not {len(self.links)}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Micro-batches whose activations the stage keeps at once under 1F1B (https://arxiv.org/abs/1806.03377)."""
        return min(micro_batches, self.num_stages - stage)


@dataclass(frozen=True)
class Prediction:
    """What a step of one cut costs. Tuples have one value per stage.

    Attributes:
        step_seconds: of the whole step.
        stage_seconds: of one micro-batch, transfers included.
        idle_share: of the stages' time in the step, the part spent waiting for other stages.
        transfer_seconds: of all micro-batches of the step.
        cross_host_bytes: of all micro-batches, activations and gradients, per replica.
        memory: bytes at the fullest moment.
    """

    step_seconds: float
    stage_seconds: tuple[float, ...]
    idle_share: float
    transfer_seconds: tuple[float, ...]
    cross_host_bytes: int
    memory: tuple[int, ...]


def predict(costs: PipelineCosts, bounds, micro_batches: int) -> Prediction:
    """The step of a pipeline whose stage s holds layers [bounds[s], bounds[s + 1]).

    The slowest stage sets the pace of all micro-batches but the first, which passes through every stage; then gradients
    are reduced and the optimizer steps. A boundary keeps both of its stages busy at every micro-batch, because DeepSpeed's
    sends block; on the way of the first micro-batch it counts once.

    Raises:
        ValueError: `bounds` are no cut of these layers into these stages, or `micro_batches` is below 1.
    """
    check_bounds(costs, bounds)
    check_micro_batches(micro_batches)
    held = [costs.layers[start:stop] for start, stop in pairwise(bounds)]
    transfers = _transfers(costs, bounds)
    around = [left + right for left, right in pairwise([0.0, *transfers, 0.0])]
    stages = list(zip(costs.stages, held, strict=True))
    compute = [s.slowdown * sum(layer.forward + layer.backward for layer in mine) + s.overhead for s, mine in stages]
    update = [
        (s.reduction + s.slowdown * s.optimizer) * sum(layer.trainable_bytes for layer in mine) for s, mine in stages
    ]
    seconds = [mine + moved for mine, moved in zip(compute, around, strict=True)]
    step = (micro_batches - 1) * max(seconds) + sum(compute) + sum(transfers) + max(update)
    busy = (micro_batches * sum(seconds) + sum(update)) / costs.num_stages
    return Prediction(
        step_seconds=step,
        stage_seconds=tuple(seconds),
        idle_share=max(0.0, 1 - busy / step) if step else 0.0,
        transfer_seconds=tuple(micro_batches * moved for moved in around),
        cross_host_bytes=micro_batches * _cross_host_bytes(costs, bounds),
        memory=tuple(_memory(mine, costs.in_flight(s, micro_batches)) for s, mine in enumerate(held)),
    )


def check_bounds(costs: PipelineCosts, bounds) -> None:
    """Raises ValueError unless `bounds` go from 0 to the number of layers and leave no stage empty."""
    whole = len(bounds) == costs.num_stages + 1 and bounds[0] == 0 and bounds[-1] == costs.num_layers
    if not whole or any(start >= stop for start, stop in pairwise(bounds)):
        raise ValueError(f"{list(bounds)} do not cut {costs.num_layers} layers into {costs.num_stages} stages")


def check_micro_batches(micro_batches: int) -> None:
    if micro_batches < 1:
        raise ValueError(f"a step has at least one micro-batch, not {micro_batches}")


def _transfers(costs: PipelineCosts, bounds) -> list[float]:
    """Seconds of one micro-batch's round trip over each link."""
    ends = [costs.layers[stop - 1].boundary_bytes for stop in bounds[1:-1]]
    return [link.round_trip(nbytes) for link, nbytes in zip(costs.links, ends, strict=True)]


def _cross_host_bytes(costs: PipelineCosts, bounds) -> int:
    """Of one micro-batch."""
    ends = [costs.layers[stop - 1].boundary_bytes for stop in bounds[1:-1]]
    return sum(2 * nbytes for link, nbytes in zip(costs.links, ends, strict=True) if link.crosses_hosts)


def _memory(layers, in_flight: int) -> int:
    kept = sum(layer.weight_bytes + layer.trainable_bytes + layer.optimizer_bytes for layer in layers)
    return kept + in_flight * sum(layer.activation_bytes for layer in layers)


def _check(cost) -> None:
    for field in fields(cost):
        value = getattr(cost, field.name)
        if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{field.name} of a {type(cost).__name__} is {value}, neither zero nor a positive number")
