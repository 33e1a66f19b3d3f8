"""Streamed, sharded ranking against ds_recsys.metrics on the gathered scores: ties, filters, infinities, every cut."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_on_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recsys import metrics
from ds_recsys.head import ranking
from ds_recsys.head.candidates import highest
from ds_recsys.head.ranking import rank_all, target_rank, top_k
from ds_recsys.head.shard import HeadShard, rows_of
from ds_recsys.topology import TensorAxis


def make_case(seed, users, rows, levels, infinite=False):
    """Small integers in hidden states and weights, so that scores are exact and tie."""
    generator = torch.Generator().manual_seed(seed)
    whole = lambda *shape: torch.randint(-levels, levels + 1, shape, generator=generator).float()  # noqa: E731
    hidden, weight, bias = whole(users, 3), whole(rows, 3), None
    if infinite:
        draw = torch.rand(rows, generator=generator)
        bias = torch.zeros(rows).masked_fill(draw < 0.3, -torch.inf).masked_fill(draw > 0.8, torch.inf)
    target = torch.randint(1, rows, (users,), generator=generator)
    count = int(torch.randint(0, 2 * rows, (), generator=generator))
    excluded = (
        torch.randint(0, users, (count,), generator=generator),
        torch.randint(0, rows, (count,), generator=generator),
    )
    return hidden, target, HeadShard(weight, rows, bias=bias), excluded


def shard_of(head, axis, bounds=None):
    start, stop = bounds[axis.rank] if bounds else rows_of(head.num_rows, axis.size, axis.rank)
    bias = None if head.bias is None else head.bias[start:stop]
    return HeadShard(head.weight[start:stop], head.num_rows, start, bias, axis=axis)


def check(hidden, target, head, excluded, k, shard, block_rows):
    scores = head.scores(hidden)
    ranks, items = metrics.target_rank(scores, target, excluded), metrics.top_k(scores, k, excluded)
    losses = F.cross_entropy(scores, target, reduction="none")
    result = rank_all(hidden, target, shard, k, excluded, block_rows)
    assert torch.equal(result.ranks, ranks) and torch.equal(result.items, items)
    expected = scores.clamp(min=torch.finfo(scores.dtype).min).gather(1, items).masked_fill(items == 0, -torch.inf)
    assert torch.equal(result.scores, expected)
    finite = losses.isfinite()
    torch.testing.assert_close(result.losses[finite], losses[finite], rtol=1e-5, atol=1e-5)
    alone = top_k(hidden, shard, k, excluded, block_rows)
    assert torch.equal(alone[0], expected) and torch.equal(alone[1], items)
    alone = target_rank(hidden, target, shard, excluded, block_rows)
    assert torch.equal(alone[0], ranks)
    assert torch.equal(alone[1].nan_to_num(), result.losses.nan_to_num())


@given(
    seed=st.integers(0, 2**31),
    users=st.integers(1, 5),
    rows=st.integers(2, 60),
    levels=st.integers(0, 2),
    infinite=st.booleans(),
    k=st.integers(1, 20),
    group=st.sampled_from([1, 3, 64]),
    block=st.integers(1, 20),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_metrics_on_gathered_scores(seed, users, rows, levels, infinite, k, group, block):
    hidden, target, head, excluded = make_case(seed, users, rows, levels, infinite)
    with patch.object(ranking._Stream, "GROUP", group):
        check(hidden, target, head, excluded, k, head, block)
        check(hidden, target, head, None, k, head, block)


def rank_on_grid():
    axis = TensorAxis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())
    uneven = {2: [(0, 1), (1, None)], 3: [(0, 30), (30, 30), (30, None)]}[axis.size]
    for seed in range(30):
        rows = 40 + 11 * seed
        hidden, target, head, excluded = make_case(seed, 1 + seed % 4, rows, seed % 3, infinite=seed % 5 == 0)
        bounds = [(start, stop or rows) for start, stop in uneven] if seed % 2 else None
        with patch.object(ranking._Stream, "GROUP", 4):
            check(hidden, target, head, excluded, 1 + seed, shard_of(head, axis, bounds), 16)
    calls = []
    count = lambda name, real: lambda *a, **b: (calls.append(name), real(*a, **b))[1]  # noqa: E731
    for rows in (50, 5000):
        calls.clear()
        hidden, target, head, excluded = make_case(0, 3, rows, 1)
        shard = shard_of(head, axis)
        with (
            patch.object(dist, "all_reduce", count("reduce", dist.all_reduce)),
            patch.object(dist, "all_gather", count("gather", dist.all_gather)),
        ):
            rank_all(hidden, target, shard, 5, excluded)
            assert calls == ["reduce"] * 3 + ["gather"]
            calls.clear()
            top_k(hidden, shard, 5, excluded)
            assert calls == ["gather"]
    assert rank_all(hidden[:0], target[:0], shard, 5).items.shape == (0, 5)
    # NaN on one rank's items: all ranks raise alike.
    head.weight[-1] = torch.nan
    for call in (lambda: rank_all(hidden, target, shard, 5), lambda: top_k(hidden, shard, 5)):
        with pytest.raises(ValueError, match="row 0 hold NaN"):
            call()


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_of_any_size_rank_as_one(ranks):
    run_on_grid(rank_on_grid, ranks)


@pytest.mark.parametrize("order", ["random", "rising", "equal"])
def test_many_blocks(order):
    generator = torch.Generator().manual_seed(0)
    values = {
        "random": torch.rand(9001, generator=generator),
        "rising": torch.arange(9001.0),
        "equal": torch.ones(9001),
    }
    head = HeadShard(values[order][:, None].contiguous(), 9001)
    hidden = torch.tensor([[1.0], [0.0], [-1.0], [2.0]])
    target = torch.tensor([1, 9000, 4000, 64])
    check(hidden, target, head, (torch.zeros(50, dtype=torch.long), torch.arange(50)), 30, head, 256)


@pytest.mark.parametrize("options", [{"cosine": True, "scale": 20.0}, {"softcap": 3.0}, {"scale": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_options_and_types(options, dtype):
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(6, 8, dtype=dtype), torch.randn(200, 8, dtype=dtype), torch.arange(1, 7)
    head = HeadShard(weight, 200, **options)
    result = rank_all(hidden, target, head, 7)
    scores = head.scores(hidden)
    scores = scores if dtype == torch.float64 else scores.float()
    assert torch.equal(result.ranks, metrics.target_rank(scores, target))
    assert torch.equal(result.items, metrics.top_k(scores, 7))
    torch.testing.assert_close(result.losses, F.cross_entropy(scores, target, reduction="none").float())


def test_targets_score_as_in_their_block():
    """Rows that are the same tie whatever block they are in, for numbers that do not add up exactly too."""
    torch.manual_seed(0)
    row = torch.randn(1, 37)
    head = HeadShard(row.repeat(1000, 1), 1000)
    target = torch.tensor([1, 129, 500, 831])
    result = rank_all(torch.randn(4, 37), target, head, 5, block_rows=128)
    assert result.ranks.tolist() == target.tolist() and result.items.tolist() == [[1, 2, 3, 4, 5]] * 4


def test_padding_may_be_nan_and_mistakes_are_refused():
    hidden, target, head, _ = make_case(0, 3, 30, 1)
    head.weight[0] = torch.nan
    assert torch.equal(rank_all(hidden, target, head, 4).items, metrics.top_k(head.scores(hidden), 4))
    for wrong in (0, 30):
        with pytest.raises(ValueError, match="1..29"):
            target_rank(hidden, torch.full((3,), wrong), head)
    for excluded in ([[3], [1]], [[0], [30]], [[0], [-1]]):
        with pytest.raises(ValueError, match="excluded"):
            top_k(hidden, head, 4, tuple(torch.tensor(excluded)))
    with pytest.raises(ValueError, match="k=0"):
        top_k(hidden, head, 0)
    head.weight[7] = torch.nan
    with pytest.raises(ValueError, match="row 0 hold NaN"):
        top_k(hidden, head, 4)
    assert len(rank_all(hidden[:0], target[:0], head, 4).ranks) == 0


def test_highest_takes_the_first_of_equals():
    assert highest(torch.tensor([[1.0, 2, 2, 0, 2], [0, 0, 0, 0, 0]]), 2).tolist() == [[1, 2], [0, 1]]
