"""The softmax over a shard's items, one block of them at a time: what the forward adds up, and the backward from that."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.head.blocks import LOG2E, Blocks, Exponentials
from ds_recsys.head.gemm import accumulate, product
from ds_recsys.topology import TensorAxis


@dataclass(frozen=True)
class Statistics:
    """What is known of N positions' scores (in units of log 2) with the items seen so far.

    Maximum and sum stay apart: their combination, the log-sum-exp, would be rounded each time it grows.

    Attributes:
        maximum: [N], -inf before the first item.
        total: [N], sum of exp2(score - maximum).
        added: [N, 1], the target's score, 0 until it has been seen; with label smoothing [N, 2], the sum of all scores behind.
    """

    maximum: Tensor
    total: Tensor
    added: Tensor

    @classmethod
    def none(cls, hidden: Tensor, dtype: torch.dtype, label_smoothing: float) -> "Statistics":
        """Of no items, for the positions of hidden [N, H]."""
        added = hidden.new_zeros(len(hidden), 2 if label_smoothing else 1, dtype=dtype)
        return cls(torch.full_like(added[:, 0], -torch.inf), torch.zeros_like(added[:, 0]), added)

    def after(
        self, blocks: Blocks, positions: Tensor, rows: Tensor, exponentials: Exponentials | None = None
    ) -> "Statistics":
        """With the items of `blocks` too, where positions[i] has its target in row rows[i]. `exponentials` are filled."""
        added, maximum, total = self.added.clone(), self.maximum, self.total.clone()
        scores, _ = blocks.target_scores(positions, rows)
        added[:, 0].index_copy_(0, positions, scores)
        for index, block in enumerate(blocks):
            scores, _ = blocks.scores(block, blocks.operand(block))
            if added.shape[1] > 1:
                added[:, 1] += scores.sum(0)
            largest = torch.maximum(maximum, scores.amax(0))
            total *= torch.exp2(maximum - largest)
            maximum = largest
            powers = scores if exponentials is None else exponentials.block(block)
            total += torch.exp2(scores.sub_(maximum), out=powers).sum(0)
            if exponentials is not None:
                exponentials.maxima[index] = maximum
        return Statistics(maximum, total, added)


def losses_of(statistics: Statistics, num_rows: int, label_smoothing: float) -> Tensor:
    """[N] in nats, from the statistics of all `num_rows` items."""
    maximum, added = statistics.maximum, statistics.added
    losses = (1 - label_smoothing) * (maximum - added[:, 0])
    if label_smoothing:
        losses += label_smoothing * (maximum - added[:, 1] / num_rows)
    return losses.div_(LOG2E).add_(statistics.total.log())


@dataclass
class Softmax:
    """The backward of the losses: positions[i] has its target in row rows[i] of this shard.

    `maximum` and `total` [N] are those of all items, of this shard or not.
    """

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
