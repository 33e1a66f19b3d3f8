"""What a replica of mode "async" owes the others and has from them: bookkeeping only, without processes or DeepSpeed.

Asynchronous local SGD by an exchange of changes (https://arxiv.org/abs/2401.09135, https://arxiv.org/abs/1710.06952). With N
replicas, whenever replica i has changed its weights by u and whenever a message goes from i to j:

    theta_i <- theta_i + u,         pending_ij <- pending_ij + u  for every other j
    q = C(pending_ij),              pending_ij <- pending_ij - q,    theta_i <- theta_i - q / N,    theta_j <- theta_j + q / N

So what C leaves out is sent later (exact error feedback), a replica that was away gets all it missed in one message, and a
message moves weight from one replica to another and makes none: with nothing under way, the mean of the replicas' weights is
theta_0 plus the mean over replicas of the sums of their own changes, whatever was sent, when and in which order.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.error_feedback import ErrorFeedback
from ds_recsys.comm.layout import Segment, plan
from ds_recsys.comm.payload import Codec
from ds_recsys.comm.reducer import compressor_of, is_compressed
from ds_recsys.config.compression import Compression

_HEADER = 3  # int64: number of the message, steps of the sender, replicas that share a change
_HEADER_BYTES = 8 * _HEADER


class Format:
    """How a rank's share of a replica is written into a message. The same on the ranks of a data axis.

    Attributes:
        numel: values of the flat buffer.
        message_bytes: of every message.
    """

    def __init__(self, shapes: Sequence[tuple[str, tuple[int, ...]]], options: Compression):
        chosen, segments, offset = compressor_of(options), [], 0
        for name, shape in shapes:
            numel = torch.Size(shape).numel()
            kind = chosen if chosen is not None and is_compressed(options, name, shape) else Float32()
            segments.append(Segment(name, offset, numel, kind))
            offset += numel
        self.numel, self._checksum = offset, options.checksum
        self._feedback = ErrorFeedback(enabled=False)  # the pending changes are the feedback
        (chunk,) = plan(tuple(segments), 1, 1 << 60)
        (self._parts,) = chunk.parts
        self._payload_bytes = chunk.bytes(0)
        self.message_bytes = _HEADER_BYTES + self._codec(torch.empty(0), 0).message_bytes(self._payload_bytes)

    def _codec(self, flat: Tensor, number: int) -> Codec:
        return Codec(flat, self._feedback, number, self._checksum)

    def encode(self, values: Tensor, message: Tensor, header: tuple[int, int, int]) -> None:
        """message uint8 [message_bytes] <- values fp32 [numel]."""
        message[:_HEADER_BYTES].view(torch.int64).copy_(torch.tensor(header))
        self._codec(values, header[0]).encode(self._parts, message[_HEADER_BYTES:])

    def header(self, message: Tensor) -> tuple[int, int, int]:
        return tuple(message[:_HEADER_BYTES].view(torch.int64).tolist())

    def decode(self, message: Tensor, sender: int, out: Tensor) -> None:
        """out fp32 [numel] <- what `message` holds. ChecksumError where it arrived damaged."""
        number = self.header(message)[0]
        codec = self._codec(out, number)
        codec.check(message[_HEADER_BYTES:], sender, number)
        codec.decode(self._parts, message[_HEADER_BYTES:])


class Peer:
    """What a replica knows of another one. All ranks of a replica know the same.

    Attributes:
        pending: fp32 [numel], what the other does not have yet of this replica's changes.
        sent, consumed: messages to it: number sent, number that it has applied.
        applied: messages from it that this replica has applied.
        seen: its step count in the newest of those; `known`: the newest that was heard of.
        told: this replica's step count in the newest message to it; `heard`: in the newest one that it has applied.
    """

    def __init__(self, numel: int):
        self.pending = torch.zeros(numel)
        self.sent = self.consumed = self.applied = 0
        self.seen = self.known = self.told = self.heard = 0

    def counters(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name != "pending"}


class Ledger:
    """One rank's share of replica `own`.

    It takes as many fp32 copies of the weights in the host's memory as there are replicas, and one more.

    Args:
        send_every: steps between two messages to one replica, at least.

    Attributes:
        weights: fp32 [numel], those of this replica when they were last recorded or exchanged.
        steps: that this replica has taken.
        peers: by replica, those that are not lost.
        dropped: changes of how many steps were dropped so far, for being made on weights that were too old.
    """

    def __init__(self, form: Format, weights: Tensor, own: int, replicas: int, max_staleness: int, send_every: int = 1):
        self.form, self.own, self.replicas = form, own, replicas
        self.max_staleness, self.send_every = max_staleness, send_every
        self.weights = weights
        self.peers = {replica: Peer(form.numel) for replica in range(replicas) if replica != own}
        self.steps = self.dropped = 0
        self._scratch = torch.empty(form.numel)

    def record(self, weights: Tensor) -> None:
        """The replica's own steps have led to `weights` by now."""
        change = torch.sub(weights, self.weights, out=self._scratch)
        for peer in self.peers.values():
            peer.pending.add_(change)
        self.weights.copy_(weights)

    def hear(self, replica: int, steps: int, consumed: int) -> None:
        """`replica` has taken `steps` and applied `consumed` of this one's messages."""
        peer = self.peers[replica]
        peer.known = max(peer.known, steps)
        if consumed > peer.consumed:
            peer.consumed, peer.heard = consumed, peer.told

    def may_send(self, replica: int) -> bool:
        """Whether nothing is under way to `replica`, and there are enough steps to tell of."""
        peer = self.peers[replica]
        return peer.sent == peer.consumed and self.steps - peer.told >= self.send_every

    def send(self, replica: int, message: Tensor) -> None:
        """message uint8 [message_bytes] <- what `replica` does not have yet, as the compressor sends it."""
        peer = self.peers[replica]
        denominator = len(self.peers) + 1
        self.form.encode(peer.pending, message, (peer.sent + 1, self.steps, denominator))
        self.form.decode(message, self.own, self._scratch)
        peer.pending.sub_(self._scratch)
        self.weights.sub_(self._scratch, alpha=1 / denominator)
        peer.sent, peer.told = peer.sent + 1, self.steps

    def apply(self, replica: int, message: Tensor) -> None:
        """Take what `replica` has sent."""
        peer = self.peers[replica]
        number, steps, denominator = self.form.header(message)
        assert number == peer.applied + 1, f"message {number} of replica {replica} came after {peer.applied}"
        self.form.decode(message, replica, self._scratch)
        self.weights.add_(self._scratch, alpha=1 / denominator)
        peer.applied, peer.seen, peer.known = number, steps, max(peer.known, steps)

    def silent(self, replica: int) -> bool:
        """Whether `replica` has applied nothing of this one's last `max_staleness` steps."""
        return self.steps - self.peers[replica].heard > self.max_staleness

    def behind(self) -> int:
        """By how many steps the weights are too old: what most of the others have taken since they were last heard; 0: not.

        Of two replicas that were cut off from each other neither is behind.
        """
        gaps = sorted(peer.known - peer.seen for peer in self.peers.values())
        late = [gap for gap in gaps if gap > self.max_staleness]
        if 2 * len(late) <= len(gaps) or (len(gaps) == 1 and self.silent(next(iter(self.peers)))):
            return 0
        return late[0]

    def drop(self) -> int:
        """Take back what no other replica has of this one's changes; the steps that were made since."""
        if not self.peers:
            return 0
        best = max(self.peers.values(), key=lambda peer: peer.told)
        steps, own = self.steps - best.told, best.pending.clone()
        self.weights.sub_(own)
        for peer in self.peers.values():
            peer.pending.sub_(own)
        self.dropped += steps
        return steps

    def lose(self, replica: int, under_way: Tensor | None) -> None:
        """`replica` is lost, perhaps before it took the message that is `under_way`: this replica keeps what it holds."""
        peer = self.peers.pop(replica)
        if under_way is not None and peer.sent > peer.consumed:
            self.form.decode(under_way, self.own, self._scratch)
            self.weights.add_(self._scratch, alpha=1 / self.form.header(under_way)[2])

    def settle(self) -> None:
        """All replicas have applied all messages."""
        for peer in self.peers.values():
            if peer.sent > peer.consumed:
                peer.consumed, peer.heard = peer.sent, peer.told

    def adopt(self, weights: Tensor) -> None:
        """All replicas hold `weights` now, and owe each other nothing."""
        self.weights.copy_(weights)
        for peer in self.peers.values():
            peer.pending.zero_()
            peer.seen, peer.told, peer.heard = peer.known, self.steps, self.steps

    def state_dict(self) -> dict:
        """Of a replica without messages under way: tensors and numbers, without the weights."""
        return {
            "steps": self.steps,
            "dropped": self.dropped,
            "pending": {replica: peer.pending for replica, peer in self.peers.items()},
            "counters": {replica: peer.counters() for replica, peer in self.peers.items()},
        }

    def load_state_dict(self, state: dict, weights: Tensor) -> None:
        """Go on from `state_dict()`."""
        self.steps, self.dropped = state["steps"], state["dropped"]
        self.weights.copy_(weights)
        for replica, peer in self.peers.items():
            peer.pending.copy_(state["pending"][replica])
            vars(peer).update(state["counters"][replica])

    def restart(self, weights: Tensor, steps: int) -> None:
        """Begin from `weights`, which all replicas hold, after `steps`."""
        self.peers = {replica: Peer(self.form.numel) for replica in self.peers}
        self.steps = steps
        self.weights.copy_(weights)
        for peer in self.peers.values():
            peer.known = peer.seen = peer.told = peer.heard = steps


def mean_in_order(weights: Iterable[Tensor]) -> Tensor:
    """The mean of flat weights, added up one after the other, so that no bit depends on where a value stands in them."""
    weights = list(weights)
    total = weights[0].clone()
    for other in weights[1:]:
        total += other
    return total.div_(len(weights))
