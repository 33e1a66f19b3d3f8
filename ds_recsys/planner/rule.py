"""Which plan is taken, and the reason in words. Pure.

Of every way to treat gradients the fastest plan counts. The ways stand in the order of what they change in training: fp32
sums first, then int8, then averages that come a step late, then int4. A later way must be a twentieth faster than the best
one before it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ds_recsys.errors import UserError
from ds_recsys.planner.facts import Facts
from ds_recsys.planner.plan import Plan
from ds_recsys.planner.predict import Forecast, predict

WAYS = (
    ("none", "sync"),
    ("int8", "sync"),
    ("none", "delayed"),
    ("int8", "delayed"),
    ("int4", "sync"),
    ("int4", "delayed"),
)
MUST_GAIN = 0.95


@dataclass(frozen=True)
class Decision:
    """What was chosen, and among what.

    Attributes:
        best: of the chosen plan.
        ways: (method, mode) -> forecast of its fastest plan.
        grids: (pipe, data, tensor) -> forecast of its fastest plan in the chosen way, or in its own where it has one replica.
        refused: (pipe, data, tensor) -> why no plan of that grid can run.
    """

    best: Forecast
    ways: dict[tuple[str, str], Forecast]
    grids: dict[tuple[int, int, int], Forecast]
    refused: dict[tuple[int, int, int], str]

    @property
    def plan(self) -> Plan:
        return self.best.plan

    def describe(self, facts: Facts) -> str:
        """In a few lines."""
        best, hosts = self.best, len(set(facts.hosts))
        slow = max(facts.slowdowns)
        lines = [
            f"parallel auto: {best.plan}, {best.seconds:.3g} s a step predicted (compute {best.compute:.3g}, pipeline "
            f"{best.pipeline:.3g}, gradients {best.gradients:.3g}, optimizer {best.optimizer:.3g})",
            f"  measured: {facts.world_size} ranks on {hosts} host{'s' if hosts > 1 else ''}"
            + (f", the slowest device {slow:.1f} times as slow as the fastest" if slow > 1 else "")
            + (f"; {self._ratio()}" if best.plan.data > 1 else ""),
        ]
        others = sorted(
            (one for one in self.grids.values() if one.plan != best.plan), key=lambda forecast: forecast.seconds
        )
        if others:
            lines.append("  other grids: " + "; ".join(f"{_grid(one.plan)} {one.seconds:.3g} s" for one in others))
        if len(self.ways) > 1:
            named = (
                f"{_way(way) if one.plan.data > 1 else 'one replica'} {one.seconds:.3g} s"
                for way, one in self.ways.items()
            )
            lines.append(f"  ways to sum gradients, each on its best grid: {'; '.join(named)}")
        lines += [
            f"  not pipe {p} x data {d} x tensor {t}: {reason}" for (p, d, t), reason in sorted(self.refused.items())
        ]
        return "\n".join(lines)

    def _ratio(self) -> str:
        best = self.best
        return (
            f"sums of {_way((best.plan.method, best.plan.mode))} gradients take {best.communication / best.compute:.2f} times "
            f"the compute, {best.gradients / best.compute:.2f} times where compute does not cover them"
        )


def decide(facts: Facts, plans: Iterable[Plan], zero_stage: int = 0) -> Decision:
    """By the rule above.

    Raises:
        UserError: no plan can run; one reason for each grid.
    """
    found: dict[tuple[str, str], list[Forecast]] = {}
    refused: dict[tuple[int, int, int], str] = {}
    for plan in plans:
        try:
            forecast = predict(facts, plan, zero_stage)
        except UserError as error:
            refused.setdefault((plan.pipe, plan.data, plan.tensor), str(error))
            continue
        found.setdefault((plan.method, plan.mode), []).append(forecast)
    if not found:
        reasons = "; ".join(f"pipe {p} x data {d} x tensor {t}: {why}" for (p, d, t), why in sorted(refused.items()))
        raise UserError(
            f'recsys.parallel "auto" finds no way to train on {facts.world_size} ranks: '
            f"{reasons or 'the batch cannot be shared out'}; change the batch size, the number of ranks or the model"
        )
    ways = {way: min(found[way], key=_seconds) for way in [*WAYS, *found] if way in found}  # others: set by hand
    best = None
    for forecast in ways.values():
        if best is None or forecast.seconds < MUST_GAIN * best.seconds:
            best = forecast
    grids: dict[tuple[int, int, int], Forecast] = {}
    chosen = (best.plan.method, best.plan.mode)
    for way in {chosen, ("none", "sync")}:
        for one in found.get(way, ()):
            key = (one.plan.pipe, one.plan.data, one.plan.tensor)
            if (way == chosen or one.plan.data == 1) and (key not in grids or one.seconds < grids[key].seconds):
                grids[key] = one
    works = {(one.plan.pipe, one.plan.data, one.plan.tensor) for some in found.values() for one in some}
    return Decision(best, ways, grids, {grid: why for grid, why in refused.items() if grid not in works})


def _seconds(forecast: Forecast) -> tuple:
    """Of plans that take the same, the one with the fewest stages, tensor ranks and micro-batches."""
    plan = forecast.plan
    return round(forecast.seconds, 6), plan.pipe, plan.tensor, plan.micro_batches


def _grid(plan: Plan) -> str:
    return f"pipe {plan.pipe} x data {plan.data} x tensor {plan.tensor}"


def _way(way: tuple[str, str]) -> str:
    method, mode = way
    return ("fp32" if method == "none" else method) + ("" if mode == "sync" else f" {mode}")
