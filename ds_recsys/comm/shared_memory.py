"""Byte payloads between ranks of one host that gloo connects: through memory they share, instead of the loopback device.

A sender writes a payload into a block of its own memory, and gloo carries only the block's number, and back that it was read.
Blocks have no name that could be left behind: they are memfds, which the others open below /proc, and go with their process.
"""

import mmap
import os
import secrets

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.transport import PointToPoint, Transport, transport_for

_ACK = 1 << 24  # added to the tag of an exchange; far above those of other exchanges
_TOKEN = 16  # bytes
_SMALLEST = 1 << 16


def local_transport_for(group: dist.ProcessGroup | None = None) -> Transport:
    """`SharedMemory` where the ranks of `group`, on one host, are joined by gloo and can open each other's; else as
    `transport_for`. Collective."""
    if dist.get_backend(group) != "gloo":
        return transport_for(group)
    shared = SharedMemory(group)
    return shared if shared.works() else PointToPoint(group)


class _Block:
    """A piece of this process's memory that others can open; `readers`: who has not read what is in it yet."""

    def __init__(self, size: int):
        self.number = os.memfd_create("ds_recsys")
        os.ftruncate(self.number, size)
        self.memory = torch.frombuffer(mmap.mmap(self.number, size), dtype=torch.uint8)


class SharedMemory(PointToPoint):
    """As `PointToPoint`, for the ranks of one host on CPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        self._free: dict[int, list[_Block]] = {}  # by size
        self._opened: dict[tuple[int, int], Tensor] = {}  # (rank, number) -> the block of another rank
        self._processes = [0] * self.size
        dist.all_gather_object(self._processes, os.getpid(), group=group)

    def works(self) -> bool:
        """Whether every rank can read what every other one writes. Collective."""
        token, block, problem = secrets.token_bytes(_TOKEN), None, False
        try:
            block = self.take(_TOKEN)
            block.memory[:_TOKEN] = torch.frombuffer(bytearray(token), dtype=torch.uint8)
        except (OSError, AttributeError):  # AttributeError: no memfd on this system
            problem = True
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, (block and block.number, token), group=self.group)
        try:
            for rank in self.others:
                number, wanted = everyone[rank]
                problem |= number is None or bytes(self.block_of(rank, number)[:_TOKEN].tolist()) != wanted
        except (OSError, ValueError):
            problem = True
        problems: list = [None] * self.size
        dist.all_gather_object(problems, problem, group=self.group)
        if block is not None:
            self.give_back(block)
        return not any(problems)

    def take(self, size: int) -> _Block:
        """A block of at least `size` bytes that nobody reads."""
        size = max(_SMALLEST, 1 << (size - 1).bit_length())
        free = self._free.setdefault(size, [])
        return free.pop() if free else _Block(size)

    def give_back(self, block: _Block) -> None:
        self._free[block.memory.numel()].append(block)

    def block_of(self, rank: int, number: int) -> Tensor:
        """The memory of a block that another rank has written."""
        key = (rank, number)
        if key not in self._opened:
            descriptor = os.open(f"/proc/{self._processes[rank]}/fd/{number}", os.O_RDWR)
            try:
                self._opened[key] = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
            finally:
                os.close(descriptor)
        return self._opened[key]

    def open(self, incoming, tag):
        return _Notices(self, incoming, tag)


class _Notices:
    """An exchange: see `Transport.open`."""

    def __init__(self, transport: SharedMemory, incoming: list[Tensor], tag: int):
        self._transport, self._tag, self._incoming = transport, tag, incoming
        self._receives, self._sends, self._acks = {}, [], []
        for rank in transport.others:
            if incoming[rank].numel():
                number = torch.empty(1, dtype=torch.int64)
                self._receives[rank] = number, transport.group.recv([number], rank, tag)

    def send(self, outgoing: list[Tensor]) -> None:
        for rank in self._transport.others:
            self._write(outgoing[rank], [rank])

    def spread(self, mine: Tensor) -> None:
        self._write(mine, self._transport.others)

    def _write(self, payload: Tensor, receivers: list[int]) -> None:
        if not payload.numel():
            return
        transport = self._transport
        block = transport.take(payload.numel())
        block.memory[: payload.numel()] = payload
        acks = []
        for rank in receivers:
            number, ack = torch.tensor([block.number]), torch.empty(1, dtype=torch.int64)
            acks.append(transport.group.recv([ack], rank, self._tag + _ACK))
            self._sends.append(transport.group.send([number], rank, self._tag))
            transport.bytes_sent += payload.numel()
        self._acks.append((block, acks))

    def wait(self) -> None:
        transport = self._transport
        with transport.waiting():
            for _, work in self._receives.values():
                work.wait()
        for rank, (number, _) in self._receives.items():
            payload = self._incoming[rank]
            payload.copy_(transport.block_of(rank, int(number))[: payload.numel()])
            self._sends.append(transport.group.send([number], rank, self._tag + _ACK))

    def close(self) -> None:
        for block, acks in self._acks:
            for work in acks:
                work.wait()
            self._transport.give_back(block)
        for work in self._sends:
            work.wait()
        self._acks, self._sends = [], []
