"""Cross-entropy over a catalogue whose scores are never held: blocks of items, on every tensor rank its own rows."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_recsys.head.blocks import Blocks, Exponentials
from ds_recsys.head.kernels import choose, summed_loss
from ds_recsys.head.reductions import combine
from ds_recsys.head.shard import IGNORE, HeadShard
from ds_recsys.head.softmax import Softmax, Statistics, losses_of


def linear_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    head: HeadShard,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "sum",
    compute_dtype: torch.dtype | None = None,
    block_rows: int | None = None,
    kernel: str = "torch",
) -> Tensor:
    """F.cross_entropy of all the head's scores with the targets, without the scores [N, I + 1] in memory.

    The scores of a block of items are computed, reduced to a running maximum and sum per position (online softmax,
    https://arxiv.org/abs/1805.02867) and computed again in the backward, where the block's gradient of the table is
    written once. Ranks send one MAX and one SUM of [N] floats in the forward, and in the backward one SUM of the hidden
    states' gradient while the last block's table gradient is computed.

    With N <= H in fp32 or fp64 and no soft cap, nothing is computed twice: the table's gradient, which has to exist in the
    end, is allocated in the forward and holds the exponentials until each block's gradient takes their place. It then
    lives from forward to backward; `torch.no_grad` or a frozen table keep nothing.

    Args:
        hidden: [..., H] fp32, fp64, bf16 or fp16, the same on every rank of head.axis. So is its gradient.
        target: int64 [...], item ids of the whole table; IGNORE (-100) drops a position.
        head: this rank's rows; of any number, also none. Gradients reach head.weight and head.bias.
        label_smoothing: as in F.cross_entropy, spread over all rows of the table.
        reduction: "sum"; "mean" over the positions not dropped, 0 if there are none; "none" -> the shape of `target`.
        compute_dtype: of the operands of matrix products: float32, float64 or bfloat16; sums, exponentials and the
            hidden states' gradient are fp32 (fp64) in any case. None: autocast's, or what hidden and weight promote to,
            and fp32 in place of fp16, whose range the probabilities of a large catalogue leave.
        block_rows: items in a block; None: chosen for the device.
        kernel: "torch" is the code of this file; "liger" or "cce" that library's, see `kernels`, for which compute_dtype
            and block_rows mean nothing; "auto" the first of these that is installed and fits, else "torch".

    Returns:
        fp32 (fp64 for fp64), the same on every rank.

    Raises:
        ValueError: a target outside the table, shapes or options that do not fit.
    """
    _check(hidden, target, head, label_smoothing, reduction)
    shape, target = target.shape, target.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    kept = (target != IGNORE).nonzero()[:, 0]  # before any collective: the same on every rank
    if len(kept) < len(target):
        hidden, target = hidden[kept], target[kept]
    outside = (target < 0) | (target >= head.num_rows)
    if outside.any():
        raise ValueError(f"target {target[outside][0].item()} is no row of a table of {head.num_rows}")
    if head.cosine:
        hidden = F.normalize(hidden, dim=-1)
    dtype = _compute_dtype(hidden, head.weight) if compute_dtype is None else compute_dtype
    if dtype == torch.float16:
        raise ValueError("compute_dtype float16 would lose small probabilities; use bfloat16 or float32")
    options = _Options(
        replace(head, weight=None, bias=None), label_smoothing, dtype, block_rows, torch.is_grad_enabled()
    )
    library = choose(kernel, hidden, head, label_smoothing, reduction)
    if library != "torch" and len(kept):
        loss = summed_loss(library, hidden, target, head, label_smoothing)
        return loss / len(kept) if reduction == "mean" else loss
    losses = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, target, options)
    if reduction == "none":
        return losses.new_zeros(math.prod(shape)).index_copy(0, kept, losses).view(shape)
    return losses.sum() / max(len(kept), 1) if reduction == "mean" else losses.sum()


def _check(hidden, target, head, label_smoothing, reduction) -> None:
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction "{reduction}" is none of "sum", "mean", "none"')
    if hidden.shape[:-1] != target.shape or hidden.shape[-1] != head.weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)}, target {tuple(target.shape)}, weight {tuple(head.weight.shape)}"
        raise ValueError(f"{shapes}: expected [..., H], [...] and [R, H]")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing {label_smoothing} is not between 0 and 1")


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class _Options:
    head: HeadShard  # without its tensors
    label_smoothing: float
    compute_dtype: torch.dtype
    block_rows: int | None
    differentiated: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden [N, H], weight [R, H], bias [R] or None, target [N] -> losses [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, options):
        head = replace(options.head, weight=weight, bias=bias)
        rows, mine = head.local(target)
        positions = mine.nonzero()[:, 0]
        rows = rows[positions]
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = Blocks(hidden, head, options.compute_dtype, options.block_rows)
            keep = options.differentiated and ctx.needs_input_grad[1] and Exponentials.fit(blocks)
            ctx.exponentials = Exponentials(blocks) if keep else None
            losses, maximum, total = _losses(blocks, positions, rows, options.label_smoothing, ctx.exponentials)
        ctx.options = replace(options, block_rows=blocks.rows)  # it may follow the number of threads
        ctx.save_for_backward(hidden, weight, bias, positions, rows, maximum, total)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        hidden, weight, bias, positions, rows, maximum, total = ctx.saved_tensors
        exponentials, ctx.exponentials = ctx.exponentials, None  # the first backward overwrites them
        head = replace(ctx.options.head, weight=weight, bias=bias)
        with torch.autocast(hidden.device.type, enabled=False):
            blocks = Blocks(hidden, head, ctx.options.compute_dtype, ctx.options.block_rows)
            softmax = Softmax(blocks, maximum, total, positions, rows, ctx.options.label_smoothing, exponentials)
            gradients = softmax.gradients(hidden, upstream.to(blocks.dtype), ctx.needs_input_grad)
        return *gradients, None, None


def _losses(blocks, positions, rows, label_smoothing, exponentials) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, maximum over all items of the scores / log 2, sum of exp2(score - maximum)), [N] each, on every rank."""
    statistics = Statistics.none(blocks.hidden, blocks.dtype, label_smoothing)
    if len(blocks.hidden) == 0:
        return statistics.total, statistics.total, statistics.total
    statistics = statistics.after(blocks, positions, rows, exponentials)
    maximum, total, added = combine(
        statistics.maximum, statistics.total, statistics.added, blocks.head.axis, torch.exp2
    )
    return losses_of(Statistics(maximum, total, added), blocks.head.num_rows, label_smoothing), maximum, total
