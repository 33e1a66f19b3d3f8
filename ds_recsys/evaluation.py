"""Full-ranking evaluation under the training grid: each data rank scores its users on its last stage."""

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F

from ds_recsys import compat
from ds_recsys.data.batches import EvalBatches
from ds_recsys.metrics import RankingMetrics, seen_items, target_rank, top_k


def evaluate(
    engine,
    interactions,
    split,
    which: str,
    *,
    max_length: int,
    batch_size: int,
    ks: Sequence[int] = (10,),
    filter_seen: bool = True,
) -> dict[str, float]:
    """Rank every user's held-out item against the whole catalogue. Collective; every rank gets the same figures.

    Scores stay on the last stage of each pipeline, `batch_size` x catalogue at a time; what crosses ranks at the end is a
    few sums and one counter per item.

    Args:
        engine: a PipelineEngine over a `RecommenderPipe`.
        which: "valid" or "test".
        batch_size: users per forward pass and data rank.
        ks: cut-offs of HR, NDCG and coverage.
        filter_seen: leave out what is in the user's history (all of it, not only the model's window).

    Returns:
        {"HR@10": ..., "NDCG@10": ..., "MRR": ..., "coverage@10": ..., "loss": mean cross-entropy of the targets in nats,
        over the whole catalogue, nothing filtered}
    """
    grid = engine.grid
    batches = EvalBatches(
        interactions,
        split,
        which,
        max_length=max_length,
        batch_size=batch_size,
        data_size=grid.get_data_parallel_world_size(),
        data_rank=grid.get_data_parallel_rank(),
    )
    metrics, loss = RankingMetrics(ks, interactions.num_items), torch.zeros(1, dtype=torch.float64)
    for group in _groups(batches, 2 * engine.num_stages):  # enough micro-batches in flight to fill the pipeline
        outputs = compat.forward_only(engine, group, len(group))
        if not engine.is_last_stage():
            continue
        for scores, target, user in _scores(engine.module, outputs, group):
            seen = seen_items(interactions, split, which, user.numpy()) if filter_seen else None
            metrics.update(target_rank(scores, target, seen), top_k(scores, max(metrics.ks), seen))
            loss += F.cross_entropy(scores, target, reduction="sum").cpu()
    state = torch.cat([loss, metrics.state()])
    if not engine.is_last_stage():
        state.zero_()
    state = state.to(engine.device)
    torch.distributed.all_reduce(state)
    state = state.cpu()
    metrics.load_state(state[1:])
    return {**metrics.compute(), "loss": (state[0] / batches.num_users).item()}


def _groups(batches, size):
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


@torch.no_grad()
def _scores(pipe, outputs, group):
    """Per micro-batch (scores [B, I + 1] fp32, targets [B], users [B] on the host); filler rows are left out."""
    for hidden, (_, (position, target, user)) in zip(outputs, group, strict=True):
        real = user >= 0
        position, target, user = position[real], target[real], user[real]
        if not len(user):
            continue
        rows = hidden[real.to(hidden.device)]
        scores = pipe.logits(rows[torch.arange(len(user)), position]).float()
        yield scores, target.to(scores.device), user
