"""Sampled losses against plain formulas, against the full softmax, on one rank and on several."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_on_grid

from ds_recsys.head.negatives import InBatchNegatives, Negatives, PopularityNegatives, UniformNegatives
from ds_recsys.head.sampled_softmax import IGNORE, _paired, gbce, sampled_cross_entropy
from ds_recsys.head.shard import HeadShard, rows_of
from ds_recsys.topology import TensorAxis

OPTIONS = [{}, {"scale": 3.0, "cosine": True}, {"softcap": 2.0, "scale": 1.5}, {"bias": True}]


def make(rows=41, positions=12, width=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator, dtype=dtype)
    weight = torch.randn(rows, width, generator=generator, dtype=dtype)
    bias = torch.randn(rows, generator=generator, dtype=dtype)
    target = torch.randint(1, rows, (positions,), generator=generator)
    counts = torch.randint(0, 50, (rows,), generator=generator)
    return hidden, weight, bias, target, counts


def head_of(weight, bias, options, start=0, stop=None, axis=None):
    weight, num_rows = weight[start:stop].clone().requires_grad_(), len(weight)
    options = dict(options)
    if options.pop("bias", False):
        options["bias"] = bias[start:stop].clone().requires_grad_()
    return HeadShard(weight, num_rows, start, axis=axis or TensorAxis(), **options)


def gradients(loss, hidden, head):
    loss.backward()
    tensors = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return [t.grad.to_dense() if t.grad.is_sparse else t.grad for t in tensors]


def plain_sampled(scores, target, items, log_expected, reduction="sum"):
    """Softmax over the target and the negatives, written out with one row of logits per position."""
    corrected = (scores[:, items] - log_expected).masked_fill(items == target[:, None], -torch.inf)
    logits = torch.cat([scores.gather(1, target[:, None]), corrected], 1)
    return F.cross_entropy(logits, torch.zeros(len(target), dtype=torch.long), reduction=reduction)


def plain_gbce(scores, target, items, num_items, t):
    alpha = min(1.0, len(items) / (num_items - 1))
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    loss = 0.0
    for row, wanted in zip(scores, target.tolist(), strict=True):
        loss = loss - beta * torch.log(torch.sigmoid(row[wanted]))
        loss = loss + torch.log(1 + torch.exp(row[items[items != wanted]])).sum()
    return loss / (len(items) + 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
def test_equals_the_full_softmax_when_every_item_is_drawn(options, sparse):
    hidden, weight, bias, target, _ = make()
    target[3] = IGNORE
    results = []
    for full in (True, False):
        head, states = head_of(weight, bias, options), hidden.clone().requires_grad_()
        if full:  # over items 1..I: padding is never drawn
            loss = F.cross_entropy(head.scores(states)[:, 1:], (target - 1).where(target > 0, IGNORE), reduction="sum")
        else:
            negatives = UniformNegatives(head, 40)(target, seed=1)
            assert negatives.rows.tolist() == list(range(1, 41)) and negatives.total == 40
            loss = sampled_cross_entropy(states, target, head, negatives, sparse=sparse)
            loss.backward(retain_graph=True)
            assert head.weight.grad.is_sparse == sparse
            head.weight.grad = states.grad = None
            if head.bias is not None:
                head.bias.grad = None
        results.append([loss, *gradients(loss, states, head)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_a_plain_formula(options):
    hidden, weight, bias, target, counts = make()
    negatives = PopularityNegatives(head_of(weight, bias, {}), 60, counts)(target, seed=2)
    assert (negatives.rows[:, None] == target).any(), "no accidental hit to test"
    for plain, ours in (
        (
            lambda h, head: plain_sampled(head.scores(h), target, negatives.rows, negatives.log_expected),
            lambda h, head: sampled_cross_entropy(h, target, head, negatives),
        ),
        (
            lambda h, head: plain_gbce(head.scores(h), target, negatives.rows, 200, 0.6),
            lambda h, head: gbce(h, target, head, negatives, num_items=200, calibration=0.6),
        ),
    ):
        results = []
        for compute in (plain, ours):
            head, states = head_of(weight, bias, options), hidden.clone().requires_grad_()
            loss = compute(states, head)
            results.append([loss, *gradients(loss, states, head)])
        torch.testing.assert_close(results[0], results[1])


def test_reductions_and_ignored_positions():
    hidden, weight, bias, target, _ = make()
    target[::3] = IGNORE
    head = head_of(weight, bias, {})
    negatives = UniformNegatives(head, 9)(target, 0)
    for loss in (sampled_cross_entropy, lambda *a, **b: gbce(*a, **b, num_items=40)):
        each = loss(hidden, target, head, negatives, reduction="none")
        assert each.shape == target.shape and (each[::3] == 0).all() and (each[1::3] > 0).all()
        torch.testing.assert_close(loss(hidden, target, head, negatives), each.sum())
        torch.testing.assert_close(loss(hidden, target, head, negatives, reduction="mean"), each.sum() / 8)
        kept = target != IGNORE
        torch.testing.assert_close(loss(hidden[kept], target[kept], head, negatives), each.sum())
        with pytest.raises(ValueError, match="reduction"):
            loss(hidden, target, head, negatives, reduction="max")
        for wrong in (0, 41):
            with pytest.raises(ValueError, match="1..40"):
                loss(hidden, torch.full((12,), wrong), head, negatives)


def test_gradient_holds_the_rows_that_took_part_and_no_others():
    hidden, weight, bias, target, _ = make(rows=2000)
    head = head_of(weight, bias, {})
    negatives = UniformNegatives(head, 20)(target, 0)
    sampled_cross_entropy(hidden, target, head, negatives).backward()
    rows = head.weight.grad.coalesce().indices()[0]
    assert rows.tolist() == sorted({*target.tolist(), *negatives.rows.tolist()})
    # Accumulation over micro-batches stays sparse, and a micro-batch without targets does too.
    gbce(hidden, torch.full_like(target, IGNORE), head, negatives, num_items=1999).backward()
    loss = sampled_cross_entropy(hidden, torch.full_like(target, IGNORE), head, negatives)
    loss.backward()
    assert loss == 0 and head.weight.grad.is_sparse and len(head.weight.grad.coalesce().indices()[0]) == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_large_scores(dtype):
    hidden, weight, bias, target, counts = make(dtype=dtype)
    for factor in (1, 1000):
        head, states = head_of(weight * factor, bias, {}), hidden.clone().requires_grad_()
        negatives = PopularityNegatives(head, 30, counts)(target, 0)
        loss = sampled_cross_entropy(states, target, head, negatives)
        expected = plain_sampled(head.scores(states).float(), target, negatives.rows, negatives.log_expected)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-3)
        loss.backward()
        assert states.grad.isfinite().all() and states.grad.dtype == dtype


def test_target_scores_of_low_precision_add_up_in_fp32():
    hidden, weight, bias, _, _ = make(rows=12, width=300, dtype=torch.bfloat16)
    exact = (hidden.double() * weight.double()).sum(1)
    torch.testing.assert_close(_paired(hidden, HeadShard(weight, 12)), exact.float(), rtol=1e-5, atol=1e-5)


def full_gradients(hidden, weight, target):
    head, states = HeadShard(weight.clone().requires_grad_(), len(weight)), hidden.clone().requires_grad_()
    return gradients(F.cross_entropy(head.scores(states)[:, 1:], target - 1, reduction="sum"), states, head)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_expected_gradient_is_the_full_one(kind):
    hidden, weight, _, target, counts = make(positions=4)
    weight = weight * 0.3
    head = HeadShard(weight, 41)
    # Z-scores of every entry of the mean gradient; the logarithm of an unbiased sum is biased by its variance / 2.
    sampler = UniformNegatives(head, 30) if kind == "uniform" else PopularityNegatives(head, 600, counts)
    draws = []
    for seed in range(1500):
        head, states = HeadShard(weight.clone().requires_grad_(), 41), hidden.clone().requires_grad_()
        loss = sampled_cross_entropy(states, target, head, sampler(target, seed))
        draws.append(torch.cat([g.flatten() for g in gradients(loss, states, head)]))
    check_mean(torch.stack(draws), torch.cat([g.flatten() for g in full_gradients(hidden, weight, target)]))


def test_expected_gradient_is_the_full_one_in_batch():
    """Of one position; the targets of the others are independent draws by popularity."""
    hidden, weight, _, _, counts = make(rows=9, positions=60)
    weight, counts = weight * 0.3, counts.clamp(min=4)
    sampler = InBatchNegatives(HeadShard(weight, 9), counts)
    generator = torch.Generator().manual_seed(0)
    draws, head = [], HeadShard(weight, 9)
    for _ in range(3000):
        others = 1 + torch.multinomial(counts[1:].double(), 59, replacement=True, generator=generator)
        target, states = torch.cat([torch.tensor([2]), others]), hidden.clone().requires_grad_()
        sampled_cross_entropy(states, target, head, sampler(target)).backward()
        draws.append(states.grad[0])
    check_mean(torch.stack(draws), full_gradients(hidden[:1], weight, torch.tensor([2]))[0][0])


def check_mean(draws, expected):
    error = draws.mean(0) - expected
    deviation = draws.std(0) / len(draws) ** 0.5
    assert (error.abs() <= 5 * deviation + 2e-3 * expected.abs().max()).all(), (error / deviation, expected)
    assert deviation.max() < 0.02 * expected.abs().max(), "too few draws to tell"


def sampled_on_grid():
    axis = TensorAxis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())
    rows = 41
    cuts = [rows_of(rows, axis.size, axis.rank)]
    cuts += [{2: [(0, 1), (1, rows)], 3: [(0, 30), (30, 30), (30, rows)]}[axis.size][axis.rank]]
    for index, options in enumerate(OPTIONS):
        _check_shard(axis, *cuts[index % 2], options)
    # Each rank's own draw, from 1000 items each.
    rows = 1 + 1000 * axis.size
    shard = head_of(make(rows=rows)[1], None, {}, *rows_of(rows, axis.size, axis.rank), axis)
    draw = UniformNegatives(shard, 25 * axis.size)
    drawn = everyone((draw(None, 0).rows, draw.total), axis)
    assert (drawn[0][0] - drawn[1][0]).abs().max() > 5, "both took the same places of their pieces"
    assert {total for _, total in drawn} == {sum(len(rows) for rows, _ in drawn)}
    _check_collectives(axis)
    _check_a_shard_that_is_out_of_the_question(axis)


def everyone(value, axis):
    values = [None] * axis.size
    dist.all_gather_object(values, value)
    return values


def _check_shard(axis, start, stop, options):
    hidden, weight, bias, target, counts = make()
    target[5] = IGNORE
    kept = target != IGNORE
    shard = lambda: head_of(weight, bias, options, start, stop, axis)  # noqa: E731
    samplers = [
        UniformNegatives(shard(), 40),
        UniformNegatives(shard(), 10),
        PopularityNegatives(shard(), 30, counts),
        InBatchNegatives(shard(), counts),
    ]
    for index, sampler in enumerate(samplers):
        negatives = sampler(target[kept], seed=index)
        everywhere = everyone((negatives.rows + start, negatives.log_expected), axis)
        items, log_expected = (torch.cat(parts) for parts in zip(*everywhere, strict=True))
        assert negatives.total == len(items) and 0 not in items
        for ours, plain in (
            (
                lambda h, head, negatives=negatives: sampled_cross_entropy(h, target, head, negatives),
                lambda s, t, items=items, log_expected=log_expected: plain_sampled(s, t, items, log_expected),
            ),
            (
                lambda h, head, negatives=negatives: gbce(h, target, head, negatives, num_items=40),
                lambda s, t, items=items: plain_gbce(s, t, items, 40, 0.75),
            ),
        ):
            head, states = shard(), hidden.clone().requires_grad_()
            loss = ours(states, head)
            ours_gradients = gradients(loss, states, head)
            assert len({value.item() for value in everyone(loss.detach(), axis)}) == 1
            if index == 0:
                assert items.tolist() == list(range(1, 41)) and (log_expected == 0).all()
            whole, states = head_of(weight, bias, options), hidden.clone().requires_grad_()
            reference = plain(whole.scores(states[kept]), target[kept])
            expected = gradients(reference, states, whole)
            torch.testing.assert_close(loss, reference)
            torch.testing.assert_close(ours_gradients, [expected[0], *(g[start:stop] for g in expected[1:])])


def _check_collectives(axis):
    for rows in (50, 3000):
        hidden, weight, bias, target, _ = make(rows=rows)
        head = head_of(weight, bias, {}, *rows_of(rows, axis.size, axis.rank), axis)
        for wanted in (target, torch.full_like(target, IGNORE)):
            negatives, states = UniformNegatives(head, 40)(wanted, 0), hidden.clone().requires_grad_()
            for compute, forward in (
                (lambda *a: sampled_cross_entropy(*a), 2),
                (lambda *a: gbce(*a, num_items=100), 1),
            ):
                with patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce:
                    loss = compute(states, wanted, head, negatives)
                    assert reduce.call_count == forward
                    loss.backward()
                    assert reduce.call_count == forward + 1
                assert (loss == 0) == (wanted is not target)


def _check_a_shard_that_is_out_of_the_question(axis):
    hidden, weight, bias, _, _ = make()
    start, stop = rows_of(41, axis.size, axis.rank)
    bias[rows_of(41, axis.size, axis.size - 1)[0] :] = -torch.inf
    head, states = head_of(weight, bias, {"bias": True}, start, stop, axis), hidden.clone().requires_grad_()
    target = torch.arange(1, 13)
    loss = sampled_cross_entropy(states, target, head, UniformNegatives(head, 40)(target, 0))
    loss.backward()
    whole, expected = head_of(weight, bias, {"bias": True}), hidden.clone().requires_grad_()
    reference = F.cross_entropy(whole.scores(expected)[:, 1:], target - 1, reduction="sum")
    reference.backward()
    torch.testing.assert_close([loss, states.grad], [reference, expected.grad])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_equal_a_plain_formula(ranks):
    run_on_grid(sampled_on_grid, ranks)


def test_one_rank_sends_nothing():
    hidden, weight, bias, target, _ = make()
    head = head_of(weight, bias, {})
    with patch.object(dist, "all_reduce") as reduce, patch.object(dist, "all_gather") as gather:
        negatives = UniformNegatives(head, 5)(target, 0)
        sampled_cross_entropy(hidden, target, head, negatives).backward()
        gbce(hidden, target, head, negatives, num_items=40).backward()
    assert not reduce.called and not gather.called
    empty = Negatives(torch.zeros(0, dtype=torch.long), torch.zeros(0), 0)
    assert sampled_cross_entropy(hidden, target, head, empty).abs() < 1e-9
