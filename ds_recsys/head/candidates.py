"""The k best of a stream of scores, without sorting the stream."""

import torch
from torch import Tensor


class Best:
    """The k highest scores of each of B users so far, ties by lowest item id. Blocks must come in order of item id.

    Only scores above a user's k-th best so far are looked at further: about k * log(items / k) in a stream in random
    order. They wait in a list until some user has enough of them to be worth a merge.
    """

    def __init__(self, users: int, k: int, dtype: torch.dtype, device: torch.device):
        if k < 1:
            raise ValueError(f"k={k}: ask for at least one item")
        self.k, self.lowest = k, torch.finfo(dtype).min
        self.values = torch.full((users, k), -torch.inf, dtype=dtype, device=device)  # -inf: no candidate
        self.items = torch.zeros(users, k, dtype=torch.int64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._counts = torch.zeros(users, dtype=torch.int64, device=device)

    def update(self, block) -> None:
        """block: see `ranking.Block`. Writes into its scores."""
        threshold = self.values[:, -1]
        if block.excluded is not None:
            block.scores[block.excluded] = torch.nan  # above nothing; real NaN are refused
        # Later items lose ties, so only what is above counts. A candidate's own -inf ranks as the lowest number.
        rows, groups = (block.peaks.clamp(min=self.lowest) > threshold[:, None]).nonzero().unbind(1)
        if not len(rows):
            return
        grouped = block.scores.view(*block.peaks.shape, -1)
        values = grouped[rows, groups].clamp(min=self.lowest)
        hit, column = (values > threshold[rows, None]).nonzero().unbind(1)
        rows, items = rows[hit], block.first + groups[hit] * grouped.shape[2] + column
        self._waiting.append((rows, items, values[hit, column]))
        self._counts += torch.bincount(rows, minlength=len(self._counts))
        if int(self._counts.max()) >= 2 * self.k + 32:
            self._merge()

    def result(self) -> tuple[Tensor, Tensor]:
        """(values [B, k] best first, items int64 [B, k]); -inf and 0 where there were fewer than k."""
        self._merge()
        return self.values, self.items

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows, items, values = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        rows, order = rows.sort(stable=True)  # a user's candidates stay in order of item id
        place = self.k + torch.arange(len(rows), device=rows.device) - (self._counts.cumsum(0) - self._counts)[rows]
        shape = (len(self.values), self.k + int(self._counts.max()))
        all_values, all_items = self.values.new_full(shape, -torch.inf), self.items.new_zeros(shape)
        all_values[:, : self.k], all_items[:, : self.k] = self.values, self.items
        all_values[rows, place], all_items[rows, place] = values[order], items[order]
        chosen = highest(all_values, self.k)
        self.values, order = all_values.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        self.items = all_items.gather(1, chosen).gather(1, order)
        self._waiting.clear()
        self._counts.zero_()


def highest(values: Tensor, k: int) -> Tensor:
    """Columns, rising, of the k highest of each row of [B, C], C >= k; of equal values the first (torch: any)."""
    level = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > level, values == level
    places = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= places))
    return chosen.nonzero()[:, 1].view(-1, k)
