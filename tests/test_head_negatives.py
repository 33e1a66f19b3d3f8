"""What is drawn, and whether it is drawn as often as the samplers say."""

import math

import pytest
import torch

from ds_recsys.head.negatives import InBatchNegatives, PopularityNegatives, UniformNegatives, mix_seed
from ds_recsys.head.shard import HeadShard


def expected_counts(sampler, rows, draws):
    counts = torch.zeros(rows, dtype=torch.float64)
    stated = torch.full((rows,), torch.nan, dtype=torch.float64)
    for seed in range(draws):
        negatives = sampler(None, seed)
        counts += torch.bincount(negatives.rows, minlength=rows)
        stated[negatives.rows] = negatives.log_expected.double().exp()
    return counts / draws, stated


@pytest.mark.parametrize("first_row", [0, 13])
def test_draws_are_as_often_as_stated(first_row):
    counts = torch.arange(90) % 17
    counts[first_row + 5] = 400  # comes several times in one draw
    head = HeadShard(torch.zeros(37, 1), 90, first_row)
    for sampler in (UniformNegatives(head, 11), PopularityNegatives(head, 11, counts)):
        real, stated = expected_counts(sampler, 37, 4000)
        assert not stated[1:].isnan().any(), "an item is never drawn"
        assert stated[0].isnan() == (first_row == 0)
        torch.testing.assert_close(stated.nansum().item(), 11.0, rtol=1e-5, atol=0)
        deviation = (stated * 1 / 4000).sqrt().nan_to_num()
        assert ((real - stated.nan_to_num()).abs() <= 5 * deviation + 1e-9).all()
    rows = UniformNegatives(head, 11)(None, 3).rows
    assert len(rows.unique()) == 11 and (rows.diff() > 0).all()
    assert (PopularityNegatives(head, 11, counts)(None, 3).rows.diff() >= 0).all()
    assert torch.equal(rows, UniformNegatives(head, 11)(None, 3).rows)
    assert not torch.equal(rows, UniformNegatives(head, 11)(None, 4).rows)


def test_in_batch_negatives_are_the_targets():
    counts = torch.tensor([99, 1, 0, 6, 2])
    sampler = InBatchNegatives(HeadShard(torch.zeros(5, 1), 5), counts)
    negatives = sampler(torch.tensor([3, 1, 3, 4]), 0)
    assert negatives.rows.tolist() == [1, 3, 4] and negatives.total == 3
    torch.testing.assert_close(
        negatives.log_expected, torch.tensor([math.log(1 - (1 - c / 10) ** 3) for c in (1, 6, 2)])
    )
    assert sampler(torch.tensor([2]), 0).log_expected.isfinite().all()


def test_expected_counts_follow_a_power_of_the_counts():
    counts, head = torch.tensor([7, 16, 81, 0, 1]), HeadShard(torch.zeros(5, 1), 5)
    negatives = PopularityNegatives(head, 1000, counts, power=0.75)(None, 0)
    expected = dict(zip(negatives.rows.tolist(), negatives.log_expected.exp().tolist(), strict=True))
    shares = {1: 8, 2: 27, 3: 1, 4: 1}  # an item that never occurred counts as one
    for item, share in shares.items():
        assert expected[item] == pytest.approx(1000 * share / 37)


def test_mistakes_in_sampling_are_refused_and_seeds_differ():
    head = HeadShard(torch.zeros(5, 1), 5)
    with pytest.raises(ValueError, match="number=0"):
        UniformNegatives(head, 0)
    with pytest.raises(ValueError, match="4 counts for a table of 5"):
        PopularityNegatives(head, 3, torch.ones(4))
    assert len({mix_seed(a, b) for a in range(20) for b in range(20)}) == 400
