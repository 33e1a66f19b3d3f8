"""Ranks, ties, filters and metrics: against torchmetrics, and against the definitions spelt out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recsys.data import leave_one_out, read_interactions
from ds_recsys.errors import UserError
from ds_recsys.metrics import RankingMetrics, seen_items, target_rank, top_k


def flat(seen: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [(row, item) for row, items in enumerate(seen) for item in items]
    rows, items = zip(*pairs, strict=True) if pairs else ((), ())
    return torch.tensor(rows, dtype=torch.long), torch.tensor(items, dtype=torch.long)


@st.composite
def tied_scores(draw):
    """Few distinct scores, so that nearly everything ties; some are infinite."""
    rows, items = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, np.inf])
    scores = draw(st.lists(st.lists(values, min_size=items + 1, max_size=items + 1), min_size=rows, max_size=rows))
    target = draw(st.lists(st.integers(1, items), min_size=rows, max_size=rows))
    seen = draw(st.lists(st.lists(st.integers(1, items)), min_size=rows, max_size=rows))
    return torch.tensor(scores, dtype=torch.float32), target, seen


@given(tied_scores(), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_ties_and_filters_by_brute_force(case, k):
    scores, target, seen = case
    before = scores.clone()
    ranks = target_rank(scores, torch.tensor(target), flat(seen))
    best = top_k(scores, k, flat(seen))
    assert torch.equal(scores, before)
    for row, wanted in enumerate(target):
        order = sorted(range(1, scores.shape[1]), key=lambda item: (-scores[row, item].item(), item))
        candidates = [item for item in order if item == wanted or item not in seen[row]]
        assert ranks[row] == 1 + candidates.index(wanted)
        allowed = [item for item in order if item not in seen[row]]
        assert best[row].tolist() == (allowed + [0] * k)[:k]


def test_rank_and_top_k_agree_on_large_tied_catalogues():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (64, 3000), generator=generator).float()
    best = top_k(scores, 20)
    for place in range(20):
        assert (target_rank(scores, best[:, place]) == place + 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types(dtype):
    scores = torch.tensor([[9, 1, 3, 3, 2]], dtype=dtype)
    assert top_k(scores, 3).tolist() == [[2, 3, 4]] and target_rank(scores, torch.tensor([3])).tolist() == [2]


def test_nan_scores_and_targets_outside_the_catalogue_are_refused():
    scores = torch.zeros(3, 5)
    scores[1, 0] = torch.nan  # padding may hold anything
    assert target_rank(scores, torch.tensor([1, 2, 3])).tolist() == [1, 2, 3]
    scores[1, 4] = torch.nan
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        target_rank(scores, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        top_k(scores, 2)
    for target in (0, 5):
        with pytest.raises(ValueError, match="1..4"):
            target_rank(torch.zeros(1, 5), torch.tensor([target]))


@pytest.mark.parametrize("filter_seen", [False, True])
def test_metrics_equal_torchmetrics(filter_seen):
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

    users, items = 50, 40
    generator = torch.Generator().manual_seed(0)
    # A permutation per row: no ties, whose order torchmetrics leaves open. Above 0: its MRR takes a target with another
    # score for not retrieved.
    scores = 1 + torch.stack([torch.randperm(items + 1, generator=generator) for _ in range(users)]).float()
    target = torch.randint(1, items + 1, (users,), generator=generator)
    seen = torch.rand(users, items + 1, generator=generator) < (0.4 if filter_seen else 0)
    seen[:, 0] = False
    seen[torch.arange(users), target] = False
    pairs = tuple(seen.nonzero().T)
    metrics = RankingMetrics([1, 5, 10], items)
    metrics.update(target_rank(scores, target, pairs), top_k(scores, 10, pairs))
    result = metrics.compute()

    relevant = torch.nn.functional.one_hot(target, items + 1).masked_fill(seen, -1)[:, 1:].flatten()
    predictions, indexes = scores[:, 1:].flatten(), torch.arange(users).repeat_interleave(items)
    expected = {"MRR": RetrievalMRR(ignore_index=-1)}
    for k in (1, 5, 10):
        expected[f"HR@{k}"] = RetrievalHitRate(top_k=k, ignore_index=-1)
        expected[f"NDCG@{k}"] = RetrievalNormalizedDCG(top_k=k, ignore_index=-1)
    for name, metric in expected.items():
        assert result[name] == pytest.approx(metric(predictions, relevant, indexes=indexes).item(), abs=1e-6), name
    recall = RetrievalRecall(top_k=5, ignore_index=-1)(predictions, relevant, indexes=indexes)
    assert result["HR@5"] == pytest.approx(recall.item(), abs=1e-6)


def test_metrics_by_hand():
    metrics = RankingMetrics([1, 3], 10)
    metrics.update(torch.tensor([1, 3, 7]), torch.tensor([[4, 2, 3], [4, 5, 2], [6, 0, 0]]))
    assert metrics.compute() == pytest.approx(
        {
            "HR@1": 1 / 3,
            "HR@3": 2 / 3,
            "NDCG@1": 1 / 3,
            "NDCG@3": (1 + 0.5) / 3,
            "MRR": (1 + 1 / 3 + 1 / 7) / 3,
            "coverage@1": 2 / 10,  # items 4 and 6
            "coverage@3": 5 / 10,  # 2 to 6; 0 is no item
        }
    )


def test_states_add_up():
    generator = torch.Generator().manual_seed(1)
    scores, target = torch.randn(30, 21, generator=generator), torch.randint(1, 21, (30,), generator=generator)
    whole, parts = RankingMetrics([2, 5], 20), [RankingMetrics([2, 5], 20) for _ in range(3)]
    whole.update(target_rank(scores, target), top_k(scores, 5))
    for part, rows in zip(parts, torch.arange(30).split([4, 0, 26]), strict=True):
        part.update(target_rank(scores[rows], target[rows]), top_k(scores[rows], 5))
    merged = RankingMetrics([2, 5], 20)
    merged.load_state(sum(part.state() for part in parts))
    assert merged.compute() == pytest.approx(whole.compute(), abs=1e-12)
    merged.update(target_rank(scores, target), top_k(scores, 5))
    assert whole.state()[0] == 30 and merged.state()[0] == 60  # loading copies


def test_metrics_refuse_what_has_no_meaning():
    with pytest.raises(UserError, match="no user"):
        RankingMetrics([1], 3).compute()
    with pytest.raises(ValueError, match="cut-off"):
        RankingMetrics([], 3)
    with pytest.raises(ValueError, match="at least 5"):
        RankingMetrics([5], 9).update(torch.tensor([1]), torch.tensor([[1, 2]]))


def test_seen_items_are_the_whole_history_before_the_target(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("a 1 2 3 4\nb 5 6\nc 7 2 7 1 3\n")
    interactions = read_interactions(log, "s3rec")
    split = leave_one_out(interactions)
    users = np.array([2, 0])
    for which, held in (("valid", 2), ("test", 1)):
        rows, items = seen_items(interactions, split, which, users)
        assert rows.dtype == items.dtype == torch.int64
        for row, user in enumerate(users):
            assert items[rows == row].tolist() == interactions.history(user)[:-held].tolist()
    assert all(len(part) == 0 for part in seen_items(interactions, split, "test", users[:0]))
