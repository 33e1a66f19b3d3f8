"""What the replicas of mode "async" know of each other, how the ranks of one agree on it, and how all of them meet."""

import logging
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.groups import group_like, place_of
from ds_recsys.comm.modes.exchange import Format, Ledger, mean_in_order
from ds_recsys.comm.modes.exchange_wire import Note, Wire
from ds_recsys.comm.modes.local import LocalMode
from ds_recsys.errors import LostRank

logger = logging.getLogger("ds_recsys")

_PATIENCE = timedelta(days=7)  # of a posted receive: how long a replica may say nothing, in a long evaluation for one
_POLL = 0.01  # seconds between two looks of a replica's ranks at what has arrived, while they wait in a meeting


class MeetingReplicas(LocalMode):
    """A replica with a `Ledger` of what it owes to which others and a `Wire` to them; they wait for each other in meetings.

    Attributes:
        lost: replicas that are lost, with the steps that they were known to have taken.
    """

    def __init__(self, engine, options, compression):
        super().__init__(engine, options, compression)
        self.form = Format(self.parameters.shapes, compression.model_copy(update={"method": self.method}))
        self.ledger = Ledger(
            self.form, self._read(), self.data_rank, self.data_size, options.max_staleness, options.send_every
        )
        group = group_like(self.data_group, backend="gloo", timeout=_PATIENCE)
        self.wire = Wire(group, self.form.message_bytes)
        self.lost: dict[int, int] = {}
        self._phase, self._mask, self._met = 0, 0, 0
        self._moved = False  # whether this replica has taken steps that the ledger does not know
        self._left: list[int] = []

    def _read(self) -> Tensor:
        return self.parameters.read().cpu()

    def _write(self) -> None:
        self.parameters.write(self.ledger.weights)

    def _record(self) -> None:
        """Tell the ledger what this replica's steps came to; if that is not finite, they have changed nothing that counts."""
        if not self._moved:
            return
        weights = self._read()
        if self.agreed(bool((weights - self.ledger.weights).sum().isfinite())):
            self.ledger.record(weights)
        self._moved = False

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
        self._record()
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
        self._leave_the_lost()
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
        moved = self._moved
        self._record()
        self.lost[replica] = self.ledger.peers[replica].known
        self.ledger.lose(replica, self.wire.lines[replica].last_message)
        if moved:  # not in a meeting, which writes at its end
            self._write()
        what = f"replica {replica} is lost after {self.lost[replica]} steps: its connection to replica {self.data_rank} broke"
        if self.options.on_lost == "stop":
            raise LostRank(
                f'{what}; --resume from the last checkpoint, or set "recsys.data_parallel.on_lost" "continue"'
            )
        if replica == 0:
            raise LostRank(
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
        return sum(1 << replica for replica in self.members)

    def _leave_the_lost(self) -> None:
        """Let what is collective over the world go on among the ranks that are left, who have agreed on who they are."""
        if len(self.members) == self.data_size or self._left == self.members:
            return
        mine = [dist.get_process_group_ranks(self.data_group)[replica] for replica in self.members]
        everyone = [None] * dist.get_world_size(self.replica_group)
        dist.all_gather_object(everyone, mine, group=self.replica_group)
        ranks = sorted(rank for some in everyone for rank in some)
        self.world = self._backend.survivors = dist.new_group(ranks, use_local_synchronization=True)
        self._left = self.members

    @property
    def members(self) -> list[int]:
        """The replicas that are not lost."""
        return sorted([self.data_rank, *self.ledger.peers])

    @property
    def place(self) -> dict[str, int]:
        """As if those that are left were all: a checkpoint of theirs is of fewer replicas."""
        place, left = place_of(self.engine, self.data_group), len(self.members)
        place["world_size"] = place["world_size"] // self.data_size * left
        return place | {"data_rank": self.members.index(self.data_rank), "data_size": left}

    @property
    def _speaks(self) -> bool:
        """Whether this rank reports for its replica."""
        return dist.get_rank(self.replica_group) == 0
