"""The sum over ranks where some share a host: fp32 within a host, compressed between the hosts, so that their links carry less.

A host's L ranks sum their values among themselves and send 1/L of the sums each, to the ranks of the other hosts in the same
place: of N ranks on H hosts a host's link carries 2 (H-1)/H payloads, or H - 1 of them with two hosts, where a flat
two-phase sum sends 2 L (N-L)/N over it (https://arxiv.org/abs/1909.05020 has the scheme for dense gradients).
"""

import functools
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.aggregation import PLANS_KEPT, answer, gathers, sum_up
from ds_recsys.comm.layout import Chunk, Part, plan
from ds_recsys.comm.payload import Codec
from ds_recsys.comm.schedule import Slot, in_turn
from ds_recsys.comm.transport import Transport

CHUNK_BYTES = 1024 * 1024  # of a message between hosts; the messages within one are several times as large
DEPTH = 1


def neighbours(hosts: list[int], rank: int) -> tuple[list[int], list[int]]:
    """The ranks on `rank`'s host, and the ranks that have its place on the other hosts; both with itself, in rank order.

    Args:
        hosts: of each rank of the group, the number of its host.

    Raises:
        ValueError: fewer than two hosts or ranks on a host, or not equally many ranks on all hosts.
    """
    counts = Counter(hosts)
    if len(counts) < 2 or len(set(counts.values())) > 1 or counts[hosts[0]] < 2:
        raise ValueError(
            f"a hierarchical sum needs two or more hosts with equally many ranks, two or more; not {hosts}"
        )
    places = [hosts[:one].count(host) for one, host in enumerate(hosts)]
    return (
        [one for one, host in enumerate(hosts) if host == hosts[rank]],
        [one for one, place in enumerate(places) if place == places[rank]],
    )


def subgroups(hosts: list[int], group: dist.ProcessGroup | None = None):
    """The process groups of `neighbours` for this rank of `group`; called by all its ranks, and only these."""
    ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
    return tuple(
        dist.new_group([ranks[one] for one in members], use_local_synchronization=True)
        for members in neighbours(hosts, dist.get_rank(group))
    )


class HierarchicalAggregator:
    """As `Aggregator`, its `all_reduce` alone; error feedback and errors are those of the sums between hosts.

    A host's sum is rounded to fp32 before it is encoded, so the results differ in rounding from a flat sum's.

    Args:
        local, across: transports of the two groups of `subgroups`.
        shares: by host, in proportion; see `Aggregator`.
    """

    def __init__(
        self,
        local: Transport,
        across: Transport,
        feedback,
        chunk_bytes: int = CHUNK_BYTES,
        depth: int = DEPTH,
        checksum: bool = False,
        shares: tuple[float, ...] | None = None,
    ):
        self.local, self.across, self.feedback = local, across, feedback
        self.chunk_bytes, self.depth, self.checksum = chunk_bytes, depth, checksum
        self._plan, self._shares = functools.lru_cache(PLANS_KEPT)(plan), shares
        self._slots: list[Slot] = []

    @torch.no_grad()
    def all_reduce(self, flat: Tensor, segments, step: int) -> bool:
        """See `Aggregator.all_reduce`; what it returns is about the host's sums that this rank encoded."""
        owners = 1 if gathers(self.across.size) else self.across.size
        shares = self._shares * self.local.size if self._shares and owners > 1 else None
        chunks = self._plan(tuple(segments), self.local.size * owners, self.chunk_bytes, shares)
        codec = Codec(flat, self.feedback, step, self.checksum)
        stages = 5 if owners == 1 else 6
        in_turn(chunks, stages, self.depth, self._slots, lambda *chunk: self._stages(*chunk, codec, owners))
        return codec.finite

    def _stages(self, index: int, chunk: Chunk, slot: Slot, codec: Codec, owners: int):
        local, across, place = self.local, self.across, self.local.rank
        pieces = [chunk.parts[one * owners :][:owners] for one in range(local.size)]
        mine, spans = pieces[place], [_spans(piece) for piece in pieces]
        numel = sum(last - first for first, last in spans[place])
        # One message per owner; where all send to all, each host's message holds the whole piece.
        sizes = [
            [codec.message_bytes(size) for size in chunk.sizes[one * owners :][:owners]] * (across.size // owners)
            for one in range(local.size)
        ]
        taken = slot.take(
            [4 * numel] * local.size
            + [sum(one) for one in sizes]
            + [sizes[place][across.rank]] * across.size * (owners > 1)
            + sizes[place] * (owners > 1),
            codec.flat.device,
        )
        terms, packed, rest = taken[: local.size], taken[local.size : 2 * local.size], taken[2 * local.size :]
        incoming, outgoing = rest[: across.size], rest[across.size :]
        messages = [list(one.split(lengths)) for one, lengths in zip(packed, sizes, strict=True)]
        inwards = slot.open(local, terms, index, 0)
        reduce = slot.open(across, incoming, index, 0) if owners > 1 else None
        outcome = slot.open(across, messages[place], index, 1)
        outwards = slot.open(local, packed, index, 1)
        yield
        inwards.send([_bytes_of(codec.flat, one) for one in spans])
        yield
        inwards.wait()
        _sum_in_order(codec.flat, spans[place], terms, place)
        if reduce is None:
            codec.encode(mine[0], messages[place][across.rank], codec.feedback.worker)
        else:
            outgoing[across.rank] = incoming[across.rank]
            for parts, message in zip(mine, outgoing, strict=True):
                codec.encode(parts, message, codec.feedback.worker)
            reduce.send(outgoing)
            yield
            reduce.wait()
            answer(mine[across.rank], incoming, messages[place][across.rank], codec, index)
        outcome.spread(messages[place][across.rank])
        yield
        outcome.wait()
        outwards.spread(packed[place])
        self._decode(index, mine, messages[place], codec)
        yield
        outwards.wait()
        inwards.close()  # it sent from `flat` itself
        for one, (piece, held) in enumerate(zip(pieces, messages, strict=True)):
            if one != place:
                self._decode(index, piece, held, codec)

    def _decode(self, index: int, piece, messages: list[Tensor], codec: Codec) -> None:
        if len(piece) == 1:
            sum_up(piece[0], messages, codec, index)
            return
        for owner, (parts, message) in enumerate(zip(piece, messages, strict=True)):
            codec.check(message, owner, index)
            codec.decode(parts, message, last=True)


def _spans(piece: tuple[tuple[Part, ...], ...]) -> list[tuple[int, int]]:
    """The [first, last) places in the flat buffer of a piece's parts, joined where they touch."""
    spans = []
    for part in (part for parts in piece for part in parts):
        if spans and spans[-1][1] == part.offset:
            spans[-1] = (spans[-1][0], part.offset + part.numel)
        else:
            spans.append((part.offset, part.offset + part.numel))
    return spans


def _bytes_of(flat: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """uint8 [4n]: the values at `spans`; the buffer's own memory where they lie together."""
    values = [flat[first:last] for first, last in spans]
    return (values[0] if len(values) == 1 else torch.cat([flat[:0], *values])).view(torch.uint8)


def _sum_in_order(flat: Tensor, spans: list[tuple[int, int]], terms: list[Tensor], rank: int) -> None:
    """flat <- the sum in rank order of `terms`, fp32 as bytes, where this rank's own is still in `flat`."""
    start = 0
    for first, last in spans:
        own, stop = flat[first:last], start + 4 * (last - first)
        values = [own if one == rank else term[start:stop].view(torch.float32) for one, term in enumerate(terms)]
        total = values[0]
        for one, value in enumerate(values[1:], 1):
            total = torch.add(total, value, out=own if one >= rank else values[0])
        start = stop
