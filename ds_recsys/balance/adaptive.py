"""`AdaptivePartition`: watches a running pipeline and moves layers between its stages when that pays."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_recsys.balance.costs import Prediction, predict
from ds_recsys.balance.decide import Decider, Decision, Rule, best_cut
from ds_recsys.balance.measure import Gathering, Meter, Reading
from ds_recsys.balance.migrate import Migration, MigrationError, migrate
from ds_recsys.balance.profile import StageProfiler
from ds_recsys.errors import UserError

_FIRST_PAUSE, _FIRST_RATE = 0.5, 100e6  # seconds, bytes per second: of a migration, before one has been seen
_WORTH_A_MOVE = 0.01  # share of the step, for the first move of "profile"
_PROFILES = 3  # cuts that "profile" may make: what a stage takes depends a little on how much it waits
_KEPT = 100_000  # records; what is older goes


@dataclass(frozen=True)
class Record:
    """One step: how the pipeline was cut, seconds of a micro-batch on each stage, seconds of the step."""

    step: int
    bounds: tuple[int, ...]
    stage_seconds: tuple[float, ...]
    step_seconds: float


@dataclass
class Move:
    """A migration and what was expected of it.

    Attributes:
        before, after: the cost model's prediction of a step at the old bounds and at the new ones.
        realised_gain: seconds that a step takes less since; None until it is known, and on other ranks than 0.
    """

    decision: Decision
    migration: Migration
    before: Prediction
    after: Prediction
    realised_gain: float | None = None


class AdaptivePartition:
    """Call it after each `train_batch` of a DeepSpeed PipelineEngine, on every rank:

        balance = ds_recsys.AdaptivePartition(engine)
        for step in range(steps):
            engine.train_batch(data)
            balance()

    Rank 0 decides, by `rule`, on what all ranks measured, which they tell each other after each fifth step and hear a step
    later, so that none waits for another.

    Args:
        engine: any PipelineEngine whose layers can move; see `ds_recsys.balance.migrate.migrate`.
        method: "adaptive" watches all the time; "profile" cuts after the first steps, measures again at that cut, and
            corrects it where `rule.gain` is to be had, twice at most.
        total_steps: of the run; a move must be won back before its end. None is a run without end.
        rule: what a move must promise.
        memory_limit: bytes a device may hold; None is no limit.
        make_optimizer: see `migrate`.
        announce: is given each decision on rank 0, one line.

    Attributes:
        records: what steps took, five at a time; the one or two between a decision and its move are left out.
        moves: every move, the same on all ranks but for the realised gain.
    """

    def __init__(
        self,
        engine,
        *,
        method: str = "adaptive",
        total_steps: int | None = None,
        rule: Rule | None = None,
        memory_limit: int | None = None,
        make_optimizer: Callable | None = None,
        announce: Callable[[str], None] = print,
    ):
        if method not in ("adaptive", "profile"):
            raise UserError(f'AdaptivePartition: method "{method}"; give "adaptive" or "profile"')
        if not getattr(engine, "pipeline_parallelism", False):
            raise UserError(
                "AdaptivePartition: this engine has no pipeline; give deepspeed.initialize a PipelineModule"
            )
        if hasattr(engine, "data_parallel"):
            mode = engine.data_parallel.options.mode
            raise UserError(
                f'AdaptivePartition: layers would move under the data-parallel mode "{mode}"; close one of them'
            )
        self.engine, self.method, self.total_steps = engine, method, total_steps
        self.records: list[Record] = []
        self.moves: list[Move] = []
        self._make_optimizer, self._announce = make_optimizer, announce
        self._profiler = StageProfiler(engine)
        self._meter = Meter(engine, self._profiler, memory_limit)
        self._decider = Decider(rule)
        self._next: Decision | None = None  # rank 0's, until the others have heard of it
        self._decided: Gathering | None = None  # of ranks, whether it has decided; rank 0's word counts
        self._done = engine.module.num_stages == 1
        self._hopeless = False

    def __call__(self) -> Migration | None:
        """After a step. Collective over the world; returns the migration that it made."""
        if self._done:
            return None
        bounds, decided, self._decided = self._bounds(), self._decided, None
        if decided is not None and decided.wait()[0].item():
            return self._move(bounds)
        readings = self._meter.read()
        for step, reading in enumerate(readings, self.engine.global_steps - len(readings)):
            self.records.append(Record(step, bounds, reading.stage_seconds, reading.step_seconds))
            self._meter.take(reading)
            if dist.get_rank() == 0 and self._next is None:
                self._next = self._verify(step, reading) if self._decider.verifying else self._considered(step, bounds)
        del self.records[:-_KEPT]
        if readings:
            self._decided = Gathering(torch.tensor([self._next is not None], device=self.engine.device))
        return None

    def _considered(self, step: int, bounds: tuple[int, ...]) -> Decision | None:
        """A decision; where no cut is possible, that is said once, and the run goes on as it is."""
        if self._hopeless:
            return None
        try:
            return self._decide(step, bounds)
        except UserError as error:
            self._hopeless = True
            self._announce(f"balance, step {step}: {error}; the bounds stay {list(bounds)}")
            return None

    def _bounds(self) -> tuple[int, ...]:
        return tuple(int(bound) for bound in self.engine.module.parts)

    def _decide(self, step: int, bounds: tuple[int, ...]) -> Decision | None:
        """Rank 0's, by what has been measured."""
        meter, micro_batches = self._meter, self.engine.micro_batches
        if not (meter.ready and meter.settled):
            return None
        if self.method == "profile":
            least = self._decider.rule.gain if self.moves else _WORTH_A_MOVE
            best, share = best_cut(meter.costs(), bounds, micro_batches, least)
            return Decision(step, best, meter.step_seconds, share * meter.step_seconds)
        if not self._decider.due(step, meter.step_seconds):
            return None
        left = float("inf") if self.total_steps is None else self.total_steps - step
        pause = lambda cut: self._pause(bounds, cut)  # noqa: E731
        return self._decider.decide(step, meter.costs(), bounds, micro_batches, meter.step_seconds, left, pause)

    def _pause(self, old: tuple[int, ...], new: tuple[int, ...]) -> float:
        """Seconds that a migration would take, by the last one."""
        size = self._meter.moving_bytes(old, new)
        if not self.moves:
            return _FIRST_PAUSE + size / _FIRST_RATE
        last = self.moves[-1].migration
        return last.seconds * max(1.0, size / max(1, last.busiest_bytes))

    def _verify(self, step: int, reading: Reading) -> Decision | None:
        """Whether the last move keeps its promise; rank 0's."""
        back, move = self._decider.verify(step, reading.step_seconds), self.moves[-1]
        if not self._decider.verifying:
            move.realised_gain, expected = self._decider.realised, move.decision
            self._announce(
                f"balance, step {step}: the move saves {move.realised_gain / expected.before:.1%} of a step, "
                f"{expected.predicted_gain / expected.before:.1%} was expected"
            )
        return back

    def _move(self, bounds: tuple[int, ...]) -> Migration | None:
        """Collective: what rank 0 has decided."""
        decision, before, after = self._told(bounds)
        if self.method == "profile" and (decision.bounds == bounds or len(self.moves) == _PROFILES - 1):
            self.close()
        if decision.bounds == bounds:
            if dist.get_rank() == 0:
                self._announce(f"balance, step {decision.step}: bounds {list(bounds)} are the best there are")
            return None
        try:
            migration = migrate(self.engine, decision.bounds, make_optimizer=self._make_optimizer)
        except (UserError, MigrationError) as error:
            if isinstance(error, MigrationError) and "are still" not in str(error):
                raise
            self._decider.failed(decision.step)
            if self.method == "profile":
                self.close()
            if dist.get_rank() == 0:
                self._announce(f"balance, step {decision.step}: {error}")
            return None
        self.moves.append(Move(decision, migration, before, after))
        self._meter.moved(afresh=self.method == "profile")
        if dist.get_rank() == 0:
            self._report(self.moves[-1])
        return migration

    def _told(self, bounds: tuple[int, ...]) -> tuple[Decision, Prediction, Prediction]:
        box = [None]
        if dist.get_rank() == 0:
            costs, micro_batches = self._meter.costs(), self.engine.micro_batches
            box = [(self._next, *(predict(costs, cut, micro_batches) for cut in (bounds, self._next.bounds)))]
            self._next = None
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def _report(self, move: Move) -> None:
        """One line, and events for DeepSpeed's monitor."""
        decision, migration = move.decision, move.migration
        stages = " ".join(f"{1e3 * seconds:.1f}" for seconds in self.records[-1].stage_seconds)
        promise = f"{decision.predicted_gain / decision.before:.1%} of a step of {decision.before:.3f} s to be saved"
        self._announce(
            f"balance, step {decision.step}: stages take {stages} ms a micro-batch; bounds {list(self.records[-1].bounds)} "
            f"-> {list(decision.bounds)}: {'taken back, the last move saved too little' if decision.back else promise}; "
            f"waiting {move.before.idle_share:.0%} -> {move.after.idle_share:.0%} of the stages' time, "
            f"{move.before.cross_host_bytes / 1e6:.1f} -> {move.after.cross_host_bytes / 1e6:.1f} MB a step across hosts; "
            f"{migration.bytes / 1e6:.1f} MB moved in {migration.seconds:.2f} s"
        )
        if self.engine.monitor.enabled:
            events = {
                "predicted_gain": decision.predicted_gain,
                "migration_seconds": migration.seconds,
                "migration_bytes": migration.bytes,
            }
            samples = self.engine.global_samples
            self.engine.monitor.write_events([(f"Balance/{key}", value, samples) for key, value in events.items()])

    def close(self) -> None:
        """Watch no longer. What is on its way is waited for: a rank may end after this, and others have yet to hear it."""
        self._done = True
        for gathering in (self._decided, self._meter.under_way):
            if gathering is not None:
                gathering.wait()
        self._decided = None
        self._profiler.close()
