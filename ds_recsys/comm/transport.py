"""Byte payloads between the ranks of a group: each rank to each other one, or one payload of each to all."""

import contextlib
import time

import torch
import torch.distributed as dist
from torch import Tensor

_FILLED = 0.9  # of what equal sizes would be, that padding is worth


def transport_for(group: dist.ProcessGroup | None = None):
    """What is fastest on the group's backend: `PointToPoint` on gloo, `Collective` elsewhere."""
    return (PointToPoint if dist.get_backend(group) == "gloo" else Collective)(group)


class Transport:
    """Exchanges among the ranks of `group`. All ranks open and send theirs in one order.

    Attributes:
        rank, size: this rank's place in the group, and the group's number of ranks.
        bytes_sent: by this rank, so far.
        seconds_waited: for payloads that were not there yet, so far.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent, self.seconds_waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """What is done inside is waiting for payloads."""
        start = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - start

    def open(self, incoming: list[Tensor], tag: int):
        """An exchange that will receive `incoming`: by sender, uint8 [of the size it sends]; this rank's own is left alone.

        Its `send(outgoing)` starts it, outgoing by receiver; or `spread(mine)`, one payload to all. Its `wait()` returns
        when `incoming` is there, its `close()` when what was sent may be overwritten. `tag` tells exchanges apart that
        are under way together.
        """
        raise NotImplementedError


class PointToPoint(Transport):
    """A message per pair, for gloo: 0.94 of the wire, where its all_to_all reaches 0.6. Receives are posted on opening."""

    def open(self, incoming, tag):
        return _Messages(self, incoming, tag)

    @property
    def others(self) -> list[int]:
        """From the next rank on, so that not all ranks begin with the same receiver."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]


class _Messages:
    def __init__(self, transport: PointToPoint, incoming: list[Tensor], tag: int):
        self._transport, self._tag, self._sends = transport, tag, []
        group = transport.group
        self._receives = [
            group.recv([incoming[rank]], rank, tag) for rank in transport.others if incoming[rank].numel()
        ]

    def send(self, outgoing: list[Tensor]) -> None:
        transport = self._transport
        for rank in transport.others:
            if outgoing[rank].numel():
                self._sends.append(transport.group.send([outgoing[rank]], rank, self._tag))
                transport.bytes_sent += outgoing[rank].numel()

    def spread(self, mine: Tensor) -> None:
        self.send([mine] * self._transport.size)

    def wait(self) -> None:
        with self._transport.waiting():
            for work in self._receives:
                work.wait()

    def close(self) -> None:
        for work in self._sends:
            work.wait()
        self._sends = []


class Collective(Transport):
    """all_to_all_single and all_gather_into_tensor, for NCCL, which wants collectives in one order on all ranks."""

    def open(self, incoming, tag):
        return _Collectives(self, incoming)


class _Collectives:
    def __init__(self, transport: Collective, incoming: list[Tensor]):
        self._transport, self._incoming = transport, incoming

    def send(self, outgoing: list[Tensor]) -> None:
        here = self._transport
        sizes = [[payload.numel() for payload in payloads] for payloads in (outgoing, self._incoming)]
        sizes[0][here.rank] = sizes[1][here.rank] = 0
        self._sent = torch.cat([payload for rank, payload in enumerate(outgoing) if rank != here.rank])
        self._received = self._sent.new_empty(sum(sizes[1]))
        self._pieces = self._received.split(sizes[1])
        self._work = dist.all_to_all_single(
            self._received, self._sent, sizes[1], sizes[0], group=here.group, async_op=True
        )
        here.bytes_sent += sum(sizes[0])

    def spread(self, mine: Tensor) -> None:
        here = self._transport
        sizes = [payload.numel() for payload in self._incoming]
        sizes[here.rank] = mine.numel()
        longest = max(sizes)  # padded: all ranks give one size
        if sum(sizes) < _FILLED * here.size * longest:  # or not at all, where some have much less to send
            self.send([mine] * here.size)
            return
        self._sent = mine.new_zeros(longest)
        self._sent[: mine.numel()] = mine
        self._received = mine.new_empty(here.size * longest)
        self._pieces = [self._received[rank * longest :][:size] for rank, size in enumerate(sizes)]
        self._work = dist.all_gather_into_tensor(self._received, self._sent, group=here.group, async_op=True)
        here.bytes_sent += (here.size - 1) * longest

    def wait(self) -> None:
        here = self._transport
        with here.waiting():
            self._work.wait()
        for rank, (payload, piece) in enumerate(zip(self._incoming, self._pieces, strict=True)):
            if rank != here.rank:
                payload.copy_(piece)

    def close(self) -> None:
        pass  # what was sent is a copy
