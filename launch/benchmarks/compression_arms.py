"""The arms of a comparison of all-reduces, as a rank holds them: gloo's, torch's hooks, and ds_recsys's with a compressor."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.compression_methods import POWERSGD_RANK

_SIDE = 1000  # the values come as square matrices, and a vector of what is left


class Values:
    """What is reduced: `tensors`, one after the other in a flat fp32 buffer.

    Attributes:
        mine: fp32 [n], what this rank adds: the same normal values on all ranks times 1, 1, 2, 4, ... by rank.
        total: what `mine` is to be multiplied by to be the sum.
    """

    def __init__(self, count: int, rank: int, world_size: int):
        matrices, rest = divmod(count, _SIDE**2)
        self.tensors = [(f"weight{i}", (_SIDE, _SIDE)) for i in range(matrices)] + [("rest", (rest,))] * bool(rest)
        weight = 2.0 ** max(rank - 1, 0)
        self.mine = torch.randn(count, generator=torch.Generator().manual_seed(0)) * weight
        self.total = 2.0 ** (world_size - 1) / weight

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of the tensors inside `flat`."""
        parts = flat.split([math.prod(shape) for _, shape in self.tensors])
        return [part.view(shape) for part, (_, shape) in zip(parts, self.tensors, strict=True)]

    def errors(self, total: Tensor) -> tuple[float, float]:
        """||r - s||^2 and ||s||^2 - ||r||^2 over ||s||^2 for the sum s and the result r; equal where r is a projection of s."""
        wrong = lost = norm = 0.0
        for result, mine in zip(total.split(_SIDE**2), self.mine.split(_SIDE**2), strict=True):
            exact = mine.double() * self.total
            norm += exact.square().sum().item()
            wrong += (result - exact).square().sum().item()
            lost += (exact.square() - result.double().square()).sum().item()
        return wrong / norm, lost / norm


class AllReduce:
    """gloo's, of the flat fp32 values."""

    choice = None

    def __init__(self, values: Values, buffer: Tensor):
        self._values, self.total = values, buffer
        self.bytes_sent = 0

    def load(self) -> None:
        """Put the values in place; the time of this is not taken."""
        self.total.copy_(self._values.mine)

    def seconds(self) -> float:
        """Of `reduce`, from a barrier on."""
        dist.barrier()
        started = time.perf_counter()
        self.reduce()
        return time.perf_counter() - started

    def reduce(self) -> None:
        dist.all_reduce(self.total)
        self.bytes_sent += ring_bytes(self.total.numel(), 4)


class Compressed(AllReduce):
    """ds_recsys's, error feedback and its commit included."""

    def __init__(self, values: Values, buffer: Tensor, options: dict):
        from ds_recsys.comm.reducer import Reducer

        super().__init__(values, buffer)
        self.reducer = Reducer(dist.group.WORLD, **options)

    def reduce(self) -> None:
        self.reducer.all_reduce(self.total, self._values.tensors)
        self.reducer.commit()
        self.bytes_sent = self.reducer.bytes_sent


def chosen(values: Values, buffer: Tensor) -> AllReduce:
    """What method "auto" comes to on the links as they are now."""
    from ds_recsys.comm.probe import choose
    from ds_recsys.comm.reducer import Reducer

    group = dist.group.WORLD
    choice = choose(group, lambda method: Reducer(group, method), values.mine.numel())
    arm = (
        AllReduce(values, buffer) if choice.method == "none" else Compressed(values, buffer, {"method": choice.method})
    )
    arm.choice = str(choice)
    return arm


class Hook(AllReduce):
    """A communication hook of torch, as it is, on a plain DistributedDataParallel model.

    The model's backward hands out gradients that are there already. Its time is that of the whole backward less that of a
    backward under `no_sync`, taken just before.
    """

    WARMUP = 2  # backwards: the first one is followed by a new arrangement of the buckets
    bucket_mb = None  # torch's default

    def __init__(self, values: Values, buffer: Tensor):
        super().__init__(values, buffer)
        options = {"gradient_as_bucket_view": True, "bucket_cap_mb": self.bucket_mb}
        # all ranks have the same parameters, so none is sent
        self.model = nn.parallel.DistributedDataParallel(_GivenGradients(values), init_sync=False, **options)
        self.register()
        for _ in range(self.WARMUP):
            self.model().backward()

    def register(self) -> None:
        raise NotImplementedError

    def load(self) -> None:
        pass

    def seconds(self) -> float:
        with self.model.no_sync():
            alone = self._backward_seconds()
        seconds = self._backward_seconds() - alone
        grads = torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])
        torch.mul(grads, dist.get_world_size(), out=self.total)  # the hooks average
        return seconds

    def _backward_seconds(self) -> float:
        self.model.zero_grad(set_to_none=False)
        loss = self.model()
        dist.barrier()
        started = time.perf_counter()
        loss.backward()
        return time.perf_counter() - started


class _GivenGradients(nn.Module):
    def __init__(self, values: Values):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _, shape in values.tensors)
        self._gradients = values.split(values.mine)

    def forward(self):
        return _Give.apply(self._gradients, *self.weights)


class _Give(torch.autograd.Function):
    """A zero whose gradient with respect to each weight is what was given."""

    @staticmethod
    def forward(ctx, gradients, *weights):
        ctx.gradients = gradients
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return None, *ctx.gradients


class BFloat16Hook(Hook):
    def register(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        def call(state, bucket):
            return default_hooks.bf16_compress_hook(state, bucket)

        # under its own name DDP refuses this hook wherever there is no NCCL; gloo does sum bf16
        self.model.register_comm_hook(None, call)


class PowerSGDHook(Hook):
    # its second all-reduce starts in a callback: with two buckets on gloo the ranks' orders differ, and the process aborts
    bucket_mb = 10_000

    def register(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        rank, begin = POWERSGD_RANK, self.WARMUP
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=begin)
        self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def ring_bytes(numel: int, bytes_per_value: int) -> int:
    """What a rank sends in a ring all-reduce."""
    size = dist.get_world_size()
    return 2 * (size - 1) * numel * bytes_per_value // size
