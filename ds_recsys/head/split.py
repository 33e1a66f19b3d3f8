"""The cross-entropy over a table cut into blocks of rows, one behind the other, each of which may be on another device.

What goes from block to block is one tensor, [B, S, H + C]: the hidden states, and behind them, in C channels, the softmax
of the items so far (the running maximum and sum of https://arxiv.org/abs/1805.02867) and the target. Its "gradient" goes
back the same way. Behind the gradient of the hidden states it holds, in place of derivatives of the channels, the final
maximum and sum and the derivative of each loss: with these a block computes its own part of the gradient of the unsplit
head. A chain of derivatives would come to the same by way of factors that can underflow.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_recsys.head.blocks import Blocks, Exponentials, wide
from ds_recsys.head.shard import IGNORE, HeadShard
from ds_recsys.head.softmax import Softmax, Statistics, losses_of

_TARGET, _MAXIMUM, _TOTAL, _ADDED = range(4)  # forward; the sum of scores follows where labels are smoothed
_FINAL_MAXIMUM, _FINAL_TOTAL, _UPSTREAM = range(3)  # backward
LARGEST_TABLE = 2**24  # rows: fp32 holds their numbers exactly


@dataclass(frozen=True)
class SplitHead:
    """How a head is split.

    Attributes:
        blocks: layers that the rows are cut into.
        label_smoothing: as in F.cross_entropy.
        compute_dtype: as in `linear_cross_entropy`; None: that of the rows, and fp32 in place of fp16.
    """

    blocks: int
    label_smoothing: float = 0.0
    compute_dtype: torch.dtype | None = None

    @property
    def channels(self) -> int:
        return _ADDED + (2 if self.label_smoothing else 1)


def begin(hidden: Tensor, target: Tensor, split: SplitHead) -> Tensor:
    """What the first block is given.

    Args:
        hidden: [..., H].
        target: int64 [...], with IGNORE (-100) where a position has none.

    Returns:
        [..., H + C] in fp32 (fp64 for fp64).
    """
    hidden = hidden.to(wide(hidden.dtype))
    channels = hidden.new_zeros(*target.shape, split.channels)
    channels[..., _TARGET] = target.to(hidden.dtype)
    channels[..., _MAXIMUM] = -torch.inf
    return torch.cat([hidden, channels], -1)


def add_block(carried: Tensor, head: HeadShard, split: SplitHead) -> Tensor:
    """carried [..., H + C] with the items of head's rows added: the same shape. Gradients reach head.weight and head.bias."""
    dtype = split.compute_dtype or (torch.float32 if head.weight.dtype == torch.float16 else head.weight.dtype)
    options = _Options(replace(head, weight=None, bias=None), split.label_smoothing, dtype, torch.is_grad_enabled())
    return _Block.apply(carried, head.weight, head.bias, options)


def targets_of(carried: Tensor, split: SplitHead) -> Tensor:
    """int64 [...], as `begin` was given them."""
    return carried[..., carried.shape[-1] - split.channels + _TARGET].detach().long()


def losses(carried: Tensor, num_rows: int, split: SplitHead) -> Tensor:
    """carried [..., H + C] behind the last block -> [N] in nats, of the positions with a target.

    Raises:
        ValueError: a target outside the table.
    """
    target = targets_of(carried, split)
    outside = (target != IGNORE) & ((target < 0) | (target >= num_rows))
    if outside.any():
        raise ValueError(f"target {target[outside][0].item()} is no row of a table of {num_rows}")
    return _Losses.apply(carried, num_rows, split)


@dataclass(frozen=True)
class _Options:
    head: HeadShard  # without its tensors
    label_smoothing: float
    compute_dtype: torch.dtype
    differentiated: bool


class _Block(torch.autograd.Function):
    """carried [..., H + C], weight [R, H], bias [R] or None -> [..., H + C]."""

    @staticmethod
    def forward(ctx, carried, weight, bias, options):
        head, width = replace(options.head, weight=weight, bias=bias), weight.shape[1]
        flat = carried.reshape(-1, carried.shape[-1])
        kept = (flat[:, width + _TARGET] != IGNORE).nonzero()[:, 0]
        hidden, channels = flat[kept].split([width, flat.shape[1] - width], 1)
        rows, mine = head.local(channels[:, _TARGET].long())
        positions = mine.nonzero()[:, 0]
        rows = rows[positions]
        out = flat.clone()
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = Blocks(hidden, head, options.compute_dtype, None)
            keep = options.differentiated and ctx.needs_input_grad[1] and Exponentials.fit(blocks)
            ctx.exponentials = Exponentials(blocks) if keep else None
            if len(kept):
                before = Statistics(channels[:, _MAXIMUM], channels[:, _TOTAL], channels[:, _ADDED:])
                after = before.after(blocks, positions, rows, ctx.exponentials)
                found = torch.cat(
                    [channels[:, : _TARGET + 1], after.maximum[:, None], after.total[:, None], after.added], 1
                )
                out[kept, width:] = found
        ctx.options, ctx.block_rows = options, blocks.rows
        ctx.save_for_backward(hidden, weight, bias, positions, rows, kept)
        return out.view_as(carried)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, bias, positions, rows, kept = ctx.saved_tensors
        exponentials, ctx.exponentials = ctx.exponentials, None  # the first backward overwrites them
        options, width = ctx.options, weight.shape[1]
        head = replace(options.head, weight=weight, bias=bias)
        flat = gradient.reshape(-1, gradient.shape[-1])
        final = flat[kept, width:]
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = Blocks(hidden, head, options.compute_dtype, ctx.block_rows)
            maximum, total = final[:, _FINAL_MAXIMUM], final[:, _FINAL_TOTAL]
            softmax = Softmax(blocks, maximum, total, positions, rows, options.label_smoothing, exponentials)
            of_hidden, of_weight, of_bias = softmax.gradients(hidden, final[:, _UPSTREAM], ctx.needs_input_grad)
        if of_hidden is not None:
            flat = flat.clone()
            flat[kept, :width] += of_hidden
        return flat.view_as(gradient) if of_hidden is not None else None, of_weight, of_bias, None


class _Losses(torch.autograd.Function):
    """carried [..., H + C] -> losses [N]."""

    @staticmethod
    def forward(ctx, carried, num_rows, split):
        flat = carried.reshape(-1, carried.shape[-1])
        first = flat.shape[1] - split.channels
        kept = (flat[:, first + _TARGET] != IGNORE).nonzero()[:, 0]
        channels = flat[kept, first:]
        statistics = Statistics(channels[:, _MAXIMUM], channels[:, _TOTAL], channels[:, _ADDED:])
        ctx.shape, ctx.first = carried.shape, first
        ctx.save_for_backward(kept, statistics.maximum, statistics.total)
        return losses_of(statistics, num_rows, split.label_smoothing)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        kept, maximum, total = ctx.saved_tensors
        gradient = upstream.new_zeros(ctx.shape)
        flat = gradient.view(-1, ctx.shape[-1])
        flat[kept, ctx.first : ctx.first + 3] = torch.stack([maximum, total, upstream], 1)
        return gradient, None, None
