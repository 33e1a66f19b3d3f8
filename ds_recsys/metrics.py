"""Full-ranking metrics: every item of the catalogue competes, ties go to the lowest item id, padding never ranks.

With one held-out item per user, of rank r among all candidates (from 1), and K a cut-off:

- HR@K, the share of users with r <= K (which is also Recall@K);
- NDCG@K, the mean of 1 / log2(r + 1) where r <= K, else 0 (one relevant item, so the ideal DCG is 1);
- MRR, the mean of 1 / r over the whole ranking, without a cut-off;
- coverage@K, the share of the catalogue that is in at least one user's first K.

Everything here works on tensors of one process; `RankingMetrics.state` is what ranks add up.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ds_recsys.errors import UserError

if TYPE_CHECKING:
    from ds_recsys.data.interactions import Interactions
    from ds_recsys.data.splits import Split, Which

Seen = tuple[torch.Tensor, torch.Tensor]


def target_rank(scores: torch.Tensor, target: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
    """Rank of each row's target among the items: 1 + those with a higher score + those with the same and a lower id.

    scores: float [B, I + 1]; column j is item j, column 0 (padding) is never counted. Not changed.
    target: int64 [B], 1..I
    seen:   (rows, items), two int64 tensors of one length: pairs left out of the ranking. A row's own target is never
            left out, even when it is listed.

    Returns int64 [B]. Raises ValueError for NaN scores and for a target outside the catalogue.
    """
    _check_scores(scores)
    if len(target) and not (1 <= int(target.min()) and int(target.max()) < scores.shape[1]):
        raise ValueError(f"target_rank: targets must be in 1..{scores.shape[1] - 1}, item 0 being padding")
    target = target.to(scores.device)
    of_target = scores.gather(1, target[:, None])
    items = torch.arange(scores.shape[1], device=scores.device)
    # Nothing is written into the scores, so that a seen item cannot tie with a target whose own score is -inf.
    ahead = (scores > of_target) | ((scores == of_target) & (items < target[:, None]))
    ahead[:, 0] = False
    if seen is not None:
        ahead[seen[0].to(scores.device), seen[1].to(scores.device)] = False
    return 1 + ahead.sum(dim=1)


def top_k(scores: torch.Tensor, k: int, seen: Seen | None = None) -> torch.Tensor:
    """The k best items of each row, best first, ties by lowest id (torch.topk leaves their order open).

    scores, seen: as in `target_rank`; every seen item is left out here. Not changed.

    Returns int64 [B, k]; 0 fills the places that no item is left for. Raises ValueError for NaN scores.
    """
    _check_scores(scores)
    # -inf from here on means "no candidate"; a candidate's own -inf becomes the lowest finite score.
    scores = scores.clamp(min=torch.finfo(scores.dtype).min)
    scores[:, 0] = -torch.inf
    if seen is not None:
        scores[seen[0].to(scores.device), seen[1].to(scores.device)] = -torch.inf
    if scores.shape[1] < k:
        scores = torch.nn.functional.pad(scores, (0, k - scores.shape[1]), value=-torch.inf)
    values, items = scores.topk(k, dim=1)
    # The k-th value is the same however ties are ordered. Where more items hold it than there are places, the lowest
    # ids get them; everywhere else the chosen set is right and only its order is open.
    last = values[:, -1:]
    crowded = (scores == last).sum(dim=1) > (values == last).sum(dim=1)
    if crowded.any():
        some, level = scores[crowded], last[crowded]
        above, equal = some > level, some == level
        places = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= places))
        items[crowded] = chosen.nonzero()[:, 1].view(-1, k)
    items = items.sort(dim=1).values
    values, order = scores.gather(1, items).sort(dim=1, descending=True, stable=True)
    return items.gather(1, order).masked_fill(values == -torch.inf, 0)


def seen_items(interactions: "Interactions", split: "Split", which: "Which", users: np.ndarray) -> Seen:
    """All items before the target of `which` in the users' whole histories, as `target_rank` takes them.

    users: int [B] user indices, which become rows 0..B-1.
    """
    first = split.offsets[users]
    lengths = {"valid": split.train_stop, "test": split.valid_stop}[which][users] - first
    rows = np.repeat(np.arange(len(users)), lengths)
    # The place within the row, plus where the row's history starts.
    places = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + np.repeat(first, lengths)
    return torch.from_numpy(rows), torch.from_numpy(interactions.sequence[places].astype(np.int64))


class RankingMetrics:
    """Sums over users of what the metrics need. States of several processes add up, element by element."""

    def __init__(self, ks: Sequence[int], num_items: int):
        self.ks = tuple(ks)
        self.num_items = num_items
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks={list(ks)}: give at least one cut-off, each 1 or more")
        # [users, sum of 1 / rank, hits per K, DCG per K | recommendations per K and item (0: padding)]
        self._sums = torch.zeros(2 + 2 * len(self.ks), dtype=torch.float64)
        self._shown = torch.zeros(len(self.ks), num_items + 1, dtype=torch.float64)

    def update(self, ranks: torch.Tensor, top: torch.Tensor) -> None:
        """ranks: int64 [B] from `target_rank`; top: int64 [B, >= max(ks)] from `top_k`."""
        if len(ranks) != len(top) or top.shape[1] < max(self.ks):
            raise ValueError(f"top is {list(top.shape)}; give {len(ranks)} rows of at least {max(self.ks)} items")
        ranks, top = ranks.cpu().double(), top.cpu()
        gains = 1 / torch.log2(ranks + 1)
        self._sums[0] += len(ranks)
        self._sums[1] += (1 / ranks).sum()
        for index, k in enumerate(self.ks):
            self._sums[2 + index] += (ranks <= k).sum()
            self._sums[2 + len(self.ks) + index] += gains[ranks <= k].sum()
            self._shown[index] += torch.bincount(top[:, :k].flatten(), minlength=self.num_items + 1)

    def state(self) -> torch.Tensor:
        """float64 [2 + 2 K + K (I + 1)], K cut-offs and I items: sum it over processes (all_reduce), then load it."""
        return torch.cat([self._sums, self._shown.flatten()])

    def load_state(self, state: torch.Tensor) -> None:
        """Replaces what was counted by `state`, such as the sum of several states."""
        sums, shown = state.cpu().double().split([self._sums.numel(), self._shown.numel()])
        self._sums, self._shown = sums.clone(), shown.view_as(self._shown).clone()

    def compute(self) -> dict[str, float]:
        """{"HR@10": ..., "NDCG@10": ..., "MRR": ..., "coverage@10": ...}, each in 0..1. UserError without any user."""
        users = self._sums[0].item()
        if not users:
            raise UserError("evaluation: no user has a held-out item; check the split and the length of the histories")
        mean = (self._sums / users).tolist()
        size = len(self.ks)
        return {
            **{f"HR@{k}": mean[2 + index] for index, k in enumerate(self.ks)},
            **{f"NDCG@{k}": mean[2 + size + index] for index, k in enumerate(self.ks)},
            "MRR": mean[1],
            **{
                f"coverage@{k}": (self._shown[index, 1:] > 0).sum().item() / self.num_items
                for index, k in enumerate(self.ks)
            },
        }


def _check_scores(scores: torch.Tensor) -> None:
    # A NaN compares false with everything, so its row's target would come out first. max() is NaN where one value is.
    if scores.numel() and scores.shape[1] > 1 and torch.isnan(scores[:, 1:].max()):
        row = int(torch.isnan(scores[:, 1:]).any(dim=1).nonzero()[0])
        raise ValueError(f"scores of row {row} hold NaN, so they have no ranking; has the training diverged?")
