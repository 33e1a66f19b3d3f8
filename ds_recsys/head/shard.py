"""The item head of one tensor rank: its rows of the table, and what is done to their dot products."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_recsys.topology import ALONE, TensorAxis

IGNORE = -100  # target of a position that is not supervised, as in torch's cross_entropy


def rows_of(num_rows: int, size: int, rank: int) -> tuple[int, int]:
    """(first, past the last) row that `rank` of `size` holds of a table of `num_rows`; sizes differ by at most 1."""
    share, more = divmod(num_rows, size)
    return rank * share + min(rank, more), (rank + 1) * share + min(rank + 1, more)


@dataclass(frozen=True)
class HeadShard:
    """Scores of items: softcap(scale * (h . w + bias)), with h and w normalised first for a cosine head.

    Attributes:
        weight: [R, H], rows first_row .. first_row + R - 1 of the table. Row 0 of the whole table is padding.
        num_rows: of the whole table, I + 1.
        first_row: of this shard.
        bias: [R] or None.
        scale: multiplies the scores.
        softcap: scores become softcap * tanh(scores / softcap); None: they stay.
        cosine: hidden states and rows are scaled to length 1 first.
        axis: the ranks that hold the other rows; the hidden states are the same on all of them.
    """

    weight: Tensor
    num_rows: int
    first_row: int = 0
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    cosine: bool = False
    axis: TensorAxis = ALONE

    def local(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """items, int64 of any shape -> (rows of this shard, 0 for others' items; whether the item is in this shard)."""
        rows = items - self.first_row
        mine = (rows >= 0) & (rows < len(self.weight))
        return rows.masked_fill(~mine, 0), mine

    def scores(self, hidden: Tensor, rows: slice = slice(None)) -> Tensor:
        """[..., H] -> [..., len(rows)] of this shard; differentiable, and without any communication."""
        weight = self.weight[rows]
        if self.cosine:
            hidden, weight = F.normalize(hidden, dim=-1), F.normalize(weight, dim=-1)
        scores = F.linear(hidden, weight, None if self.bias is None else self.bias[rows])
        if self.scale != 1.0:
            scores = scores * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
