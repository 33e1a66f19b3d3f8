"""Scores of a block of items against all positions, as the streaming losses want them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_recsys.head.gemm import product
from ds_recsys.head.shard import HeadShard

LOG2E = math.log2(math.e)
_CPU_BLOCK = 2**19  # elements per thread: 2 MiB of fp32, the level-2 cache or a share of the next
_DEVICE_BLOCK = 2**24  # 64 MiB of fp32: enough to fill an accelerator, near the size of its level-2 cache


def rows_per_block(positions: int, device: torch.device) -> int:
    """How many items to score at a time."""
    elements = _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK
    return max(64, elements // max(positions, 1) // 64 * 64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Blocks:
    """Scores [b, N] of `b` items at a time for all N positions, in units of log 2, so that exp2 gives e^score.

    exp2 is several times as fast as exp on CPU, and the factor is folded into the hidden states. Items are the rows of a
    block, not its columns: then the table's gradient of the block is one product of row-major operands.

    Args:
        hidden: [N, H]; of length 1 for a cosine head.
        head: weight [R, H].
        compute_dtype: of the operands of matrix products. Scores are fp32, or fp64 when this is fp64.
        block_rows: `b`; None: chosen for the device.
    """

    def __init__(self, hidden: Tensor, head: HeadShard, compute_dtype: torch.dtype, block_rows: int | None):
        self.head, self.compute_dtype, self.dtype = head, compute_dtype, wide(compute_dtype)
        self.rows = block_rows or rows_per_block(len(hidden), hidden.device)
        unit = LOG2E if head.softcap is None else 1 / head.softcap
        self._factor = head.scale * unit
        self._folded = compute_dtype == self.dtype  # a narrower dtype would round the hidden states once more
        self.hidden = (hidden.to(self.dtype) * self._factor if self._folded else hidden).to(compute_dtype).contiguous()
        self._scratch = hidden.new_empty(min(self.rows, len(head.weight)), len(hidden), dtype=self.dtype)

    def __iter__(self):
        """Slices of the shard's rows."""
        for start in range(0, len(self.head.weight), self.rows):
            yield slice(start, min(start + self.rows, len(self.head.weight)))

    def operand(self, rows: slice | Tensor) -> Tensor:
        """Rows of the table as matrix products take them, [b, H]; of length 1 for a cosine head."""
        weight = self.head.weight[rows]
        if self.head.cosine:
            weight = F.normalize(weight.to(self.dtype), dim=-1)
        return weight.to(self.compute_dtype)

    def scratch(self, rows: slice) -> Tensor:
        """[b, N] of memory that every block uses."""
        return self._scratch[: rows.stop - rows.start]

    def scores(self, rows: slice, weight: Tensor, with_slope: bool = False) -> tuple[Tensor, Tensor | None]:
        """weight = operand(rows) -> scores [b, N] / log 2, and d score / d (score before the soft cap) if asked for."""
        scores = product(weight, self.hidden.T, self.scratch(rows))
        if not self._folded:
            scores.mul_(self._factor)
        if self.head.bias is not None:
            scores.add_(self.head.bias[rows, None].to(self.dtype) * self._factor)
        if self.head.softcap is None:
            return scores, None
        torch.tanh(scores, out=scores)
        slope = 1 - scores.square() if with_slope else None
        return scores.mul_(self.head.softcap * LOG2E), slope

    def target_scores(self, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of position positions[i] against row rows[i], int64 [P] both -> (scores [P] / log 2, slope as in `scores`)."""
        weight = self.operand(rows).to(self.dtype)
        scores = (self.hidden[positions].to(self.dtype) * weight).sum(-1)
        if not self._folded:
            scores *= self._factor
        if self.head.bias is not None:
            scores += self.head.bias[rows].to(self.dtype) * self._factor
        if self.head.softcap is None:
            return scores, None
        scores = torch.tanh(scores)
        return scores * (self.head.softcap * LOG2E), 1 - scores.square()

    def through_norm(self, rows: slice | Tensor, gradient: Tensor) -> Tensor:
        """Gradient [b, H] of the operand -> gradient of the table's rows."""
        if not self.head.cosine:
            return gradient
        weight = self.head.weight[rows].to(self.dtype)
        unit, length = F.normalize(weight, dim=-1), weight.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return (gradient - unit * (unit * gradient).sum(-1, keepdim=True)) / length


class Exponentials:
    """exp2(scores - running maximum) of every block, kept in the memory of the table's gradient: N <= H."""

    def __init__(self, blocks: Blocks):
        weight, self._positions = blocks.head.weight, len(blocks.hidden)
        self.gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
        # One tensor: many small ones that stay, made between large ones that go, would fragment malloc's heap.
        self.maxima = blocks.hidden.new_empty(-(-len(weight) // blocks.rows), self._positions, dtype=blocks.dtype)

    @staticmethod
    def fit(blocks: Blocks) -> bool:
        """Whether there is room, no precision is lost, and they are all the backward needs."""
        exact = blocks.head.weight.dtype == blocks.compute_dtype == blocks.dtype
        return exact and blocks.head.softcap is None and 0 < len(blocks.hidden) <= blocks.head.weight.shape[1]

    def block(self, rows: slice) -> Tensor:
        """[b, N] at the start of where the block's gradient [b, H] will be."""
        count = rows.stop - rows.start
        return self.gradient[rows].view(-1)[: count * self._positions].view(count, self._positions)
