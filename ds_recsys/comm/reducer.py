"""`Reducer`: the compressed sum of flat gradient buffers over a data-parallel group, with all that lasts from step to step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.comm.aggregation import Aggregator, BackendSum
from ds_recsys.comm.compressors import compressor
from ds_recsys.comm.compressors.dense import Float32
from ds_recsys.comm.error_feedback import ErrorFeedback
from ds_recsys.comm.hierarchical import HierarchicalAggregator, subgroups
from ds_recsys.comm.hosts import shared_hosts
from ds_recsys.comm.layout import Segment
from ds_recsys.comm.low_rank import LowRank, factor_bytes
from ds_recsys.comm.momentum import MomentumCorrection
from ds_recsys.comm.shared_memory import local_transport_for
from ds_recsys.comm.transport import transport_for
from ds_recsys.config.compression import Compression
from ds_recsys.errors import UserError

_WARMUP_LEVELS = 5
_WARMUP_RATIO = 0.25  # of the first level, as in Deep Gradient Compression
_SAMPLE_EVERY = 100  # steps between two measurements of the compression error

TensorShape = tuple[str, tuple[int, ...]]  # a parameter's name and its gradient's shape


@dataclass
class Totals:
    """What a rank's reductions came to so far.

    Attributes:
        dense_bytes: that a ring all-reduce of the same fp32 gradients would have sent, 2 (N-1)/N x 4 bytes a value.
        seconds: in reductions, in the background or not.
        errors: (norm of what was not sent / norm of the gradients) of the steps that were sampled.
    """

    steps: int = 0
    skipped: int = 0
    dense_bytes: float = 0.0
    sent_bytes: int = 0
    seconds: float = 0.0
    errors: list[float] = field(default_factory=list)


class Reducer:
    """Sums gradients over `group`, compressed by one method, with error feedback.

    Matrices of at least `min_elements` values are compressed; vectors, smaller tensors and LoRA's are sent as fp32. A
    step's calls end with `commit()`, or with `discard()` where the optimizer skips the step.

    Args:
        group: its ranks all make the same calls in the same order.
        method: see `ds_recsys.config.compression.Compression`; not "auto", which `probe.choose` resolves.
        hosts: the host of each rank of the group, as anything that compares; None finds out.
        in_rank_order: whether values are added in the order of the ranks, so that copies of a tensor which other groups
            sum, at other places of their buffers, get the same bits. Without it the backend sums what is not compressed,
            which takes half of the processor's time.
        options: the other keys of that block.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        method: str = "int8",
        *,
        hosts: Sequence | None = None,
        in_rank_order: bool = True,
        **options,
    ):
        self.options = Compression(method=method, **options)
        if method == "auto":
            raise ValueError('"auto" is resolved before: ds_recsys.comm.probe.choose')
        self.group, self.device = group, _device(group)
        self.feedback = ErrorFeedback(self.options.error_feedback, self.device)
        self.totals, self.step, self.finite = Totals(), 0, True
        keywords = {"checksum": self.options.checksum}
        shares = owned(self.options, dist.get_world_size(group))
        self._flat = self._aggregator = Aggregator(transport_for(group), self.feedback, **keywords, shares=shares)
        # momentum correction reads each rank's own error
        hierarchical = False if self.options.momentum else self.options.hierarchical
        hosts = shared_hosts(group, hierarchical, hosts)
        self.hierarchical = hosts is not None
        if self.hierarchical:
            local, across = subgroups(hosts, group)
            local = local_transport_for(local)
            if shares:
                shares = tuple(
                    sum(s for s, on in zip(shares, hosts, strict=True) if on == host) for host in dict.fromkeys(hosts)
                )
            keywords["shares"] = shares
            self._aggregator = HierarchicalAggregator(local, transport_for(across), self.feedback, **keywords)
        elif method == "none" and not in_rank_order:
            self._flat = self._aggregator = BackendSum(group)
        self._ranks = dist.get_world_size(group)
        self._low_rank = LowRank(self.options.rank, self.feedback) if method == "powersgd" else None
        self._momentum = MomentumCorrection(self.options.momentum, self.feedback) if self.options.momentum else None
        self._sample = 0.0, 0.0  # norms of what was not sent and of the gradients, of this step so far
        self._layouts: dict[tuple, tuple[list[Segment], list]] = {}

    @property
    def bytes_sent(self) -> int:
        """By this rank, so far."""
        transports = {self._flat.transport}
        if self.hierarchical:
            transports |= {self._aggregator.local, self._aggregator.across}
        return sum(transport.bytes_sent for transport in transports)

    def all_reduce(self, flat: Tensor, tensors: Sequence[TensorShape]) -> None:
        """flat <- its sum over the ranks, as it was sent.

        Args:
            flat: floating point [n]; what is sent is computed in fp32.
            tensors: (name, shape) of the gradients in it, one after the other.
        """
        self._reduce(flat, tuple(tensors), self._aggregator.all_reduce)

    def reduce_to_owners(self, flat: Tensor, tensors: Sequence[TensorShape], ranges: Sequence[tuple]) -> None:
        """As `all_reduce`, for ranks that each need a share of the sum: half the bytes. The rest of `flat` is undefined.

        Args:
            ranges: (start, end, ranks of the group that need flat[start:end]).
        """
        wanted = [[(start, end) for start, end, owners in ranges if rank in owners] for rank in range(self._ranks)]

        def reduce(values: Tensor, segments: list[Segment], step: int) -> bool:
            return self._flat.reduce_to_owners(values, segments, wanted, step)

        self._reduce(flat, tuple(tensors), reduce)

    @torch.no_grad()
    def _reduce(self, flat: Tensor, tensors: tuple, reduce) -> None:
        begin = time.perf_counter()
        values = flat if flat.dtype == torch.float32 and flat.is_contiguous() else flat.float().contiguous()
        segments, matrices = self._layout(tensors)
        lossy = [s for s in segments if s.compressor.contraction(s.numel)] + [segment for segment, _ in matrices]
        if self._momentum:
            self._momentum.apply(values, lossy)
        sampled = self._sampled(values, lossy) if self.step % _SAMPLE_EVERY == 0 else 0.0
        if matrices:
            self.finite &= self._low_rank.all_reduce(values, matrices, self._aggregator, self.step)
        if segments:
            self.finite &= reduce(values, segments, self.step)
        if sampled:
            self._sample = math.hypot(self._sample[0], self._staged_norm(lossy)), math.hypot(self._sample[1], sampled)
        if values is not flat:
            flat.copy_(values)
        self.totals.dense_bytes += 8 * (self._ranks - 1) / self._ranks * flat.numel()
        self.totals.sent_bytes = self.bytes_sent
        self.totals.seconds += time.perf_counter() - begin

    def _layout(self, tensors: tuple) -> tuple[list[Segment], list]:
        """The segments of a buffer, and of PowerSGD (segment, shape) of each matrix; found once for each warm-up level."""
        level = self._level()
        if (tensors, level) not in self._layouts:
            chosen, segments, matrices, offset = self._compressor(level), [], [], 0
            for name, shape in tensors:
                numel = math.prod(shape)
                compressed = chosen is not None and is_compressed(self.options, name, shape)
                if compressed and self._low_rank and factor_bytes(self.options.rank, shape) < 4 * numel:
                    matrices.append((Segment(name, offset, numel, Float32()), shape))
                else:
                    compressed = compressed and not self._low_rank
                    segments.append(Segment(name, offset, numel, chosen if compressed else Float32()))
                offset += numel
            self._layouts[(tensors, level)] = segments, matrices
        return self._layouts[(tensors, level)]

    def _level(self) -> int:
        """0 to _WARMUP_LEVELS - 1 during the warm-up, then _WARMUP_LEVELS."""
        if self.step >= self.options.warmup_steps:
            return _WARMUP_LEVELS
        return self.step * _WARMUP_LEVELS // self.options.warmup_steps

    def _compressor(self, level: int):
        """None for dense. PowerSGD's is a placeholder: a matrix's factors are sent as fp32."""
        options = self.options
        ratio = options.ratio
        if level < _WARMUP_LEVELS:
            if options.warmup == "dense":
                return None
            ratio = max(ratio, _WARMUP_RATIO * (ratio / _WARMUP_RATIO) ** (level / _WARMUP_LEVELS))
        return compressor_of(options, ratio)

    def _sampled(self, values: Tensor, segments: list[Segment]) -> float:
        """Norm of the gradients that lose something; 0 where nothing does."""
        norm = math.hypot(*(_norm(values[s.offset : s.offset + s.numel]) for s in segments))
        return norm if math.isfinite(norm) else 0.0

    def _staged_norm(self, segments: list[Segment]) -> float:
        names = {segment.name for segment in segments}
        return math.hypot(*(_norm(e) for (_, name, *_), (_, e) in self.feedback.errors().items() if name in names))

    def commit(self) -> None:
        """The step took place."""
        for state in self._states():
            state.commit()
        self.totals.steps += 1
        error, gradient = self._sample
        if gradient and self.options.error_feedback:
            self.totals.errors.append(error / gradient)
        self._next_step()

    def discard(self) -> None:
        """The optimizer skipped the step: what error feedback keeps is as before it."""
        for state in self._states():
            state.discard()
        self.totals.skipped += 1
        self._next_step()

    def _states(self) -> list:
        """Momentum first: it reads the errors that feedback has staged."""
        return [state for state in (self._momentum, self._low_rank, self.feedback) if state is not None]

    def _next_step(self) -> None:
        self.step, self.finite, self._sample = self.step + 1, True, (0.0, 0.0)

    def state_dict(self) -> dict:
        """Everything that the next step depends on; tensors and numbers."""
        return {
            "step": self.step,
            "residuals": self.feedback.state_dict(),
            "factors": self._low_rank.state_dict() if self._low_rank else {},
            "velocities": self._momentum.state_dict() if self._momentum else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict()`."""
        self.step, self.finite = state["step"], True
        self.feedback.load_state_dict(state["residuals"])
        if self._low_rank:
            self._low_rank.load_state_dict(state["factors"])
        if self._momentum:
            self._momentum.load_state_dict(state["velocities"])


def owned(options: Compression, ranks: int) -> tuple[float, ...] | None:
    """What each rank of a group of `ranks` sums for all, where the block says so.

    Raises:
        UserError: it says so for another number of ranks.
    """
    if options.owner_shares is None:
        return None
    if len(options.owner_shares) != ranks:
        raise UserError(
            f'"owner_shares" has {len(options.owner_shares)} number(s), the data axis {ranks} replica(s); give one to each, or '
            "leave it out"
        )
    return tuple(options.owner_shares)


def is_compressed(options: Compression, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix that the method takes, rather than sent as fp32."""
    return len(shape) > 1 and math.prod(shape) >= options.min_elements and "lora_" not in name


def value_bytes(options: Compression, name: str, shape: tuple[int, ...]) -> float:
    """Bytes of a value of a gradient as a rank sends it once, when what warms up has."""
    numel = math.prod(shape)
    if options.method == "none" or not is_compressed(options, name, shape):
        return 4.0
    if options.method == "powersgd":
        return min(4.0, factor_bytes(options.rank, shape) / numel)
    return compressor_of(options).wire_bytes(numel) / numel


def compressor_of(options: Compression, ratio: float | None = None):
    """The compressor that a block asks for, with another `ratio` than its own; None for method "none".

    PowerSGD's is a placeholder: a matrix's factors are sent as fp32.
    """
    if options.method == "none":
        return None
    if options.method == "powersgd":
        return Float32()
    keywords = {
        "int4": {"rotate": options.rotate},
        "topk": {"ratio": ratio or options.ratio, "values": options.values},
        "randomk": {"ratio": ratio or options.ratio},
    }
    return compressor(options.method, **keywords.get(options.method, {}))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _device(group) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
