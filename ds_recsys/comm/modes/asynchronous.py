"""Mode "async": every replica trains at its own speed and tells the others what it changed when they are ready to hear it."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.groups import group_like
from ds_recsys.comm.modes.exchange import Format, Ledger, mean_in_order
from ds_recsys.comm.modes.exchange_wire import Note, Wire
from ds_recsys.comm.modes.local import LocalMode
from ds_recsys.errors import UserError

logger = logging.getLogger("ds_recsys")

_PATIENCE = timedelta(days=7)  # of a posted receive: how long a replica may say nothing, in a long evaluation for one
_POLL = 0.01  # seconds between two looks of a replica's ranks at what has arrived, while they wait in a meeting


class Asynchronous(LocalMode):
    """See exchange.py for the algorithm and exchange_wire.py for the messages, which go over gloo also on GPUs.

    After a step a replica takes what has arrived and sends to whoever has applied its last message; its ranks (pipeline
    stages x tensor ranks) agree on both in one small all-reduce, so that what they hold in copies stays equal bit for bit.
    It waits for the others only in a meeting: to save, to evaluate, to flush. Evaluations, exports and checkpoints see the
    mean of the replicas' weights, and change nothing but that messages arrive before them.

    Attributes:
        lost: replicas that are lost, with the steps that they were known to have taken.
        world: the ranks that are left when a replica is lost; None for all.
        seconds: spent in exchanges by the training thread, meetings apart.
    """

    def __init__(self, engine, options, compression):
        super().__init__(engine, options, compression)
        for key, reason in _refused(compression, self.method):
            raise UserError(f'recsys.data_parallel.mode "async": "recsys.compression.{key}" {reason}')
        self.form = Format(self.parameters.shapes, compression.model_copy(update={"method": self.method}))
        self.ledger = Ledger(self.form, self._read(), self.data_rank, self.data_size, options.max_staleness)
        group = group_like(self.data_group, backend="gloo", timeout=_PATIENCE)
        self.wire = Wire(group, self.form.message_bytes)
        self.lost: dict[int, int] = {}
        self.world: dist.ProcessGroup | None = None
        self.seconds = 0.0
        self._phase, self._mask, self._met = 0, 0, 0
        self._gaps: list[int] = []
        self._silent: set[int] = set()
        self._late = False

    def after_step(self) -> None:
        begin, ledger = time.perf_counter(), self.ledger
        weights = self._read()
        finite, received = self._look(bool((weights - ledger.weights).sum().isfinite()))
        ledger.record(weights if finite else None)
        self._drop_if_late()
        for replica, peer in ledger.peers.items():
            self._gaps.append(peer.known - peer.seen)
            if received[replica] > peer.applied:
                ledger.apply(replica, self.wire.take(replica))
        for replica in ledger.peers:
            if ledger.may_send(replica):
                self.wire.send(replica, lambda message, replica=replica: ledger.send(replica, message))
        self._report_silent()
        self._tell()
        self._write()
        self._follow_schedule()
        self.seconds += time.perf_counter() - begin

    def progress(self, steps: int) -> int:
        """The steps that all replicas together are known to have taken, over their number at the start."""
        if self.data_size == 1:
            return steps
        together = self.ledger.steps + sum(peer.known for peer in self.ledger.peers.values()) + sum(self.lost.values())
        return max(self._met, together // self.data_size)

    def meet(self, progress: int) -> int:
        """Wait until all replicas are here and nothing is under way. Collective; the farthest `progress` of any of them.

        A replica comes here because of what it knows of the others' steps, and those will soon know as much.
        """
        self._next_phase(progress)
        lines = self.wire.lines
        met = max([progress, *(lines[replica].note["progress"] for replica in self.ledger.peers)])
        self._until(lambda: all(lines[r].received >= lines[r].note["sent"] for r in self.ledger.peers))
        for replica, peer in self.ledger.peers.items():
            if lines[replica].note["sent"] > peer.applied:
                self.ledger.apply(replica, self.wire.take(replica))
        self.ledger.settle()
        self._next_phase(met)
        self._write()
        self._met = max(self._met, met)
        self._world_of_survivors()
        return met

    def consensus_weights(self) -> Tensor:
        self.meet(self._met)
        weights = self.ledger.weights.clone()
        arrived = self.wire.exchange_weights(weights, list(self.ledger.peers))
        self._until(lambda: all(replica in arrived for replica in self.ledger.peers))
        arrived[self.data_rank] = weights
        held = self._least(torch.tensor([int(replica in arrived) for replica in range(self.data_size)])).tolist()
        self._mask = sum(1 << replica for replica, here in enumerate(held) if here)
        self._next_phase(self._met)
        mask = self._mask
        for replica in self.ledger.peers:  # who was lost meanwhile counts only if all have its weights
            mask &= self.wire.lines[replica].note["mask"]
        return mean_in_order(arrived[replica] for replica in range(self.data_size) if mask >> replica & 1)

    def flush(self) -> None:
        if not self.apart:
            return
        self.ledger.adopt(self.consensus_weights())
        self._write()
        self.apart = False

    def agreed_by_all(self, answer: bool) -> bool:
        vote = torch.tensor(float(answer), device=self.engine.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self.world)
        return bool(vote)

    def end(self) -> None:
        """After the last flush: the threads end. Collective."""
        self.wire.close()

    def close(self) -> None:
        self.end()
        super().close()

    # what the ranks of a replica see and agree on

    def _look(self, answer: bool = True) -> tuple[bool, dict[int, int]]:
        """Take in what all ranks of this replica have heard; whether `answer` is true on all, and what all have received."""
        replicas = list(self.ledger.peers)
        with self.wire.changed:
            lines = [self.wire.lines[replica] for replica in replicas]
            seen = [(line.received, line.note["steps"], line.note["consumed"], int(line.alive)) for line in lines]
        rows = self._least(torch.tensor([(int(answer), 0, 0, 0), *seen])).tolist()
        (agreed, *_), *rows = rows
        received = {}
        for replica, (number, steps, consumed, alive) in zip(replicas, rows, strict=True):
            self.ledger.hear(replica, steps, consumed)
            received[replica] = number
            if not alive:
                self._lose(replica)
        return bool(agreed), received

    def _least(self, values: Tensor) -> Tensor:
        """The smallest of each value over the ranks of this replica."""
        if dist.get_world_size(self.replica_group) == 1:
            return values
        values = values.to(self.engine.device)
        dist.all_reduce(values, op=dist.ReduceOp.MIN, group=self.replica_group)
        return values.cpu()

    def _lose(self, replica: int) -> None:
        self.lost[replica] = self.ledger.peers[replica].known
        self.ledger.lose(replica, self.wire.lines[replica].last_message)
        what = f"replica {replica} is lost after {self.lost[replica]} steps: its connection to replica {self.data_rank} broke"
        if self.options.on_lost == "stop":
            raise UserError(
                f'{what}; --resume from the last checkpoint, or set "recsys.data_parallel.on_lost" "continue"'
            )
        if replica == 0:
            raise UserError(
                f"{what}, and the run cannot go on without replica 0, which writes; --resume from a checkpoint"
            )
        if self._speaks:
            logger.warning(f"{what}; the others go on")

    def _tell(self) -> None:
        alive = self._alive()
        for replica, peer in self.ledger.peers.items():
            note = Note(steps=self.ledger.steps, consumed=peer.applied, sent=peer.sent, alive=alive)
            note.update(phase=self._phase, progress=self._met, mask=self._mask)
            self.wire.tell(replica, note)

    def _next_phase(self, progress: int) -> None:
        """Go on together with all replicas that are left, which know of the same losses then."""
        self._phase, self._met = self._phase + 1, max(self._met, progress)
        lost = None

        def here() -> bool:
            nonlocal lost
            if lost != len(self.lost):
                lost = len(self.lost)
                self._tell()
            alive = self._alive()
            notes = [self.wire.lines[replica].note for replica in self.ledger.peers]
            return all(note["phase"] >= self._phase and note["alive"] == alive for note in notes)

        self._until(here)

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for what is true on all ranks of this replica in the end."""
        while True:
            with self.wire.changed:
                true = condition()
            if self._look(true)[0]:
                return
            with self.wire.changed:
                self.wire.changed.wait(_POLL)

    def _alive(self) -> int:
        """The replicas that are not lost, as bits."""
        return sum(1 << replica for replica in self._members())

    def _world_of_survivors(self) -> None:
        left = 1 + len(self.ledger.peers)
        if left == self.data_size or (self.world is not None and dist.get_world_size(self.world) == left * self._ranks):
            return
        places = [None] * self._ranks
        dist.all_gather_object(
            places,
            [dist.get_process_group_ranks(self.data_group)[r] for r in self._members()],
            group=self.replica_group,
        )
        ranks = sorted(rank for place in places for rank in place)
        self.world = dist.new_group(ranks, use_local_synchronization=True)

    def _members(self) -> list[int]:
        return sorted([self.data_rank, *self.ledger.peers])

    @property
    def _ranks(self) -> int:
        return dist.get_world_size(self.replica_group)

    @property
    def _speaks(self) -> bool:
        """Whether this rank reports for its replica."""
        return dist.get_rank(self.replica_group) == 0

    # what is reported, and when work is dropped

    def _drop_if_late(self) -> None:
        behind = self.ledger.behind()
        if behind:
            steps = self.ledger.drop()
            if not self._late and self._speaks:
                logger.warning(
                    f"replica {self.data_rank} is {behind} steps behind what the others have done, more than max_staleness "
                    f"{self.options.max_staleness}: it drops its last {steps} step(s) and goes on from their weights"
                )
        self._late = bool(behind)

    def _report_silent(self) -> None:
        silent = {replica for replica in self.ledger.peers if self.ledger.silent(replica)}
        if self._speaks:
            for replica in sorted(silent - self._silent):
                logger.warning(
                    f"replica {replica} has taken nothing of the last {self.options.max_staleness} steps of replica "
                    f"{self.data_rank}: it is slow, stopped or cut off; the others go on"
                )
            for replica in sorted(self._silent - silent & set(self.ledger.peers)):
                logger.warning(f"replica {replica} is back, after {self.ledger.peers[replica].known} steps of its own")
        self._silent = silent

    def _follow_schedule(self) -> None:
        """The learning rate is of the run's progress, not of a replica's own steps, which may end far from it."""
        scheduler = self.engine.lr_scheduler
        if hasattr(scheduler, "last_batch_iteration") and self.data_size > 1:
            scheduler.last_batch_iteration = self.progress(self.steps) - 1
            # takes effect in the scheduler's next step

    # weights on the host, checkpoints, figures

    def _read(self) -> Tensor:
        return self.parameters.read().cpu()

    def _write(self) -> None:
        self.parameters.write(self.ledger.weights)

    def _save(self, method, save_dir, tag=None, *args, **kwargs):
        tag = tag or f"global_step{self.meet(self.progress(self.steps))}"  # replicas count steps of their own
        return super()._save(method, save_dir, tag, *args, **kwargs)

    def state_dict(self) -> dict:
        """Collective: of a moment with nothing under way."""
        self.meet(self._met)
        content, engine = super().state_dict(), self.engine
        content["own"] |= {
            "ledger": self.ledger.state_dict(),
            "met": self._met,
            "lost": self.lost,
            "counters": {name: getattr(engine, name) for name in ("global_steps", "global_samples")},
        }
        return content

    def load_state_dict(self, content: dict) -> None:
        loaded = self._read()
        self.meet(self._met)
        for line in self.wire.lines.values():
            line.received = 0
        self._next_phase(self._met)
        self.parameters.write(loaded)
        super().load_state_dict(content)
        own = content.get("own", {})
        if "ledger" in own:
            self.ledger.load_state_dict(own["ledger"], self._read())
            self._met = own["met"]
            vars(self.engine).update(own["counters"])
        else:
            self.ledger.restart(self._read(), self.steps)
            self._met = self.steps
        with self.wire.changed:
            for replica, peer in self.ledger.peers.items():
                line = self.wire.lines[replica]
                line.received = max(line.received, peer.applied)
        self._tell()

    def as_dict(self) -> dict:
        gaps = self._gaps or [0]
        return {
            **super().as_dict(),
            "replica": self.data_rank,
            "progress": self.progress(self.steps),
            "sent_bytes": self.wire.bytes_sent,
            "seconds": self.seconds,
            "staleness_mean": sum(gaps) / len(gaps),
            "staleness_max": max(gaps),
            "messages": sum(peer.sent for peer in self.ledger.peers.values()),
            "dropped_steps": self.ledger.dropped,
            "lost": sorted(self.lost),
        }

    def summary(self) -> str:
        figures = self.as_dict()
        return (
            f"{super().summary()}; replica {self.data_rank}: {self.steps} steps, {figures['messages']} messages "
            f"({self.method}), {figures['sent_bytes'] / 1e6:,.1f} MB sent in the background, {self.seconds:.1f} s of the "
            f"training; weights of the others {figures['staleness_mean']:.1f} steps old on average, "
            f"{figures['staleness_max']} at most; {figures['dropped_steps']} steps dropped"
        )


def _refused(compression, method: str):
    """(key, reason) of what has no meaning here."""
    if method == "powersgd":
        yield "method", '"powersgd" needs all replicas at once; use int8, int4, topk or another'
    if not compression.error_feedback:
        yield "error_feedback", "false: what was not sent is always sent later; remove it"
    if compression.warmup_steps:
        yield "warmup_steps", "has no meaning: there are no common steps; remove it"
