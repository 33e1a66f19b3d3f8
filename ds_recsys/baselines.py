"""Baselines without a gradient, ranked under the model's protocol: the same split, targets, filter and tie rule.

Both learn from the training part of the split only; what is seen before the target (for the test: the validation item
too) is a user's history, as for the model. Users are scored in blocks, so memory grows with the catalogue and not with
the number of users.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import sparse

from ds_recsys.data.splits import train_counts, train_positions
from ds_recsys.metrics import RankingMetrics, seen_items, target_rank, top_k

if TYPE_CHECKING:
    from ds_recsys.data.interactions import Interactions
    from ds_recsys.data.splits import Split, Which

_BLOCK_SCORES = 1_000_000  # float32 scores of one block of users


def popularity(
    interactions: "Interactions",
    split: "Split",
    which: "Which" = "test",
    *,
    ks: Sequence[int] = (10,),
    filter_seen: bool = True,
) -> dict[str, float]:
    """Everybody is offered the items with the most training interactions.

    which: "valid" or "test". Returns the figures of `RankingMetrics.compute`.
    """
    counts = train_counts(interactions, split).astype(np.float32)
    return _evaluate(
        interactions, split, which, lambda users: np.tile(counts, (len(users), 1)), ks=ks, filter_seen=filter_seen
    )


def item_knn(
    interactions: "Interactions",
    split: "Split",
    which: "Which" = "test",
    *,
    ks: Sequence[int] = (10,),
    filter_seen: bool = True,
    neighbours: int = 50,
    shrinkage: float = 5.0,
    decay: float = 0.5,
) -> dict[str, float]:
    """Item-based nearest neighbours on co-occurrence (Sarwar et al. 2001, https://doi.org/10.1145/371920.372071).

    similarity(i, j) = users of both / (sqrt(users of i * users of j) + shrinkage), over the training part, kept for the
    `neighbours` most similar j of each i; score(j) = sum over the history's items i of decay^age(i) * similarity(i, j),
    where the last item has age 0, and a repeated item counts each time.

    The defaults had the best validation NDCG@10 on ML-100K, leave-one-out, seen items filtered, over neighbours
    {20, 50, 100, 200} x shrinkage {0, 5, 10, 20} x decay {1, .9, .8, .7, .6, .5, .4, .3}; decay=1 is the plain method.

    which: "valid" or "test". Returns the figures of `RankingMetrics.compute`.
    """
    similarity = _similarity(interactions, split, neighbours, shrinkage)

    def score(users: np.ndarray) -> np.ndarray:
        rows, items = (part.numpy() for part in seen_items(interactions, split, which, users))
        # Rows are consecutive: an item's age is how many of its row follow it.
        age = np.searchsorted(rows, rows, side="right") - 1 - np.arange(len(rows))
        history = sparse.csr_matrix(
            ((decay**age).astype(np.float32), (rows, items)), shape=(len(users), interactions.num_items + 1)
        )
        return (history @ similarity).toarray()

    return _evaluate(interactions, split, which, score, ks=ks, filter_seen=filter_seen)


def _similarity(interactions: "Interactions", split: "Split", neighbours: int, shrinkage: float) -> sparse.csr_matrix:
    """float32 [I + 1, I + 1]: row i holds the similarities of item i's nearest neighbours, itself left out."""
    size = interactions.num_items + 1
    positions = train_positions(interactions, split)
    users = np.repeat(np.arange(interactions.num_users), split.train_stop - split.offsets[:-1])
    ones = np.ones(len(positions), dtype=np.float32)
    bought = sparse.csr_matrix((ones, (users, interactions.sequence[positions])), shape=(interactions.num_users, size))
    bought.data[:] = 1.0  # a repeated pair is one purchase
    by_item = bought.T.tocsr()
    norm = np.sqrt(np.diff(by_item.indptr)).astype(np.float32)
    rows = max(1, _BLOCK_SCORES // size)
    blocks = []
    for first in range(0, size, rows):
        together = (by_item[first : first + rows] @ bought).tocoo()
        row, item, count = together.row, together.col, together.data
        other = row + first != item
        row, item, count = row[other], item[other], count[other]
        value = count / (norm[row + first] * norm[item] + shrinkage)
        # Best first within each row, ties by lowest id; then the place in the row decides who stays.
        order = np.lexsort((item, -value, row))
        row, item, value = row[order], item[order], value[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        near = place < neighbours
        shape = (min(rows, size - first), size)
        blocks.append(sparse.csr_matrix((value[near], (row[near], item[near])), shape=shape))
    return sparse.vstack(blocks, format="csr")


def _evaluate(
    interactions: "Interactions",
    split: "Split",
    which: "Which",
    score: Callable[[np.ndarray], np.ndarray],
    *,
    ks: Sequence[int],
    filter_seen: bool,
) -> dict[str, float]:
    """`score` maps user indices [B] to scores [B, I + 1]."""
    metrics = RankingMetrics(ks, interactions.num_items)
    all_users, positions = split.targets(which)
    rows = max(1, _BLOCK_SCORES // (interactions.num_items + 1))
    for first in range(0, len(all_users), rows):
        users, target = all_users[first : first + rows], interactions.sequence[positions[first : first + rows]]
        scores = torch.from_numpy(score(users))
        seen = seen_items(interactions, split, which, users) if filter_seen else None
        ranks = target_rank(scores, torch.from_numpy(target.astype(np.int64)), seen)
        metrics.update(ranks, top_k(scores, max(metrics.ks), seen))
    return metrics.compute()
