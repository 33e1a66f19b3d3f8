"""Cross-entropy over a catalogue whose scores are never held: blocks of items, on every tensor rank its own rows."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_recsys.head.blocks import LOG2E, Blocks, Exponentials
from ds_recsys.head.gemm import accumulate, product
from ds_recsys.head.kernels import choose, summed_loss
from ds_recsys.head.reductions import combine
from ds_recsys.head.shard import IGNORE, HeadShard
from ds_recsys.topology import TensorAxis


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
            softmax = _Softmax(blocks, maximum, total, positions, rows, ctx.options.label_smoothing, exponentials)
            gradients = softmax.gradients(hidden, upstream.to(blocks.dtype), ctx.needs_input_grad)
        return *gradients, None, None


def _losses(blocks, positions, rows, label_smoothing, exponentials) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, maximum over all items of the scores / log 2, sum of exp2(score - maximum)), [N] each, on every rank."""
    hidden, head = blocks.hidden, blocks.head
    if len(hidden) == 0:
        nothing = hidden.new_zeros(0, dtype=blocks.dtype)
        return nothing, nothing, nothing
    scores, _ = blocks.target_scores(positions, rows)
    added = hidden.new_zeros(len(hidden), 2 if label_smoothing else 1, dtype=blocks.dtype)
    added[:, 0].index_copy_(0, positions, scores)
    maximum = torch.full_like(added[:, 0], -torch.inf)
    total = torch.zeros_like(maximum)
    for index, block in enumerate(blocks):
        scores, _ = blocks.scores(block, blocks.operand(block))
        if label_smoothing:
            added[:, 1] += scores.sum(0)
        largest = torch.maximum(maximum, scores.amax(0))
        total *= torch.exp2(maximum - largest)
        maximum = largest
        powers = scores if exponentials is None else exponentials.block(block)
        total += torch.exp2(scores.sub_(maximum), out=powers).sum(0)
        if exponentials is not None:
            exponentials.maxima[index] = maximum
    maximum, total, added = combine(maximum, total, added, head.axis, torch.exp2)
    losses = (1 - label_smoothing) * (maximum - added[:, 0])
    if label_smoothing:
        losses += label_smoothing * (maximum - added[:, 1] / head.num_rows)
    return losses.div_(LOG2E).add_(total.log()), maximum, total


@dataclass
class _Softmax:
    """The backward of `_losses`: positions[i] has its target in row rows[i] of this shard."""

    blocks: Blocks
    maximum: Tensor
    total: Tensor
    positions: Tensor
    rows: Tensor
    label_smoothing: float
    exponentials: Exponentials | None

    def gradients(self, hidden: Tensor, upstream: Tensor, needed) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of the losses weighted by upstream [N]: (hidden's [N, H], weight's [R, H], bias's [R]), None if not needed."""
        blocks, head = self.blocks, self.blocks.head
        if len(hidden) == 0:
            values = (hidden, head.weight, head.bias)
            return tuple(torch.zeros_like(v) if n else None for v, n in zip(values, needed[:3], strict=True))
        # All of a block's products take exp2(score - maximum), at most 1; what it lacks to be a gradient is a factor per
        # position, which goes into the other operand, or is applied to the sum over blocks.
        factor = upstream / self.total * head.scale
        weighted = hidden.to(blocks.dtype) * factor[:, None]
        operand = weighted.to(blocks.compute_dtype)
        target_slope = blocks.target_scores(self.positions, self.rows)[1] if head.softcap is not None else None
        of_hidden = self._start_hidden(target_slope) if needed[0] else None
        of_weight = self._table() if needed[1] else None
        of_bias = torch.empty_like(head.bias) if needed[2] else None
        sending = None
        for index, block in enumerate(blocks):
            weight = blocks.operand(block)
            powers = self._powers(index, block, weight)
            if of_bias is not None:
                of_bias[block] = torch.mv(powers, factor)
            powers = powers.to(blocks.compute_dtype)
            if of_hidden is not None:
                accumulate(of_hidden, weight.T, powers)
                if block.stop == len(head.weight):
                    sending = _send(of_hidden, head.axis)
            if of_weight is not None:
                self._write(of_weight[block], block, powers, operand)
        if of_hidden is not None and len(head.weight) == 0:
            sending = _send(of_hidden, head.axis)
        self._subtract_targets(of_weight, of_bias, weighted, factor, target_slope)
        if sending is not None:
            sending.wait()
        if of_hidden is not None:
            of_hidden = (of_hidden.T * factor[:, None]).to(hidden.dtype)
        return of_hidden, of_weight, of_bias

    def _powers(self, index: int, block: slice, weight: Tensor) -> Tensor:
        """[b, N]: d losses / d (scores before the soft cap), times `total`, but for the targets' own part."""
        if self.exponentials is not None:
            correction = torch.exp2(self.exponentials.maxima[index] - self.maximum)
            powers, slope = self.blocks.scratch(block), None
            torch.mul(self.exponentials.block(block), correction, out=powers)
        else:
            powers, slope = self.blocks.scores(block, weight, with_slope=True)
            torch.exp2(powers.sub_(self.maximum), out=powers)
        if self.label_smoothing:
            powers -= self.total * (self.label_smoothing / self.blocks.head.num_rows)
        return powers if slope is None else powers.mul_(slope)

    def _start_hidden(self, target_slope: Tensor | None) -> Tensor:
        """[H, N], transposed as the products are fastest: the targets' part, in the same unit as the blocks'."""
        blocks = self.blocks
        start = blocks.hidden.new_zeros(blocks.hidden.shape[::-1], dtype=blocks.dtype)
        part = self.total[self.positions] * (self.label_smoothing - 1)
        part = part if target_slope is None else part * target_slope
        weight = blocks.operand(self.rows).to(blocks.dtype)
        return start.index_copy_(1, self.positions, (weight * part[:, None]).T)

    def _table(self) -> Tensor:
        if self.exponentials is not None:
            return self.exponentials.gradient
        return torch.empty_like(self.blocks.head.weight, memory_format=torch.contiguous_format)

    def _write(self, table: Tensor, block: slice, powers: Tensor, operand: Tensor) -> None:
        direct = table.dtype in (powers.dtype, self.blocks.dtype) and not self.blocks.head.cosine
        out = table if direct else table.new_empty(table.shape, dtype=self.blocks.dtype)
        result = self.blocks.through_norm(block, product(powers, operand, out))
        if result is not table:
            table.copy_(result)

    def _subtract_targets(self, of_weight, of_bias, weighted, factor, target_slope) -> None:
        part = self.total[self.positions] * (self.label_smoothing - 1)
        part = part if target_slope is None else part * target_slope
        if of_weight is not None:
            rows = self.blocks.through_norm(self.rows, weighted[self.positions] * part[:, None])
            _add_rows(of_weight, self.rows, rows)
        if of_bias is not None:
            _add_rows(of_bias, self.rows, factor[self.positions] * part)


def _add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows[i]] += values[i], summed in the dtype of `values` where a row comes more than once."""
    if table.dtype == values.dtype:
        table.index_add_(0, rows, values)
        return
    rows, place = rows.unique(return_inverse=True)
    sums = table[rows].to(values.dtype).index_add_(0, place, values)
    table[rows] = sums.to(table.dtype)


def _send(value: Tensor, axis: TensorAxis):
    """Start the sum over the ranks; None when there is no one to send to."""
    return dist.all_reduce(value, group=axis.group, async_op=True) if axis.size > 1 else None
