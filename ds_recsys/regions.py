"""Where tensor-parallel computing begins and ends, as autograd functions over the ranks of one tensor group.

Between two regions every rank holds the same activations; inside one, each holds its own heads, columns or rows. What
is the identity forward sums its gradients backward, and the other way round (Megatron-LM, section 3,
https://arxiv.org/abs/1909.08053; for sequences https://arxiv.org/abs/2205.05198, section 4.2). With one rank every
function returns its input.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.topology import TensorAxis


def copy_to_region(value: Tensor, axis: TensorAxis) -> Tensor:
    """Enter: the identity; backward sums the ranks' gradients of `value`."""
    return value if axis.size == 1 else _Copy.apply(value, axis)


def reduce_from_region(value: Tensor, axis: TensorAxis) -> Tensor:
    """Leave: the sum of the ranks' partial `value`s; backward is the identity."""
    return value if axis.size == 1 else _Reduce.apply(value, axis)


def gather_from_region(value: Tensor, axis: TensorAxis, sizes: list[int], dim: int = -1) -> Tensor:
    """Leave: the ranks' pieces of `dim`, `sizes` long each, put together; backward keeps this rank's piece."""
    return value if axis.size == 1 else _Gather.apply(value, axis, sizes, dim % value.dim(), False)


def gather_sequence(value: Tensor, axis: TensorAxis) -> Tensor:
    """Enter from a split sequence: [B, S / T, H] -> [B, S, H]; backward sums and keeps this rank's positions."""
    return value if axis.size == 1 else _Gather.apply(value, axis, [value.shape[1]] * axis.size, 1, True)


def reduce_to_sequence(value: Tensor, axis: TensorAxis) -> Tensor:
    """Leave into a split sequence: sum of the ranks' [B, S, H], of which each keeps [B, S / T, H]; backward gathers."""
    return value if axis.size == 1 else _ReduceScatter.apply(value, axis)


def split_sequence(value: Tensor, axis: TensorAxis) -> Tensor:
    """From the same [B, S, H] everywhere to this rank's positions [B, S / T, H]; backward gathers the gradients."""
    return value if axis.size == 1 else _Split.apply(value, axis)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, axis):
        ctx.axis = axis
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return _sum(gradient, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, axis):
        return _sum(value, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, axis, sizes, dim, partial):
        ctx.axis, ctx.sizes, ctx.dim, ctx.partial = axis, sizes, dim, partial
        return _gather(value, axis, sizes, dim)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.partial:
            gradient = _sum(gradient, ctx.axis)
        return _piece(gradient, ctx.axis, ctx.sizes, ctx.dim), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, axis):
        ctx.axis, ctx.sizes = axis, _even(value, axis)
        return _piece(_sum(value, axis), axis, ctx.sizes, 1)

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.axis, ctx.sizes, 1), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, axis):
        ctx.axis, ctx.sizes = axis, _even(value, axis)
        return _piece(value, axis, ctx.sizes, 1)

    @staticmethod
    def backward(ctx, gradient):
        return _gather(gradient, ctx.axis, ctx.sizes, 1), None


def _sum(value: Tensor, axis: TensorAxis) -> Tensor:
    value = value.clone(memory_format=torch.contiguous_format)  # the caller's tensor may be used again
    dist.all_reduce(value, group=axis.group)
    return value


def _gather(value: Tensor, axis: TensorAxis, sizes: list[int], dim: int) -> Tensor:
    value = value.transpose(0, dim)
    short = max(sizes) - len(value)
    if short:  # gloo wants pieces of one size
        value = torch.cat([value, value.new_zeros(short, *value.shape[1:])])
    pieces = [value.new_empty(value.shape) for _ in sizes]
    dist.all_gather(pieces, value.contiguous(), group=axis.group)
    whole = torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])
    return whole.transpose(0, dim).contiguous()


def _piece(value: Tensor, axis: TensorAxis, sizes: list[int], dim: int) -> Tensor:
    return value.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank]).contiguous()


def _even(value: Tensor, axis: TensorAxis) -> list[int]:
    length = value.shape[1]
    if length % axis.size:
        raise ValueError(f"a sequence of {length} positions does not divide by {axis.size} tensor ranks; pad it")
    return [length // axis.size] * axis.size
