"""Mode "async": every replica trains at its own speed and tells the others what it changed when they are ready to hear it."""

import logging
import time

from ds_recsys.comm.modes.asynchronous_meeting import MeetingReplicas
from ds_recsys.errors import UserError

logger = logging.getLogger("ds_recsys")


class Asynchronous(MeetingReplicas):
    """See exchange.py for the algorithm and exchange_wire.py for the messages, which go over gloo also on GPUs.

    After a step a replica takes what has arrived and sends to whoever has applied its last message, if that is `send_every`
    steps old; its ranks (pipeline stages x tensor ranks) agree on both in one small all-reduce, so that what they hold in
    copies stays equal bit for bit. Steps without either cost nothing else.
    It waits for the others only in a meeting: to save, to evaluate, to flush. Evaluations, exports and checkpoints see the
    mean of the replicas' weights, and change nothing but that messages arrive before them.

    Attributes:
        seconds: spent in exchanges by the training thread, meetings apart.
    """

    def __init__(self, engine, options, compression):
        for key, reason in _refused(compression):
            raise UserError(f'recsys.data_parallel.mode "async": "recsys.compression.{key}" {reason}')
        super().__init__(engine, options, compression)
        self.seconds = 0.0
        self._gap_sum, self._gap_count, self._gap_max = 0, 0, 0  # steps by which weights of others were old
        self._silent: set[int] = set()
        self._late = False

    def after_step(self) -> None:
        begin, ledger = time.perf_counter(), self.ledger
        self._moved = True
        _, received = self._look()
        ledger.steps += 1
        for peer in ledger.peers.values():
            self._note_gap(peer.known - peer.seen)
        arrived = [replica for replica, peer in ledger.peers.items() if received[replica] > peer.applied]
        wanting = [replica for replica in ledger.peers if ledger.may_send(replica)]
        if arrived or wanting or ledger.behind():
            self._exchange(arrived)
        if arrived or wanting or ledger.steps % self.options.send_every == 0:
            self._tell()
        self._report_silent()
        self._follow_schedule()
        self.seconds += time.perf_counter() - begin

    def _exchange(self, arrived: list[int]) -> None:
        """Take the messages of the replicas in `arrived`, then send to whoever may get one."""
        ledger = self.ledger
        self._record()
        self._drop_if_late()
        for replica in arrived:
            ledger.apply(replica, self.wire.take(replica))
        for replica in ledger.peers:
            if ledger.may_send(replica):
                self.wire.send(replica, lambda message, replica=replica: ledger.send(replica, message))
        self._write()

    def _note_gap(self, steps: int) -> None:
        self._gap_sum, self._gap_count, self._gap_max = (
            self._gap_sum + steps,
            self._gap_count + 1,
            max(self._gap_max, steps),
        )

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
            scheduler.last_batch_iteration = self.progress(self.steps) - 1  # its next step goes on from there

    def _save(self, method, save_dir, tag=None, *args, **kwargs):
        tag = tag or f"global_step{self.meet(self.progress(self.steps))}"  # replicas count steps of their own
        return super()._save(method, save_dir, tag, *args, **kwargs)

    def state_dict(self) -> dict:
        """Collective: of a moment with nothing under way."""
        self.meet(self._met)
        content, engine = super().state_dict(), self.engine
        content["own"] |= {
            "ledger": self.ledger.state_dict(),
            "counters": {name: getattr(engine, name) for name in ("global_steps", "global_samples")},
        }
        return content | {"shared": {"met": self._met}}

    def load_state_dict(self, content: dict) -> None:
        loaded = self._read()
        self.meet(self._met)
        for line in self.wire.lines.values():
            line.received = 0
        self._next_phase(self._met)
        self.parameters.write(loaded)
        super().load_state_dict(content)
        own, self._met = content.get("own", {}), content.get("shared", {}).get("met", self.steps)
        if "ledger" in own:
            self.ledger.load_state_dict(own["ledger"], self._read())
            vars(self.engine).update(own["counters"])
        else:  # all begin from the mean, as if all had taken equally many steps
            self.steps = self._met
            self.ledger.restart(self._read(), self.steps)
        with self.wire.changed:
            for replica, peer in self.ledger.peers.items():
                line = self.wire.lines[replica]
                line.received = max(line.received, peer.applied)
        self._tell()

    def as_dict(self) -> dict:
        return {
            **super().as_dict(),
            "replica": self.data_rank,
            "progress": self.progress(self.steps),
            "sent_bytes": self.wire.bytes_sent,
            "seconds": self.seconds,
            "staleness_mean": self._gap_sum / max(1, self._gap_count),
            "staleness_max": self._gap_max,
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


def _refused(compression):
    """(key, reason) of what has no meaning here."""
    if compression.method == "powersgd":
        yield "method", '"powersgd" needs all replicas at once; use int8, int4, topk or another'
    if not compression.error_feedback:
        yield "error_feedback", "false: what was not sent is always sent later; remove it"
    if compression.warmup_steps:
        yield "warmup_steps", "has no meaning: there are no common steps; remove it"
    if compression.owner_shares:
        yield "owner_shares", "has no meaning: nobody sums for others; remove it"
