"""The exact search behind `partition`: every way to cut L layers into S stages, most of them never looked at. Pure.

Going back from the last stage, the search keeps for every stage and first layer the Pareto front of pace, fill, update (see
`Spans`) and bytes across hosts, over all ways to cut the layers from there on. What makes that fast:

- The best pace, fill and update of what lies before, behind and in a span bound a step from below, so whatever cannot be in
  a step as good as the best one known is dropped.
- Where fronts are still long, the best pace, fill and update contradict each other. Then the cuts are divided into a box of
  those with a slower and one of those with a faster pace (or update): bounds are tighter in both. The box with the least
  bound is next, as in any branch and bound.

Seconds are rounded to multiples of a power of two that are small against `TOLERANCE`, so that ties are ties.
"""

import heapq
import math
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from ds_recsys.balance.spans import Spans

TOLERANCE = 1e-9  # relative; steps that differ by less are equally good
_WIDTH = 16  # entries of a front for one first layer: beyond it, dividing costs less than going on
_FEW = 300  # spans of a box: with more, a quick look for a better step pays
_MANY = 800  # with more, dividing costs less than fronts


@dataclass
class Box:
    """The cuts made of `spans` whose largest pace and largest update are at least these."""

    spans: Spans
    pace: float = 0.0
    update: float = 0.0


@dataclass
class Front:
    """Ways to cut the layers from `start` [k] on into the stages that are left; values [k, 4]: pace, fill, update, crossing."""

    start: np.ndarray
    values: np.ndarray

    @property
    def steps(self) -> np.ndarray:
        return self.values[:, :3].sum(axis=1)

    @property
    def least(self) -> float:
        return float(self.steps.min(initial=math.inf))


def quantum(step: float) -> float:
    """A power of two of which `step` is about 2^51: what is not longer is a whole number of it, exact in float64."""
    return math.ldexp(1.0, math.frexp(step)[1] - 51) if step else 1.0


def search(spans: Spans, best: float) -> list[int]:
    """Bounds of the best cut: least step, then fewest bytes across hosts, then lexicographically smallest.

    Args:
        spans: rounded to `quantum(best)`.
        best: step of any cut made of them.
    """
    number = count()
    boxes, searched = [(0.0, next(number), Box(spans))], []
    while boxes and boxes[0][0] <= best * (1 + TOLERANCE):
        box, least, best = _tightened(heapq.heappop(boxes)[2], best)
        if box is None:
            continue
        parts = _divided(box)
        # Settled: nothing better is in the box, what is left in it is to choose among ties.
        settled = not parts or least * (1 + TOLERANCE) >= best
        if not settled and len(box.spans) > _FEW:
            best = min(best, _fronts(box, best, 1)[0][0].least)
        if not settled and len(box.spans) > _MANY:
            whole = False
        else:
            fronts, whole = _fronts(box, best, _WIDTH if parts else math.inf)
            best = min(best, fronts[0].least)
        if whole:
            searched.append((box, fronts))
            continue
        for part in parts:
            heapq.heappush(boxes, (least, next(number), part))
    limit = best * (1 + TOLERANCE)
    return min(_first(box, fronts, limit) for box, fronts in searched if fronts[0].least <= limit)[1]


def _tightened(box: Box, best: float) -> tuple[Box | None, float, float]:
    """The box without spans that are in no step as good as `best`, None if nothing is left; its least step; a better `best`."""
    spans = box.spans
    while True:
        cut = spans.best_cut(spans.fill, np.add)
        if cut is None:
            return None, math.inf, best
        best = min(best, spans.step(cut))
        pace = np.maximum(spans.around(spans.pace, np.maximum), box.pace)
        update = np.maximum(spans.around(spans.update, np.maximum), box.update)
        least = pace + spans.around(spans.fill, np.add) + update
        kept = least <= best * (1 + TOLERANCE)
        had, spans = len(spans), spans.where(kept)
        if not kept.any():
            return None, math.inf, best
        if len(spans) > 0.4 * had:  # with fewer spans the bounds are tighter, so it is worth going on after a big drop
            return Box(spans, pace[kept].min(), update[kept].min()), float(least.min()), best


def _divided(box: Box) -> list[Box]:
    """The cuts of the box in two, by the wider of pace and update; none where neither is a range."""
    spans = box.spans
    width = {name: getattr(spans, name).max() - getattr(box, name) for name in ("pace", "update")}
    name = max(width, key=width.get)
    if width[name] <= 0:
        return []
    values = getattr(spans, name)
    middle = getattr(box, name) + width[name] / 2
    above = values > middle
    return [replace(box, **{name: values[above].min()}), replace(box, spans=spans.where(~above))]


def _fronts(box: Box, best: float, width: float) -> tuple[list[Front], bool]:
    """Fronts of stages 0 .. S, and whether they are whole: none had more than `width` entries for one first layer."""
    spans = box.spans
    paces, updates = spans.before(spans.pace, np.maximum), spans.before(spans.update, np.maximum)
    fills = spans.before(spans.fill, np.add)
    front, whole = Front(np.array([spans.layers]), np.array([[box.pace, 0.0, box.update, 0.0]])), True
    fronts = [front]
    for s, here in reversed(list(enumerate(spans.of_stages()))):
        span, values = _extended(spans, np.arange(here.start, here.stop), front)
        start = spans.start[span]
        # A step has at least the pace and update of what lies before: below that there is nothing to tell apart.
        values[:, 0] = np.maximum(values[:, 0], paces[s, start])
        values[:, 2] = np.maximum(values[:, 2], updates[s, start])
        steps = values[:, :3].sum(axis=1) + fills[s, start]
        kept = steps <= best * (1 + TOLERANCE)
        front, complete = _pruned(Front(start[kept], values[kept]), steps[kept], width)
        whole = whole and complete
        fronts.append(front)
    return fronts[::-1], whole


def _extended(spans: Spans, among: np.ndarray, front: Front) -> tuple[np.ndarray, np.ndarray]:
    """Every span of `among` with every entry of `front` that goes on where it stops: the span [m], the values [m, 4]."""
    first = np.searchsorted(front.start, spans.stop[among])
    count = np.searchsorted(front.start, spans.stop[among], side="right") - first
    span = np.repeat(among, count)
    entry = np.arange(len(span)) + np.repeat(first - (np.cumsum(count) - count), count)
    rest = front.values[entry]
    values = np.empty_like(rest)
    values[:, 0] = np.maximum(spans.pace[span], rest[:, 0])
    values[:, 1] = spans.fill[span] + rest[:, 1]
    values[:, 2] = np.maximum(spans.update[span], rest[:, 2])
    values[:, 3] = spans.crossing[span] + rest[:, 3]
    return span, values


def _pruned(front: Front, steps: np.ndarray, width: float) -> tuple[Front, bool]:
    """At most `width` entries for each start, and whether no undominated one is missing; sorted by start before and after."""
    if width == 1:
        return _shortened(front, steps, 1), False
    front, steps = _distinct(front, steps)
    shortened = _shortened(front, steps, width)
    return _undominated(shortened), len(shortened.start) == len(front.start)


def _distinct(front: Front, steps: np.ndarray) -> tuple[Front, np.ndarray]:
    """Sorted by start and values, without most of the entries that an earlier one of their start dominates; and their steps."""
    order = np.lexsort((*front.values.T[::-1], front.start))
    start, values, steps = front.start[order], front.values[order], steps[order]
    for _ in range(3):  # entries next to each other are often alike: cheap, and few pairs are left to compare
        kept = np.ones(len(start), bool)
        kept[1:] = (start[1:] != start[:-1]) | (values[1:] < values[:-1]).any(axis=1)
        start, values, steps = start[kept], values[kept], steps[kept]
    return Front(start, values), steps


def _shortened(front: Front, steps: np.ndarray, width: float) -> Front:
    """The `width` best of each start by `steps`, in the order they had."""
    kept = np.empty(len(steps), bool)
    order = np.lexsort((steps, front.start))
    kept[order] = np.arange(len(order)) - np.searchsorted(front.start, front.start) < width
    return Front(front.start[kept], front.values[kept])


def _undominated(front: Front) -> Front:
    """Without entries that another of the same start is at least as good as in all values; sorted as by `_distinct`."""
    start, values = front.start, front.values
    kept = np.ones(len(start), bool)
    for here in np.unique(start[1:][start[1:] == start[:-1]]):
        at = slice(np.searchsorted(start, here), np.searchsorted(start, here, side="right"))
        better = (values[at, None] <= values[None, at]).all(axis=2)
        kept[at] = ~np.triu(better, 1).any(axis=0)  # in this order, only earlier entries dominate later ones
    return Front(start[kept], values[kept])


def _first(box: Box, fronts: list[Front], limit: float) -> tuple[float, list[int]]:
    """Of the cuts with a step within `limit`: the fewest bytes across hosts, and the smallest cut that has so few."""
    spans = box.spans
    fewest = fronts[0].values[fronts[0].steps <= limit, 3].min()
    bounds, spent = [0], np.zeros(4)
    for here, front in zip(spans.of_stages(), fronts[1:], strict=True):
        among = here.start + np.flatnonzero(spans.start[here] == bounds[-1])
        span, rest = _extended(spans, among, front)
        pace, update = np.maximum(rest[:, 0], spent[0]), np.maximum(rest[:, 2], spent[2])
        fits = (pace + (rest[:, 1] + spent[1]) + update <= limit) & (rest[:, 3] + spent[3] <= fewest)
        chosen = span[fits][0]  # they are ordered by stop
        bounds.append(int(spans.stop[chosen]))
        spent = np.array(
            [
                max(spent[0], spans.pace[chosen]),
                spent[1] + spans.fill[chosen],
                max(spent[2], spans.update[chosen]),
                spent[3] + spans.crossing[chosen],
            ]
        )
    return float(fewest), bounds
