"""The blockwise, sharded cross-entropy against F.cross_entropy of all scores at once."""

import importlib
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_on_grid

from ds_recsys.head import gemm, softmax
from ds_recsys.head.blocks import Exponentials
from ds_recsys.head.linear_cross_entropy import IGNORE, linear_cross_entropy
from ds_recsys.head.reductions import combine
from ds_recsys.head.shard import HeadShard, rows_of
from ds_recsys.topology import TensorAxis

module = importlib.import_module("ds_recsys.head.linear_cross_entropy")

_OPTIONS = [
    {},
    {"bias": True},
    {"scale": 0.3, "label_smoothing": 0.1},
    {"softcap": 2.0, "scale": 1.5, "bias": True, "label_smoothing": 0.2},
    {"cosine": True, "scale": 8.0},
    {"cosine": True, "softcap": 3.0, "scale": 4.0, "bias": True, "label_smoothing": 1.0},
]


def _problem(positions=13, width=8, rows=101, bias=False, dtype=torch.float64, spread=1.0, seed=0):
    """hidden, target with dropped positions and a repeated item, weight, bias or None"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, width, generator=generator, dtype=torch.float64).mul(spread)
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    target = torch.randint(rows, (positions,), generator=generator)
    target[1], target[2], target[5] = IGNORE, target[0], IGNORE
    offset = torch.randn(rows, generator=generator, dtype=torch.float64) if bias else None
    values = [None if v is None else v.to(dtype).requires_grad_() for v in (hidden, weight, offset)]
    return values[0], target, values[1], values[2]


def _reference(hidden, target, weight, bias, *, label_smoothing=0.0, reduction="sum", **head):
    scores = HeadShard(weight, len(weight), bias=bias, **head).scores(hidden)
    return F.cross_entropy(scores, target, reduction=reduction, label_smoothing=label_smoothing, ignore_index=IGNORE)


def _results(loss, *values, upstream=None):
    """loss and the gradients of the given leaves, which are reset"""
    loss.backward(upstream)
    results = [loss.detach()] + [v.grad for v in values if v is not None]
    for value in values:
        if value is not None:
            value.grad = None
    return results


def _both(options, reduction="sum", block_rows=None, compute_dtype=None, **problem):
    options = dict(options)
    hidden, target, weight, bias = _problem(bias=options.pop("bias", False), **problem)
    smoothing = options.pop("label_smoothing", 0.0)
    upstream = torch.linspace(0.5, 2, len(target), dtype=torch.float64) if reduction == "none" else None
    head = HeadShard(weight, len(weight), bias=bias, **options)
    got = linear_cross_entropy(
        hidden,
        target,
        head,
        label_smoothing=smoothing,
        reduction=reduction,
        block_rows=block_rows,
        compute_dtype=compute_dtype,
    )
    got = _results(got, hidden, weight, bias, upstream=upstream)
    want = _reference(hidden, target, weight, bias, label_smoothing=smoothing, reduction=reduction, **options)
    return got, _results(want, hidden, weight, bias, upstream=upstream)


@pytest.mark.parametrize("options", _OPTIONS, ids=str)
@pytest.mark.parametrize("positions", [7, 13])  # fewer and more than H = 8: exponentials kept, or computed again
@pytest.mark.parametrize("block_rows", [16, None])
def test_parity_on_one_rank(options, positions, block_rows):
    for got, want in zip(*_both(options, positions=positions, block_rows=block_rows), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for got, want in zip(*_both(options, positions=positions, block_rows=block_rows, dtype=torch.float32), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_reductions(reduction):
    for got, want in zip(*_both({"label_smoothing": 0.1}, reduction, block_rows=16), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_batch_dims_and_gradcheck():
    hidden, target, weight, bias = _problem(positions=6, width=4, rows=9, bias=True)
    head = HeadShard(weight, 9, bias=bias, softcap=2.0, cosine=True)
    for reduction, shape in (("none", (2, 3)), ("mean", ())):
        for options in ({}, {"softcap": None, "cosine": False, "scale": 0.7}):

            def loss(hidden, weight, bias, options=options, reduction=reduction):
                shard = replace(head, weight=weight, bias=bias, **options)
                return linear_cross_entropy(hidden, target.view(2, 3), shard, reduction=reduction, block_rows=4)

            values = (hidden.detach().view(2, 3, 4).requires_grad_(), weight, bias)
            assert loss(*values).shape == shape
            assert torch.autograd.gradcheck(loss, values, nondet_tol=1e-10)  # a second backward computes scores again


def test_gradients_accumulate_and_the_graph_can_be_kept():
    for positions in (7, 13):
        hidden, target, weight, _ = _problem(positions=positions)
        want = _results(_reference(hidden, target, weight, None), hidden, weight)
        loss = linear_cross_entropy(hidden, target, HeadShard(weight, len(weight)), block_rows=16)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)  # the first has overwritten what it kept
        linear_cross_entropy(hidden, target, HeadShard(weight, len(weight)), block_rows=16).backward()
        torch.testing.assert_close(hidden.grad, 3 * want[1])
        torch.testing.assert_close(weight.grad, 3 * want[2])


def test_frozen_inputs_cost_no_gradient_products(monkeypatch):
    hidden, target, weight, _ = _problem(positions=7)
    want = _results(_reference(hidden, target, weight, None), hidden, weight)
    products = []
    monkeypatch.setattr(softmax, "product", lambda *a: products.append("weight") or gemm.product(*a))
    monkeypatch.setattr(softmax, "accumulate", lambda *a: products.append("hidden") or gemm.accumulate(*a))
    for frozen, kept in ((weight, hidden), (hidden, weight)):
        frozen.requires_grad_(False)
        linear_cross_entropy(hidden, target, HeadShard(weight, len(weight))).backward()
        torch.testing.assert_close(kept.grad, want[1 if kept is hidden else 2])
        assert frozen.grad is None and products == (["hidden"] if kept is hidden else ["weight"])
        frozen.requires_grad_()
        hidden.grad = weight.grad = None
        products.clear()


def test_without_gradients_nothing_is_kept(monkeypatch):
    hidden, target, weight, _ = _problem(positions=7)
    head, kept = HeadShard(weight, len(weight)), []
    monkeypatch.setattr(module, "Exponentials", lambda *a: kept.append(a) or Exponentials(*a))
    module.Exponentials.fit = Exponentials.fit
    want = linear_cross_entropy(hidden, target, head)
    assert len(kept) == 1
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, target, head), want)
    weight.requires_grad_(False)
    assert torch.equal(linear_cross_entropy(hidden, target, head), want)
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_fp32(dtype):
    got, _ = _both({"scale": 0.5}, positions=40, rows=301, dtype=dtype, block_rows=64)
    values = _problem(positions=40, rows=301, dtype=dtype)
    hidden, weight = (values[i].detach().float().requires_grad_() for i in (0, 2))
    want = _results(_reference(hidden, values[1], weight, None, scale=0.5), hidden, weight)
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for value, reference in zip(got, want, strict=True):
        error = (value.float() - reference).norm() / reference.norm()
        assert error < 1e-2
    got, want = _both({}, positions=40, rows=301, dtype=torch.float32, compute_dtype=torch.bfloat16)
    assert all((g - w).norm() / w.norm() < 1e-2 for g, w in zip(got, want, strict=True))
    assert all(g.dtype == torch.float32 for g in got)


def test_bf16_sums_in_fp32():
    """A row that is the target of many positions: bf16 sums of its gradient would stop growing at 256."""
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.ones(4096, 2, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, torch.full((4096,), 3), HeadShard(weight, 4)).backward()
    assert weight.grad[3, 0] == -3072 and weight.grad[1, 0] == 1024
    table = torch.full((2, 1), -4096.0, dtype=torch.bfloat16)
    softmax._add_rows(table, torch.ones(4096, dtype=torch.int64), torch.full((4096, 1), 1.00390625 - 2**-14))
    assert table[0, 0] == -4096 and 15 < table[1, 0] < 16.5  # of bf16 values: 0


def test_large_scores():
    for positions in (7, 13):
        got, want = _both({}, positions=positions, spread=1e4, block_rows=16, dtype=torch.float32)
        exact, _ = _both({}, positions=positions, spread=1e4, block_rows=16)
        assert all(g.isfinite().all() for g in got)
        torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-6, atol=0)
        for value, reference in zip(got[1:], exact[1:], strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=1e-3, atol=1e-2)


def test_maximum_and_sum_stay_apart():
    """All scores 30000: the loss is log(rows), and 30000 + log(rows) in fp32 would be off by up to 1e-3."""
    rows = 1000
    weight = torch.ones(rows, 1, requires_grad=True)
    hidden = torch.full((3, 1), 30000.0, requires_grad=True)
    losses = linear_cross_entropy(hidden, torch.arange(3), HeadShard(weight, rows), reduction="none", block_rows=64)
    torch.testing.assert_close(losses, torch.full((3,), rows, dtype=torch.float32).log(), rtol=1e-6, atol=0)
    losses.sum().backward()
    torch.testing.assert_close(weight.grad[5:], torch.full((rows - 5, 1), 3 * 30000 / rows), rtol=1e-5, atol=0)


def test_mistakes_are_refused():
    hidden, target, weight, _ = _problem()
    head = HeadShard(weight, len(weight))
    for wrong in (len(weight), -1):
        with pytest.raises(ValueError, match=f"target {wrong} is no row of a table of 101"):
            linear_cross_entropy(hidden, torch.full_like(target, wrong), head)
    with pytest.raises(ValueError, match="expected"):
        linear_cross_entropy(hidden, target[:-1], head)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, target, head, reduction="average")
    with pytest.raises(ValueError, match="label_smoothing"):
        linear_cross_entropy(hidden, target, head, label_smoothing=1.5)
    with pytest.raises(ValueError, match="float16"):
        linear_cross_entropy(hidden, target, head, compute_dtype=torch.float16)


def test_libraries_are_optional(monkeypatch):
    hidden, target, weight, _ = _problem(dtype=torch.float32)
    head = HeadShard(weight, len(weight), scale=0.5)
    want = linear_cross_entropy(hidden, target, head)
    assert torch.equal(linear_cross_entropy(hidden, target, head, kernel="auto"), want)
    for name, reason in (("liger", "CUDA only"), ("cce", "CUDA only"), ("triton", "none of")):
        with pytest.raises(ValueError, match=reason):
            linear_cross_entropy(hidden, target, head, kernel=name)
    library = types.ModuleType("liger_kernel.transformers.functional")
    library.liger_fused_linear_cross_entropy = lambda hidden, weight, target, *, bias, accum_dtype, softcap, **options: (
        F.cross_entropy(F.linear(hidden, weight, bias), target, **options)
    )
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(module, "choose", lambda *_: "liger")
    for reduction, expected in (("sum", want), ("mean", want / (target != IGNORE).sum())):
        got = linear_cross_entropy(hidden, target, head, reduction=reduction, kernel="liger")
        torch.testing.assert_close(got, expected)


def test_blas_and_onednn_agree(monkeypatch):
    got, want = _both({}, positions=40, rows=301, dtype=torch.float32, block_rows=64)
    monkeypatch.setattr(gemm, "_fits_onednn", lambda *_: False)
    other, _ = _both({}, positions=40, rows=301, dtype=torch.float32, block_rows=64)
    for a, b, reference in zip(got, other, want, strict=True):
        torch.testing.assert_close(a, reference, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(b, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("block_rows, sizes", [(256, (4096, 65536)), (None, (16384, 65536))])
def test_scratch_memory_does_not_grow_with_the_catalogue(block_rows, sizes):
    """Tensors allocated beyond gradients, seen by torch's own profiler."""

    def peak(rows):
        hidden, target = torch.randn(64, 8, requires_grad=True), torch.randint(rows, (64,))
        weight = torch.randn(rows, 8, requires_grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            linear_cross_entropy(hidden, target, HeadShard(weight, rows), block_rows=block_rows).backward()
        events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=_start)
        held = highest = 0
        for event in events:
            held += event.nbytes()
            highest = max(highest, held)
        return highest - weight.nbytes

    small, large = map(peak, sizes)
    assert large < small + 65536  # scores of all items would add 16 MB


def _start(event):
    return event.start_ns()


# ---- on several ranks ----


def _sizes(rows, world, empty):
    """row bounds of each rank: even shares, or all rows but one on the last rank and none on the first"""
    return [0, 0, *([1] * (world - 2)), rows] if empty else [*(rows_of(rows, world, r)[0] for r in range(world)), rows]


def _shard(weight, bias, bounds, **options):
    axis = TensorAxis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())
    start, stop = bounds[axis.rank : axis.rank + 2]
    local = weight.detach()[start:stop].clone().requires_grad_()
    local_bias = None if bias is None else bias.detach()[start:stop].clone().requires_grad_()
    return HeadShard(local, len(weight), start, local_bias, axis=axis, **options)


def _compare_with_whole(empty, dtype=torch.float64):
    world, seen = dist.get_world_size(), []
    for number, options in enumerate(_OPTIONS * 2):
        options = dict(options)
        positions = 7 if number < len(_OPTIONS) else 13
        hidden, target, weight, bias = _problem(positions, bias=options.pop("bias", False), dtype=dtype, seed=number)
        smoothing = options.pop("label_smoothing", 0.0)
        want = _reference(hidden, target, weight, bias, label_smoothing=smoothing, **options)
        want = _results(want, hidden, weight, bias)
        bounds = _sizes(len(weight), world, empty)
        head = _shard(weight, bias, bounds, **options)
        loss = linear_cross_entropy(hidden, target, head, label_smoothing=smoothing, block_rows=16)
        got = _results(loss, hidden, head.weight, head.bias)
        mine = slice(*bounds[dist.get_rank() : dist.get_rank() + 2])
        want = want[:2] + [value[mine] for value in want[2:]]
        for value, reference in zip(got, want, strict=True):
            tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-5}
            torch.testing.assert_close(value, reference, **tolerance)
        seen.append([v.tolist() for v in got[:2]])
    return seen


@pytest.mark.parametrize("world, empty", [(2, False), (2, True), (3, False), (3, True)])
def test_parity_of_shards(world, empty):
    first, *others = run_on_grid(_compare_with_whole, world, empty=empty)
    assert all(other == first for other in others)  # to the last bit


def test_parity_of_shards_in_fp32():
    first, *others = run_on_grid(_compare_with_whole, 2, empty=False, dtype=torch.float32)
    assert all(other == first for other in others)


def _count_collectives(sizes):
    counts, reduce = [], dist.all_reduce
    for rows in sizes:
        calls = []
        dist.all_reduce = lambda tensor, op=dist.ReduceOp.SUM, _calls=calls, **k: (
            _calls.append((str(op), tensor.is_contiguous())) or reduce(tensor, op, **k)
        )
        hidden, target, weight, _ = _problem(rows=rows, dtype=torch.float32)
        head = _shard(weight, None, _sizes(rows, dist.get_world_size(), False))
        loss = linear_cross_entropy(hidden, target, head, label_smoothing=0.1, block_rows=64)
        forward = len(calls)
        loss.backward()
        assert all(contiguous for _, contiguous in calls)
        counts.append((forward, len(calls), [op for op, _ in calls]))
    return counts


def test_three_collectives_whatever_the_catalogue():
    for counts in run_on_grid(_count_collectives, 2, sizes=[33, 1001, 20001]):
        for forward, total, operations in counts:
            assert forward == 2 and total == 3, operations
            assert "MAX" in operations[0] and "SUM" in operations[1]


def _nothing_supervised():
    hidden, target, weight, bias = _problem(bias=True)
    head = _shard(weight, bias, _sizes(len(weight), dist.get_world_size(), False))
    dist.all_reduce = None  # nothing to send
    for reduction in ("sum", "mean", "none"):
        loss = linear_cross_entropy(hidden, torch.full_like(target, IGNORE), head, reduction=reduction)
        assert (loss == 0).all()
        loss.sum().backward()
    assert not hidden.grad.any() and not head.weight.grad.any() and not head.bias.grad.any()
    return head.weight.grad.shape == head.weight.shape


def test_nothing_supervised():
    assert all(run_on_grid(_nothing_supervised, 2, timeout=60))


def _frozen_on_ranks():
    hidden, target, weight, _ = _problem()
    want = _results(_reference(hidden, target, weight, None), hidden, weight)
    head = _shard(weight, None, _sizes(len(weight), dist.get_world_size(), False))
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, target, head), want[0])
    head.weight.requires_grad_(False)
    linear_cross_entropy(hidden, target, head).backward()
    torch.testing.assert_close(hidden.grad, want[1])


def test_frozen_table_on_ranks():
    run_on_grid(_frozen_on_ranks, 2)


def _combine_scores(bounds, power):
    scores = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    axis = TensorAxis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())
    mine = scores[:, bounds[axis.rank] : bounds[axis.rank + 1]]
    maximum = mine.amax(1) if mine.numel() else torch.full((4,), -torch.inf)
    total = getattr(torch, power)(mine - maximum[:, None]).sum(1) if mine.numel() else torch.full((4,), torch.nan)
    merged = combine(maximum, total, mine.sum(1, keepdim=True), axis, getattr(torch, power))
    want = scores.amax(1)
    torch.testing.assert_close(merged[0], want, rtol=0, atol=0)
    torch.testing.assert_close(merged[1], getattr(torch, power)(scores - want[:, None]).sum(1))
    torch.testing.assert_close(merged[2], scores.sum(1, keepdim=True))
    assert combine(maximum, total, None, axis, getattr(torch, power))[2] is None
    nothing = torch.full((2,), -torch.inf)
    for value, want in zip(combine(nothing, nothing, None, axis)[:2], (-torch.inf, 0), strict=True):
        assert (value == want).all()


@pytest.mark.parametrize("power", ["exp", "exp2"])
def test_combine_with_an_empty_rank(power):
    run_on_grid(_combine_scores, 3, bounds=[0, 11, 11, 30], power=power)
