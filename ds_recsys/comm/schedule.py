"""Chunks on their way together: whose turn it is, in an order that is fixed, and the memory they use."""

import torch
from torch import Tensor

from ds_recsys.comm.transport import Transport

_CACHE_LINE = 64
_FIRST_TAG = 0x5EC0  # far from the tags that point-to-point traffic of others would use on the group
_PHASES = 4  # at most, of a chunk on one transport


class Slot:
    """The memory of a chunk under way, and the exchanges that use it; the next chunk here uses the same memory."""

    def __init__(self):
        self._memory: Tensor | None = None
        self._exchanges = []

    def take(self, sizes: list[int], device: torch.device) -> list[Tensor]:
        """uint8 [size] for each of `sizes`, once per chunk, when nothing of the chunk before is sent from there any more."""
        self.finish()
        steps = [-(-size // _CACHE_LINE) * _CACHE_LINE for size in sizes]
        if self._memory is None or self._memory.numel() < sum(steps) or self._memory.device != device:
            self._memory = torch.empty(sum(steps), dtype=torch.uint8, device=device)
        taken, place = [], 0
        for size, step in zip(sizes, steps, strict=True):
            taken.append(self._memory[place : place + size])
            place += step
        return taken

    def open(self, transport: Transport, incoming: list[Tensor], chunk: int, phase: int):
        """`transport.open` with a tag of its own."""
        self._exchanges.append(transport.open(incoming, _FIRST_TAG + _PHASES * chunk + phase))
        return self._exchanges[-1]

    def finish(self) -> None:
        """Returns when nothing is being sent from here."""
        for exchange in self._exchanges:
            exchange.close()
        self._exchanges = []


def in_turn(chunks: list, stages: int, depth: int, slots: list[Slot], start) -> None:
    """Take every chunk through its stages, `depth` turns apart, several chunks at a time.

    Args:
        slots: as many as there are, and more are appended as needed.
        start: (index, chunk, slot) -> a generator that yields after each of its stages but the last.
    """
    distance = (stages - 1) * depth
    slots += [Slot() for _ in range(distance + 1 - len(slots))]
    running = []
    for turn in range(len(chunks) + distance):
        if turn < len(chunks):
            running.append(start(turn, chunks[turn], slots[turn % len(slots)]))
        for stage in range(stages):  # the youngest chunk first: its bytes travel while the older ones are waited for
            if 0 <= turn - stage * depth < len(chunks):
                next(running[turn - stage * depth], None)
    for slot in slots:
        slot.finish()
