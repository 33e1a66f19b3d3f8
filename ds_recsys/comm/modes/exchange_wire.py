"""Messages between the replicas of mode "async", over gloo, from rank to rank; nobody waits for anybody.

A send of gloo ends when the other side has posted its receive, and then the bytes are on their way in the background. So each
pair of ranks has a thread that always has a receive posted and one that sends, twice: for changes of weights, and for notes,
which are short and say how far a replica is, so that they do not wait behind a long message. A stopped process holds up
nothing but the threads of its pairs; a dead one breaks its connections, which ends them.

The group is of gloo on every machine: on a GPU the messages are made and read on the host.
"""

import itertools
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

_CHANGE, _NOTE, _WEIGHTS = 1, 2, 3  # tags
_FIELDS = ("steps", "consumed", "sent", "phase", "progress", "mask", "alive", "last")
_LAST = -1  # in place of a message's number: there are no more


class Note(dict):
    """What a replica says of itself to another one: whole numbers by name; the newest counts.

    steps: it has taken. consumed: of the receiver's messages that it has applied. sent: messages to the receiver. phase,
    progress, mask: of a meeting. alive: the replicas that are not lost to it, as bits. last: 1 when no note follows.
    """

    def __init__(self, **values: int):
        super().__init__(dict.fromkeys(_FIELDS, 0), **values)

    def tensor(self) -> Tensor:
        return torch.tensor([self[field] for field in _FIELDS])

    @classmethod
    def of(cls, tensor: Tensor) -> "Note":
        return cls(**dict(zip(_FIELDS, tensor.tolist(), strict=True)))


class Line:
    """What goes between this rank and one other; its fields change under `Wire.changed`.

    Attributes:
        alive: whether the other rank may still send and receive.
        received: number of the newest message that is here in full; `inbox`: those that were not taken yet.
        note: the newest from the other side.
    """

    def __init__(self, message_bytes: int):
        self.alive, self.ended = True, False
        self.received, self.inbox, self.note = 0, [], Note()
        self.outgoing: Tensor | None = None  # belongs to the sender thread until it is None again
        self.told = Note()
        self.own_note: Note | None = None  # `told`, until it leaves
        self.last_message = torch.zeros(message_bytes, dtype=torch.uint8)
        # one is read while the next arrives: the other side sends no more before it knows that the first was applied
        self.buffers = [torch.empty(message_bytes, dtype=torch.uint8) for _ in range(2)]


class Wire:
    """Lines to all other ranks of a gloo group.

    Args:
        message_bytes: of each message, the same on all ranks; its first 8 are a number of 0 or more.

    Attributes:
        changed: a condition, notified when something has arrived or a rank was lost.
        lines: by rank of the group.
        bytes_sent: by this rank in changes of weights and whole weights.
    """

    def __init__(self, group: dist.ProcessGroup, message_bytes: int):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.changed = threading.Condition()
        self.lines = {rank: Line(message_bytes) for rank in range(self.size) if rank != self.rank}
        self.bytes_sent = 0
        self._threads: list[threading.Thread] = []
        for rank in self.lines:
            for work in (self._receive_changes, self._receive_notes, self._send_changes, self._send_notes):
                self._start(work, rank)

    def send(self, rank: int, write: Callable[[Tensor], None]) -> None:
        """`write` the next message to `rank`, which has taken the one before it; it leaves in the background."""
        line = self.lines[rank]
        with self.changed:
            self.changed.wait_for(lambda: line.outgoing is None or not line.alive, 60)
        write(line.last_message)
        with self.changed:
            line.outgoing = line.last_message
            self.changed.notify_all()

    def tell(self, rank: int, note: Note) -> None:
        """Leave `rank` a note; one that has not left yet is forgotten."""
        with self.changed:
            self.lines[rank].own_note = self.lines[rank].told = note
            self.changed.notify_all()

    def take(self, rank: int) -> Tensor:
        """The oldest message from `rank`, good until the sender learns that it was applied."""
        with self.changed:
            return self.lines[rank].inbox.pop(0)

    def exchange_weights(self, weights: Tensor, ranks: list[int]) -> dict[int, Tensor]:
        """Start to send `weights`, which must not change meanwhile, to `ranks` and to receive theirs.

        Returns:
            By rank, what has arrived; it fills up under `changed`.
        """
        arrived: dict[int, Tensor] = {}

        def receive(rank: int) -> None:
            buffer = torch.empty_like(weights)
            self.group.recv([buffer], rank, _WEIGHTS).wait()
            with self.changed:
                arrived[rank] = buffer
                self.changed.notify_all()

        def send(rank: int) -> None:
            self.group.send([weights], rank, _WEIGHTS).wait()

        for rank in ranks if weights.numel() else ():
            self._start(receive, rank)
            self._start(send, rank)
            self.bytes_sent += 4 * weights.numel()
        return arrived if weights.numel() else dict.fromkeys(ranks, weights)

    def close(self, seconds: float = 10.0) -> None:
        """Nothing more is sent; every rank that is left calls it, after they have met. Waits for the threads to end."""
        with self.changed:
            for line in self.lines.values():
                self.changed.wait_for(lambda line=line: line.outgoing is None or not line.alive, seconds)
                line.own_note = line.told = Note(**{**line.told, "last": 1})
                line.last_message[:8].view(torch.int64).fill_(_LAST)
                line.outgoing = line.last_message
            self.changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(seconds)

    def _start(self, work: Callable[[int], None], rank: int) -> None:
        def run() -> None:
            try:
                work(rank)
            except RuntimeError:  # gloo's: the connection is gone
                with self.changed:
                    self.lines[rank].alive = self.lines[rank].ended
                    self.changed.notify_all()

        thread = threading.Thread(target=run, name=f"async-{work.__name__}-{rank}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _receive_changes(self, rank: int) -> None:
        line = self.lines[rank]
        for buffer in itertools.cycle(line.buffers):
            self.group.recv([buffer], rank, _CHANGE).wait()
            number = int(buffer[:8].view(torch.int64))
            if number == _LAST:
                return
            with self.changed:
                line.inbox.append(buffer)
                line.received = number
                self.changed.notify_all()

    def _receive_notes(self, rank: int) -> None:
        line, buffer = self.lines[rank], Note().tensor()
        while True:
            self.group.recv([buffer], rank, _NOTE).wait()
            with self.changed:
                line.note = Note.of(buffer)
                line.ended = bool(line.note["last"])
                self.changed.notify_all()
            if line.ended:
                return

    def _send_changes(self, rank: int) -> None:
        line = self.lines[rank]
        while True:
            with self.changed:
                self.changed.wait_for(lambda: line.outgoing is not None or not line.alive)
                if not line.alive:
                    return
                message = line.outgoing
            last = int(message[:8].view(torch.int64)) == _LAST
            self.group.send([message], rank, _CHANGE).wait()
            with self.changed:
                line.outgoing = None
                self.bytes_sent += message.numel()
                self.changed.notify_all()
            if last:
                return

    def _send_notes(self, rank: int) -> None:
        line = self.lines[rank]
        while True:
            with self.changed:
                self.changed.wait_for(lambda: line.own_note is not None or not line.alive)
                if not line.alive:
                    return
                note, line.own_note = line.own_note, None
            self.group.send([note.tensor()], rank, _NOTE).wait()
            if note["last"]:
                return
