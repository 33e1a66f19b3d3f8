"""When to move: a gain that lasts, is worth the pause, and comes true. Pure; one rank decides for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ds_recsys.balance.costs import PipelineCosts, predict
from ds_recsys.balance.partition import partition


@dataclass(frozen=True)
class Rule:
    """What a move must promise.

    Attributes:
        gain: least predicted share of the step's time that is saved.
        patience: measurements in a row that must promise it.
        evidence: what those in a row must promise above `gain` in all, so that a large gain is taken in a few steps and a small
            one only when it lasts, which noise does not (Page's cumulative sum, Biometrika 41, 1954).
        margin: how often the pause must be won back in the steps that are left.
        rest: steps between two looks for a better cut while none is to be had and the step does not get slower by `gain`:
            a look takes rank 0 some milliseconds, for which all wait.
        cooldown: steps after a move without another; after a move that is taken back twice as many, and so on.
        verify: steps after a move over which the gain must show.
        realised: least share of the predicted gain that must come true, or the move is taken back.
    """

    gain: float = 0.05
    patience: int = 3
    evidence: float = 1.0
    margin: float = 2.0
    rest: int = 5
    cooldown: int = 20
    verify: int = 5
    realised: float = 0.5


@dataclass(frozen=True)
class Decision:
    """To cut at `bounds`. Seconds are a step's.

    Attributes:
        before: the step as measured.
        predicted_gain: seconds that a step is expected to save; 0 for a move that is taken back.
        back: whether the last move is taken back.
    """

    step: int
    bounds: tuple[int, ...]
    before: float
    predicted_gain: float
    back: bool = False


class Decider:
    """Fed with one measurement after another; `decide` returns a move or None."""

    def __init__(self, rule: Rule | None = None):
        self.rule = rule or Rule()
        self._promised, self._evidence = 0, 0.0  # of the measurements in a row
        self._pending: tuple[Decision, tuple[int, ...]] | None = None  # the last move and the bounds before it
        self._after: list[float] = []
        self._quiet_until, self._cooldown = 0, self.rule.cooldown
        self._calm: tuple[int, float] | None = None  # the last look, if it found nothing: the step and its seconds
        self.realised: float | None = None  # seconds a step that the last verified move saved

    @property
    def verifying(self) -> bool:
        """Whether the last move has yet to keep its promise."""
        return self._pending is not None

    def due(self, step: int, step_seconds: float) -> bool:
        """Whether `decide` is to look now."""
        if step < self._quiet_until or self.verifying:
            return False
        if self._calm is None:
            return True
        looked, seconds = self._calm
        return step >= looked + self.rule.rest or step_seconds > (1 + self.rule.gain) * seconds

    def decide(
        self,
        step: int,
        costs: PipelineCosts,
        bounds: Sequence[int],
        micro_batches: int,
        step_seconds: float,
        steps_left: float,
        pause: Callable[[tuple[int, ...]], float],
    ) -> Decision | None:
        """One measurement; no move is decided on while one is `verifying`.

        Args:
            costs: as they are estimated now.
            step_seconds: measured, over the same steps as `costs`.
            pause: seconds that a migration to some bounds would take.
        """
        if not self.due(step, step_seconds):
            return None
        bounds, rule = tuple(bounds), self.rule
        best, share = best_cut(costs, bounds, micro_batches, rule.gain)
        self._calm = (step, step_seconds) if share < rule.gain else None
        if share < rule.gain:
            self._promised, self._evidence = 0, 0.0
            return None
        self._promised, self._evidence = self._promised + 1, self._evidence + share - rule.gain
        if self._promised < rule.patience or self._evidence < rule.evidence:
            return None
        saved = share * step_seconds
        if saved * steps_left <= rule.margin * pause(best):
            return None
        decision = Decision(step, best, step_seconds, saved)
        self._promised, self._evidence, self._after, self._pending = 0, 0.0, [], (decision, bounds)
        return decision

    def verify(self, step: int, step_seconds: float) -> Decision | None:
        """One step after a move: whether it kept its promise; if not, back."""
        decision, before = self._pending
        self._after.append(step_seconds)
        if len(self._after) < self.rule.verify:
            return None
        self.realised = decision.before - median(self._after)
        self._pending = None
        kept = self.realised >= self.rule.realised * decision.predicted_gain
        self._cooldown = self.rule.cooldown if kept else 2 * self._cooldown
        self._quiet_until = step + self._cooldown
        return None if kept else Decision(step, before, median(self._after), 0.0, back=True)

    def failed(self, step: int) -> None:
        """The move did not take place: not again before the cooldown is over."""
        self._pending, self._promised, self._evidence = None, 0, 0.0
        self._quiet_until = step + self._cooldown


def best_cut(
    costs: PipelineCosts, bounds: tuple[int, ...], micro_batches: int, least_gain: float = 0.0
) -> tuple[tuple[int, ...], float]:
    """The best cut and the share of the predicted step that it saves: `bounds` and 0 where less than `least_gain` can be."""
    now = predict(costs, bounds, micro_batches).step_seconds
    if now - _least(costs, micro_batches) < least_gain * now:  # saves the search, which all would wait for
        return bounds, 0.0
    best = tuple(partition(costs, micro_batches))
    share = 1 - predict(costs, best, micro_batches).step_seconds / now
    return (best, share) if share >= least_gain else (bounds, 0.0)


def _least(costs: PipelineCosts, micro_batches: int) -> float:
    """Seconds that no cut goes below: layers that could be cut anywhere, and free transfers."""
    work = sum(layer.forward + layer.backward for layer in costs.layers)
    slow = [stage.slowdown for stage in costs.stages]
    return (micro_batches - 1) * work / sum(1 / one for one in slow) + work * min(slow)
