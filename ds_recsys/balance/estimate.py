"""From what stages measured to what layers and devices cost: seconds of a layer = its cost x its device's slowdown. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

_ROUNDS = 50
_LEAST_WORK = 0.1  # of the mean stage's; of less, an embedding alone, most is what every micro-batch costs anywhere
_LEAST_SHARE = 0.03  # of a stage's time: layers that take less say nothing about its device, only about the clock


@dataclass(frozen=True)
class LayerTimes:
    """Forward and backward seconds of one layer per token, measured on a device whose slowdown is not known yet."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True)
class Estimate:
    """Costs of the layers on the reference device, the fastest one, and each stage's slowdown against it.

    Attributes:
        layers: by pipeline layer, seconds per token.
        slowdowns: by stage, 1.0 or more.
    """

    layers: tuple[LayerTimes, ...]
    slowdowns: tuple[float, ...]


def replicas(times: Sequence[float]) -> tuple[float, float]:
    """Of one stage's replicas: (the median, which is what its work costs, the largest, which is what the others wait for)."""
    return median(times), max(times)


def estimate(
    measured: Mapping[int, LayerTimes], kinds: Sequence, bounds: Sequence[int], stage_seconds: Sequence[float]
) -> Estimate:
    """Tell layers that cost more from devices that are slower.

    Layers of one kind, such as the decoder blocks, cost the same everywhere, so what they take on different stages
    compares the devices. A stage with no kind in common with another, or hardly any, is taken to be as fast as the
    reference. What a stage takes as a whole is measured at every step and its layers only now and then: the difference is
    its device's.

    Args:
        measured: by layer, all of them; zero for one that takes no time.
        kinds: of each layer, anything that compares.
        bounds: of the stages when `measured` and `stage_seconds` were.
        stage_seconds: forward and backward per token of each whole stage, now.
    """
    stage_of = [stage for stage, start in enumerate(bounds[:-1]) for _ in range(start, bounds[stage + 1])]
    speeds = _slowdowns({n: times.total for n, times in measured.items()}, kinds, stage_of, len(bounds) - 1)
    layers = [
        LayerTimes(measured[n].forward / speeds[stage], measured[n].backward / speeds[stage])
        for n, stage in enumerate(stage_of)
    ]
    now = slowdowns(
        stage_seconds, [sum(layer.total for layer in layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    )
    fastest = min(now)
    return Estimate(
        tuple(LayerTimes(layer.forward * fastest, layer.backward * fastest) for layer in layers),
        tuple(slowdown / fastest for slowdown in now),
    )


def slowdowns(stage_seconds: Sequence[float], work: Sequence[float]) -> list[float]:
    """By stage, what it takes over what its layers cost; a stage with hardly any work is taken for the median of the others.

    Args:
        work: seconds of each stage's layers on the reference device.
    """
    least = _LEAST_WORK * fmean(work)
    found = [
        seconds / mine if mine > 0 and mine >= least else None
        for seconds, mine in zip(stage_seconds, work, strict=True)
    ]
    usual = median([one for one in found if one is not None] or [1.0])
    return [usual if one is None else one for one in found]


def _slowdowns(seconds: Mapping[int, float], kinds: Sequence, stage_of: Sequence[int], stages: int) -> list[float]:
    """By stage, up to a common factor: least squares of log(seconds) = log(cost of the kind) + log(slowdown)."""
    totals = [0.0] * stages
    for n, stage in enumerate(stage_of):
        totals[stage] += seconds[n]
    timed = [(kinds[n], stage, seconds[n]) for n, stage in enumerate(stage_of) if seconds[n] > 0]
    shared = _on_several(timed)
    shares = [sum(value for _, on, value in shared if on == stage) / (totals[stage] or 1.0) for stage in range(stages)]
    shared = _on_several([row for row in shared if shares[row[1]] >= _LEAST_SHARE])
    shared = [(kind, stage, math.log(value)) for kind, stage, value in shared]
    slow = [0.0] * stages
    for _ in range(_ROUNDS):
        costs = {
            kind: fmean(value - slow[stage] for other, stage, value in shared if other == kind)
            for kind in {row[0] for row in shared}
        }
        for stage in range(stages):
            found = [value - costs[kind] for kind, other, value in shared if other == stage]
            if found:
                slow[stage] = fmean(found)
    compared = {stage for _, stage, _ in shared}
    least = min((slow[stage] for stage in compared), default=0.0)
    return [math.exp(slow[stage] - least) if stage in compared else 1.0 for stage in range(stages)]


def _on_several(rows: list[tuple]) -> list[tuple]:
    """Those (kind, stage, ...) whose kind is on more than one stage."""
    stages: dict = {}
    for kind, stage, *_ in rows:
        stages.setdefault(kind, set()).add(stage)
    return [row for row in rows if len(stages[row[0]]) > 1]
