"""The sum over ranks of compressed gradients: to owners and back, or straight to everyone where that sends no more bytes."""

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.layout import Chunk, Part, plan, plan_owned
from ds_recsys.comm.payload import Codec, all_finite
from ds_recsys.comm.schedule import Slot, in_turn
from ds_recsys.comm.transport import Transport

CHUNK_BYTES = 512 * 1024
DEPTH = 2
PLANS_KEPT = 64


def gathers(ranks: int) -> bool:
    """Whether each rank sends its whole payload to all others, rather than parts to owners who send back their sums.

    Of a payload of p bytes that is (N-1) p against 2 (N-1)/N p. It has no second error, so it wins a draw.
    """
    return ranks - 1 <= 2 * (ranks - 1) / ranks


class Aggregator:
    """Sums flat fp32 buffers over the ranks of the transport's group, as the segments' compressors send them.

    Every payload is decoded in rank order, one's own too, so the sums are the same bit for bit on all ranks, and a tensor's
    sum does not depend on what else is in the buffer. A NaN or an infinity on one rank becomes a NaN on all, in its block.
    With one rank nothing is sent and the buffer stays as it is.

    Bytes sent by each of N ranks, of a payload of p bytes: 2 (N-1)/N p in two phases, p with two ranks, (N-1)/N p in
    `reduce_to_owners`; 4 more per message with checksums. In two phases an owner of a share f of the values sends and
    receives (1 + (N-2) f) p: p at least, with f = 0, for a rank on a slow link.

    Args:
        transport: see `transport_for`.
        feedback: an `ErrorFeedback`; asked for what is encoded with loss only.
        chunk_bytes: about the largest message. While one chunk travels the next is encoded and the one before decoded.
        depth: chunks that are under way together in each phase.
        checksum: whether a crc32 is sent with every message, and checked.
        shares: by rank, of the values that it sums for all in two phases, in proportion; None is equal shares.
    """

    def __init__(
        self,
        transport: Transport,
        feedback,
        chunk_bytes: int = CHUNK_BYTES,
        depth: int = DEPTH,
        checksum: bool = False,
        shares: tuple[float, ...] | None = None,
    ):
        self.transport, self.feedback = transport, feedback
        self.chunk_bytes, self.depth, self.checksum, self.shares = chunk_bytes, depth, checksum, shares
        self._plan, self._plan_owned = (functools.lru_cache(PLANS_KEPT)(one) for one in (plan, plan_owned))
        self._slots: list[Slot] = []

    @torch.no_grad()
    def all_reduce(self, flat: Tensor, segments, step: int) -> bool:
        """flat <- the sum over ranks of what each sent of it; values outside `segments` stay.

        Args:
            flat: fp32 [n], contiguous.
            segments: list of Segment, disjoint, the same on all ranks.
            step: the same on all ranks; seeds what is random.

        Returns:
            Whether every value that this rank encoded was finite.

        Raises:
            ChecksumError: a payload arrived damaged; the process group is of no use then.
        """
        ranks = self.transport.size
        codec = Codec(flat, self.feedback, step, self.checksum)
        if ranks == 1:
            return all_finite(flat, segments)
        if gathers(ranks):
            chunks = self._plan(tuple(segments), 1, self.chunk_bytes)
            self._run(3, chunks, lambda *chunk: gather(*chunk, codec, self.transport))
        else:
            chunks = self._plan(tuple(segments), ranks, self.chunk_bytes, self.shares)
            self._run(4, chunks, lambda *chunk: two_phase(*chunk, codec, self.transport))
        return codec.finite

    @torch.no_grad()
    def reduce_to_owners(self, flat: Tensor, segments, ranges: list[list[tuple[int, int]]], step: int) -> bool:
        """As `all_reduce`, the first phase alone: only this rank's ranges of `flat` hold sums afterwards, the rest anything.

        Args:
            ranges: by rank, the [first, last) places in `flat` that it wants; the same on all ranks.
        """
        codec = Codec(flat, self.feedback, step, self.checksum)
        if self.transport.size == 1:
            return all_finite(flat, segments)
        chunks = self._plan_owned(tuple(segments), tuple(map(tuple, ranges)), self.chunk_bytes)
        # The block of a shared part is encoded for its other owner too, perhaps later: its sum must not be there yet.
        sums = {
            part: flat.new_empty(part.numel)
            for chunk in chunks
            for part in chunk.parts[self.transport.rank]
            if part.shared
        }
        self._run(3, chunks, lambda *chunk: one_phase(*chunk, codec, self.transport, sums))
        for part, values in sums.items():
            for first, last in ranges[self.transport.rank]:
                first, last = max(first, part.offset), min(last, part.offset + part.numel)
                if first < last:
                    flat[first:last] = values[first - part.offset : last - part.offset]
        return codec.finite

    def _run(self, stages: int, chunks: list[Chunk], start) -> None:
        in_turn(chunks, stages, self.depth, self._slots, start)


class BackendSum:
    """The sum of dense buffers by the backend's own all-reduce, the same bits on all ranks; without checksums."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.transport = group, Transport(group)

    def all_reduce(self, flat: Tensor, segments, step: int) -> bool:
        """As `Aggregator.all_reduce`, of segments that fill `flat` and are sent as they are."""
        finite, ranks = bool(flat.isfinite().all()), self.transport.size
        dist.all_reduce(flat, group=self.group)
        self.transport.bytes_sent += 8 * (ranks - 1) * flat.numel() // ranks
        return finite


def gather(index: int, chunk: Chunk, slot: Slot, codec: Codec, transport: Transport):
    """Stages of a chunk that everyone sends to everyone."""
    (parts,), size = chunk.parts, codec.message_bytes(chunk.bytes(0))
    messages = slot.take([size] * transport.size, codec.flat.device)
    exchange = slot.open(transport, messages, index, 0)
    yield
    codec.encode(parts, messages[transport.rank], codec.feedback.worker)
    exchange.spread(messages[transport.rank])
    yield
    exchange.wait()
    sum_up(parts, messages, codec, index)


def two_phase(index: int, chunk: Chunk, slot: Slot, codec: Codec, transport: Transport):
    """Stages of a chunk whose owners sum it and send their sums to everyone."""
    rank, sizes = transport.rank, [codec.message_bytes(size) for size in chunk.sizes]
    buffers = slot.take([sizes[rank]] * transport.size + sizes + sizes, codec.flat.device)
    incoming, outgoing, answers = (buffers[i * transport.size :][: transport.size] for i in range(3))
    outgoing[rank] = incoming[rank]
    there, back = (slot.open(transport, messages, index, phase) for phase, messages in enumerate((incoming, answers)))
    yield
    for parts, message in zip(chunk.parts, outgoing, strict=True):
        codec.encode(parts, message, codec.feedback.worker)
    there.send(outgoing)
    yield
    there.wait()
    answer(chunk.parts[rank], incoming, answers[rank], codec, index)
    back.spread(answers[rank])
    yield
    back.wait()
    for owner, (parts, message) in enumerate(zip(chunk.parts, answers, strict=True)):
        codec.check(message, owner, index)
        codec.decode(parts, message, last=True)


def one_phase(index: int, chunk: Chunk, slot: Slot, codec: Codec, transport: Transport, shared: dict[Part, Tensor]):
    """Stages of a chunk whose owners keep their sums; those of shared parts go to `shared`."""
    rank, sizes = transport.rank, [codec.message_bytes(size) for size in chunk.sizes]
    buffers = slot.take([sizes[rank]] * transport.size + sizes, codec.flat.device)
    incoming, outgoing = buffers[: transport.size], buffers[transport.size :]
    outgoing[rank] = incoming[rank]
    exchange = slot.open(transport, incoming, index, 0)
    yield
    for parts, message in zip(chunk.parts, outgoing, strict=True):
        codec.encode(parts, message, codec.feedback.worker)
    exchange.send(outgoing)
    yield
    exchange.wait()
    sum_up(chunk.parts[rank], incoming, codec, index, shared)


def answer(parts, messages: list[Tensor], message: Tensor, codec: Codec, index: int) -> None:
    """message <- the sum of what the ranks' messages hold of `parts`, in rank order, for everyone to decode."""
    for sender, one in enumerate(messages):
        codec.check(one, sender, index)
    codec.recode(parts, messages, message, codec.feedback.server)


def sum_up(parts, messages: list[Tensor], codec: Codec, index: int, shared=None) -> None:
    """`flat` <- the sum of what the ranks' messages hold of `parts`, in rank order; shared parts go to `shared`."""
    for sender, message in enumerate(messages):
        codec.check(message, sender, index)
    codec.sum(parts, messages, shared)
