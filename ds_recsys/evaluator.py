"""Full-ranking evaluation under the training grid: each data rank scores its users on its last stage."""
from collections.abc import Sequence

import torch

from ds_recsys import compat
from ds_recsys.data.batches import EvalBatches
from ds_recsys.evaluation import RankingMetrics, seen_items, target_rank, top_k


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
        {"HR@10": ..., "NDCG@10": ..., "MRR": ..., "coverage@10": ...}
    """
    grid, pipe = engine.grid, engine.module
    batches = EvalBatches(
        interactions,
        split,
        which,
        max_length=max_length,
        batch_size=batch_size,
        data_size=grid.get_data_parallel_world_size(),
        data_rank=grid.get_data_parallel_rank(),
    )
    metrics = RankingMetrics(ks, interactions.num_items)
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == 2 * engine.num_stages:  # enough micro-batches in flight to fill the pipeline
            _score(engine, pipe, group, interactions, split, which, metrics, filter_seen)
            group = []
    if group:
        _score(engine, pipe, group, interactions, split, which, metrics, filter_seen)
    state = metrics.state().to(engine.device)
    if not engine.is_last_stage():
        state.zero_()
    torch.distributed.all_reduce(state)
    metrics.load_state(state.cpu())
    return metrics.compute()


@torch.no_grad()
def _score(engine, pipe, group, interactions, split, which, metrics, filter_seen):
    outputs = compat.forward_only(engine, group, len(group))
    if not engine.is_last_stage():
        return
    for hidden, (_, (position, target, user)) in zip(outputs, group, strict=True):
        real = user >= 0
        position, target, user = position[real], target[real], user[real]
        if not len(user):
            continue
        scores = pipe.logits(hidden[real.to(hidden.device)][torch.arange(len(user)), position]).float().cpu()
        seen = seen_items(interactions, split, which, user.numpy()) if filter_seen else None
        metrics.update(target_rank(scores, target, seen), top_k(scores, max(metrics.ks), seen))
