"""The cross-entropy block by block against the unsplit one: losses, gradients, everything a head can have."""

import pytest
import torch
import torch.nn.functional as F

from ds_recsys.head import split
from ds_recsys.head.linear_cross_entropy import linear_cross_entropy
from ds_recsys.head.shard import IGNORE, HeadShard, rows_of
from ds_recsys.head.split import SplitHead

ROWS, WIDTH = 101, 8
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.1, "bias": True},
    "softcap": {"softcap": 3.0, "bias": True},
    "cosine": {"cosine": True},
    "smoothing and softcap": {"label_smoothing": 0.1, "softcap": 3.0},
}


def _problem(dtype=torch.float64, bias=False, spread=1.0, positions=23):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64) * spread  # noqa: E731
    hidden, weight = draw(2, positions, WIDTH), draw(ROWS, WIDTH)
    target = torch.randint(0, ROWS, (2, positions), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE
    values = [hidden, weight] + ([draw(ROWS)] if bias else [])
    return [value.to(dtype).requires_grad_() for value in values], target


def _whole(values, target, label_smoothing=0.0, **head):
    hidden, weight, *bias = values
    shard = HeadShard(weight, ROWS, bias=bias[0] if bias else None, scale=1.7, **head)
    return linear_cross_entropy(hidden, target, shard, label_smoothing=label_smoothing)


def _carry(values, target, options, **head):
    hidden, weight, *bias = values
    carried = split.begin(F.normalize(hidden, dim=-1) if head.get("cosine") else hidden, target, options)
    for index in range(options.blocks):
        rows = slice(*rows_of(ROWS, options.blocks, index))
        part = bias[0][rows] if bias else None
        shard = HeadShard(weight[rows], ROWS, first_row=rows.start, bias=part, scale=1.7, **head)
        carried = split.add_block(carried, shard, options)
    return carried


def _split(values, target, blocks, label_smoothing=0.0, compute_dtype=None, **head):
    options = SplitHead(blocks, label_smoothing, compute_dtype)
    return split.losses(_carry(values, target, options, **head), ROWS, options).sum()


def _both(blocks, dtype=torch.float64, bias=False, positions=23, spread=1.0, compute_dtype=None, **options):
    results = []
    for loss_of in (_whole, lambda *a, **o: _split(*a, blocks, compute_dtype=compute_dtype, **o)):
        values, target = _problem(dtype, bias, spread, positions)
        loss = loss_of(values, target, **options)
        (0.7 * loss).backward()
        results.append((loss.detach(), *(value.grad for value in values)))
    return zip(*results, strict=True)


@pytest.mark.parametrize("blocks", [1, 4, ROWS])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_unsplit_heads(kind, blocks):
    for whole, parts in _both(blocks, **KINDS[kind]):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [2, 23], ids=["exponentials kept", "computed twice"])
def test_fp32(positions):
    for whole, parts in _both(4, torch.float32, bias=True, positions=positions):
        torch.testing.assert_close(parts, whole, rtol=2e-6, atol=2e-6)


def test_bf16_carries_its_sums_in_fp32():
    values, target = _problem(torch.bfloat16)
    assert _carry(values, target, SplitHead(4)).dtype == torch.float32
    for whole, parts in _both(4, torch.bfloat16):
        torch.testing.assert_close(parts.float(), whole.float(), rtol=2e-2, atol=2e-2)
    for whole, parts in _both(4, torch.float32, compute_dtype=torch.bfloat16):
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts, whole, rtol=5e-2, atol=5e-2)


def test_scores_far_apart():
    """Between blocks whose scores differ by hundreds, a chain of derivatives would underflow."""
    for whole, parts in _both(7, torch.float32, bias=True, spread=30.0):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_frozen_rows_or_hidden_states():
    for frozen in (0, 1):
        grads = []
        for loss_of in (_whole, lambda values, target: _split(values, target, 4)):
            values, target = _problem()
            values[frozen].requires_grad_(False)
            loss_of(values, target).backward()
            assert values[frozen].grad is None
            grads.append(values[1 - frozen].grad)
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_nothing_supervised():
    values, target = _problem(bias=True)
    loss = _split(values, torch.full_like(target, IGNORE), 4)
    loss.backward()
    assert loss == 0 and all(not value.grad.any() for value in values)


def test_targets_are_carried_exactly():
    last = split.LARGEST_TABLE - 1
    target = torch.tensor([[IGNORE, 0, last, last - 1]])
    carried = split.begin(torch.zeros(1, 4, 2, dtype=torch.bfloat16), target, SplitHead(2))
    assert torch.equal(split.targets_of(carried, SplitHead(2)), target)
    with pytest.raises(ValueError, match=f"target {last} is no row of a table of 10"):
        split.losses(carried, 10, SplitHead(2))
