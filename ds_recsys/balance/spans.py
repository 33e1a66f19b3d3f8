"""Every stage that could be part of a cut, as arrays, and the best value over all cuts of one criterion at a time. Pure.

A stage that could be is a *span*: a stage number and the layers [start, stop) it would hold. A cut is a path of spans from
layer 0 to the last.
"""

import math
from dataclasses import dataclass

import numpy as np

from ds_recsys.balance.costs import PipelineCosts


@dataclass(frozen=True)
class Spans:
    """By span, ordered by stage, start and stop; all [n], seconds and bytes in float64.

    The step of a cut is the largest `pace`, plus the sum of `fill`, plus the largest `update` among its spans.

    Attributes:
        pace: seconds of all micro-batches but the first, with the transfers on both sides.
        fill: seconds of the first micro-batch; the transfer on the left is the stage before's.
        update: seconds of reduction and optimizer.
        crossing: bytes of one micro-batch across hosts where the span ends.
        stages, layers: how many there are.
    """

    stage: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    pace: np.ndarray
    fill: np.ndarray
    update: np.ndarray
    crossing: np.ndarray
    stages: int
    layers: int

    def __len__(self) -> int:
        return len(self.stage)

    def where(self, kept: np.ndarray) -> "Spans":
        """Only the spans that the mask `kept` [n] has."""
        arrays = {name: value[kept] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Spans(**arrays, stages=self.stages, layers=self.layers)

    def of_stages(self) -> list[slice]:
        ends = np.searchsorted(self.stage, np.arange(self.stages + 1))
        return [slice(*ends[s : s + 2]) for s in range(self.stages)]

    def step(self, cut: np.ndarray) -> float:
        """Seconds of a cut, given as the indices of its spans."""
        return float(self.pace[cut].max() + self.fill[cut].sum() + self.update[cut].max())

    def before(self, values: np.ndarray, join) -> np.ndarray:
        """[S + 1, L + 1]: the least that stages 0 .. s - 1 can have when they hold layers 0 .. l - 1; inf where none can.

        Args:
            values: [n], joined along a cut by `join`: np.add or np.maximum.
        """
        best = self._unreached()
        best[0, 0] = 0.0
        for s, here in enumerate(self.of_stages()):
            np.minimum.at(best[s + 1], self.stop[here], join(best[s][self.start[here]], values[here]))
        return best

    def behind(self, values: np.ndarray, join) -> np.ndarray:
        """[S + 1, L + 1]: the least that stages s .. S - 1 can have when they hold layers l .. L - 1."""
        best = self._unreached()
        best[-1, -1] = 0.0
        for s, here in reversed(list(enumerate(self.of_stages()))):
            np.minimum.at(best[s], self.start[here], join(best[s + 1][self.stop[here]], values[here]))
        return best

    def around(self, values: np.ndarray, join) -> np.ndarray:
        """[n]: the least over all cuts that have the span."""
        before, behind = self.before(values, join), self.behind(values, join)
        return join(join(before[self.stage, self.start], values), behind[self.stage + 1, self.stop])

    def best_cut(self, values: np.ndarray, join) -> np.ndarray | None:
        """[S]: indices of the spans of a cut with the least value, None if there is no cut."""
        best = self.before(values, join)
        if not math.isfinite(best[-1, -1]):
            return None
        cut, stop = [], self.layers
        for s, here in reversed(list(enumerate(self.of_stages()))):
            ending = here.start + np.flatnonzero(self.stop[here] == stop)
            cut.append(ending[join(best[s][self.start[ending]], values[ending]).argmin()])
            stop = self.start[cut[-1]]
        return np.array(cut[::-1])

    def _unreached(self) -> np.ndarray:
        return np.full((self.stages + 1, self.layers + 1), np.inf)


def all_spans(costs: PipelineCosts, micro_batches: int, quantum: float | None = None) -> Spans:
    """Those that hold a trainable layer and all that is `needed`, and leave a layer to each other stage, at any memory.

    Args:
        quantum: seconds of layers, transfers and updates are rounded to multiples of it, which makes sums of them exact
            in any order when it is a power of two; None leaves them as they are.
    """

    def rounded(values) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        return values if quantum is None else np.rint(values / quantum) * quantum

    stage, start, stop = np.nonzero(_allowed(costs))
    end = np.zeros((1, costs.num_layers + 1))
    seconds = np.array([layer.forward + layer.backward for layer in costs.layers])
    trainable = _of_layers(costs, "trainable_bytes")
    boundary = np.concatenate([[0.0], _of_layers(costs, "boundary_bytes")])
    compute = _prefix(rounded([s.slowdown * seconds for s in costs.stages]))
    update = _prefix(rounded([(s.reduction + s.slowdown * s.optimizer) * trainable for s in costs.stages]))
    overhead = rounded([s.overhead for s in costs.stages])
    transfers = [rounded(link.round_trip(boundary))[None] for link in costs.links]
    left, right = np.concatenate([end, *transfers]), np.concatenate([*transfers, end])
    crossing = np.stack([*(2.0 * link.crosses_hosts * boundary for link in costs.links), end[0]])
    fill = compute[stage, stop] - compute[stage, start] + overhead[stage] + right[stage, stop]
    return Spans(
        stage=stage,
        start=start,
        stop=stop,
        pace=(micro_batches - 1) * (fill + left[stage, start]),
        fill=fill,
        update=update[stage, stop] - update[stage, start],
        crossing=crossing[stage, stop],
        stages=costs.num_stages,
        layers=costs.num_layers,
    )


def shortfall(costs: PipelineCosts, micro_batches: int, spans: Spans) -> np.ndarray:
    """[n]: bytes over the memory limit of the span's stage; negative where there is room, -inf without a limit."""
    kept = _prefix(sum(_of_layers(costs, name) for name in ("weight_bytes", "trainable_bytes", "optimizer_bytes")))
    activations = _prefix(_of_layers(costs, "activation_bytes"))
    limits = np.array([np.inf if s.memory_limit is None else s.memory_limit for s in costs.stages])
    in_flight = np.array([costs.in_flight(s, micro_batches) for s in range(costs.num_stages)])
    held = in_flight[spans.stage] * (activations[spans.stop] - activations[spans.start])
    return held + kept[spans.stop] - kept[spans.start] - limits[spans.stage]


def _allowed(costs: PipelineCosts) -> np.ndarray:
    """[S, L + 1, L + 1]: which spans hold what they must and leave a trainable layer to each of the other stages."""
    trainable = _prefix(_of_layers(costs, "trainable_bytes") > 0)
    stage = np.arange(costs.num_stages)[:, None]
    starts = (trainable >= stage) & (stage > 0)
    stops = (trainable[-1] - trainable >= costs.num_stages - 1 - stage) & (stage < costs.num_stages - 1)
    starts[0, 0] = stops[-1, -1] = True
    apart = np.array([not layer.joined for layer in costs.layers] + [True])
    holds = (trainable[None, :] > trainable[:, None]) & apart[:, None] & apart[None, :]
    for need in sorted(frozenset().union(*(layer.needed for layer in costs.layers))):
        found = _prefix([need in layer.needed for layer in costs.layers])
        holds &= found[None, :] > found[:, None]
    return starts[:, :, None] & stops[:, None, :] & holds[None]


def _of_layers(costs: PipelineCosts, name: str) -> np.ndarray:
    return np.array([float(getattr(layer, name)) for layer in costs.layers])


def _prefix(values) -> np.ndarray:
    sums = np.cumsum(np.asarray(values, dtype=np.float64), axis=-1)
    return np.concatenate([np.zeros((*sums.shape[:-1], 1)), sums], axis=-1)
