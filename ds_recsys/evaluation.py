"""Full-ranking evaluation under the training grid: each data rank scores its users on its last stage."""

from collections.abc import Sequence
from itertools import islice

import torch

from ds_recsys import compat
from ds_recsys.comm.groups import data_place, survivors
from ds_recsys.data.batches import EvalBatches
from ds_recsys.head.ranking import rank_all
from ds_recsys.metrics import RankingMetrics, seen_items


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
    length_multiple: int = 1,
) -> dict[str, float]:
    """Rank every user's held-out item against the whole catalogue. Collective; every rank gets the same figures.

    Scores stay on the last stage of each pipeline, one block of items at a time, each tensor rank scoring the items it
    holds; what crosses data ranks at the end is a few sums and one counter per item. With a split head every stage scores
    the items it holds.

    Args:
        engine: a PipelineEngine over a `RecommenderPipe`.
        which: "valid" or "test".
        batch_size: users per forward pass and data rank.
        ks: cut-offs of HR, NDCG and coverage.
        filter_seen: leave out what is in the user's history (all of it, not only the model's window).
        length_multiple: of the padded histories; sequence parallelism needs the size of the tensor axis.

    Returns:
        {"HR@10": ..., "NDCG@10": ..., "MRR": ..., "coverage@10": ..., "loss": mean cross-entropy of the targets in nats,
        over the whole catalogue, nothing filtered}
    """
    grid = engine.grid
    data_rank, data_size = data_place(engine)
    batches = EvalBatches(
        interactions,
        split,
        which,
        max_length=max_length,
        batch_size=batch_size,
        data_size=data_size,
        data_rank=data_rank,
        length_multiple=length_multiple,
    )

    def seen(users):
        return seen_items(interactions, split, which, users.numpy()) if filter_seen else None

    metrics, loss = RankingMetrics(ks, interactions.num_items), torch.zeros(1, dtype=torch.float64)
    ranks_items = engine.is_last_stage() or engine.module.split_head is not None
    head = engine.module.head() if ranks_items else None
    for group in _groups(batches, 2 * engine.num_stages):  # enough micro-batches in flight to fill the pipeline
        outputs = compat.forward_only(engine, group, len(group))
        if not ranks_items:
            continue
        for ranking in _rankings(engine.module, head, outputs, group, max(metrics.ks), seen):
            metrics.update(ranking.ranks, ranking.items)
            loss += ranking.losses.double().sum().cpu()
    state = torch.cat([loss, metrics.state()])
    if not engine.is_last_stage() or grid.get_slice_parallel_rank():  # tensor ranks have the same figures: one counts
        state.zero_()
    state = state.to(engine.device)
    torch.distributed.all_reduce(state, group=survivors(engine))
    state = state.cpu()
    metrics.load_state(state[1:])
    return {**metrics.compute(), "loss": (state[0] / batches.num_users).item()}


def _groups(batches, size):
    batches = iter(batches)
    while group := list(islice(batches, size)):
        yield group


@torch.no_grad()
def _rankings(pipe, head, outputs, group, k, seen):
    """Per micro-batch the `Ranking` of its users; filler rows are left out. Stages without outputs rank what they hold."""
    for hidden, (_, (position, target, user)) in zip(outputs or [None] * len(group), group, strict=True):
        real = user >= 0
        position, target, user = position[real], target[real], user[real]
        if not len(user):
            continue
        states = None
        if hidden is not None:
            rows = hidden[real.to(hidden.device)]
            states = pipe.head_input(rows[torch.arange(len(user)), position])
        if pipe.split_head is not None:
            states = pipe.to_every_stage(states, len(user))
        yield rank_all(states, target.to(states.device), head, k, seen(user))
