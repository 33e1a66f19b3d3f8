"""Compression in DeepSpeed's engines: what it must not change, NaN, what it refuses, resuming, overlap."""

import deepspeed
import pytest
import torch
import torch.distributed as dist
from compression_grid import Layers
from deepspeed.comm import comm
from distributed import run_on_grid

import ds_recsys
from ds_recsys import UserError
from ds_recsys.comm.backend import GradientBackend


def _config(**changes):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": 100_000,
        "zero_allow_untested_optimizer": True,
        **changes,
    }


def _engine(method=None, config=None, model=None, **options):
    torch.manual_seed(0)
    model = model or Layers()
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config or _config())[0]
    if method:
        ds_recsys.compress_gradients(engine, method, min_elements=1, **options)
    return engine


def _steps(engine, first, last, poisoned=()):
    """Losses of steps first to last - 1, whose batches depend on the step and the rank alone."""
    losses = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        for micro_batch in range(engine.gradient_accumulation_steps()):
            items = torch.randint(50, (4,), generator=generator)
            loss = engine(items, (3 * items + 1) % 50)
            if (step, dist.get_rank(), micro_batch) in poisoned:
                loss = loss * float("nan")
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def _weights(engine):
    return torch.cat([parameter.detach().float().view(-1).cpu() for parameter in engine.module.parameters()])


def _residuals(engine):
    return engine.gradient_compression.reducer.feedback.state_dict()


def _same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _off():
    plain, off = _engine(), _engine("none")
    assert not isinstance(comm.cdb, GradientBackend) and off.gradient_compression.reducer is None
    assert _steps(off, 0, 5) == _steps(plain, 0, 5) and torch.equal(_weights(off), _weights(plain))
    closed = _engine("int8")
    closed.gradient_compression.close()
    assert _steps(closed, 0, 5) == _steps(_engine(), 0, 5)
    compressed = _engine("int8")
    assert _steps(compressed, 0, 5) != _steps(_engine(), 0, 5)
    assert "int8" in compressed.gradient_compression.summary()


def test_switched_off_or_closed_nothing_changes():
    run_on_grid(_off, 2)


def _scaled(config):
    """bf16's rounding apart, gradients are averaged as DeepSpeed averages them, whatever is configured around it."""
    torch.manual_seed(0)
    plain, ours = _engine(config=config), _engine("bf16", config=config, error_feedback=False)
    _steps(plain, 0, 1), _steps(ours, 0, 1)
    return (_weights(plain) - _weights(ours)).abs().max().item(), (
        _weights(plain) - _weights(_engine())
    ).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        {"gradient_predivide_factor": 4.0},
        {"gradient_clipping": 0.01},
        {"gradient_clipping": 0.0},
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 1, "reduce_scatter": False}},
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 700}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True}},
    ],
    ids=str,
)
def test_averaging_and_clipping_keep_their_meaning(changes):
    sgd = {"type": "SGD", "params": {"lr": 1.0}}
    for difference, moved in run_on_grid(_scaled, 2, config=_config(optimizer=sgd, **changes)):
        assert moved > 1e-3 and difference < 0.01 * moved


def _in_buckets_of(elements, config):
    """(weights, sums, how many of them were of a gradient's own memory) after a few steps, which copy no sum."""
    engine = _engine("int8", config, bucket_elements=elements)
    reducer, step, parameters = engine.gradient_compression.reducer, engine.optimizer.step, list(engine.parameters())
    reduce, summed, own = reducer.all_reduce, [], []

    def spy(flat, tensors):
        summed.append(flat.untyped_storage().data_ptr())
        own.append(any(flat.data_ptr() == p.grad.data_ptr() for p in parameters))
        reduce(flat, tensors)

    def check():
        assert all(p.grad.untyped_storage().data_ptr() in summed for p in parameters), "a sum was copied"
        step()

    reducer.all_reduce, engine.optimizer.step = spy, check
    _steps(engine, 0, 3)
    return _weights(engine), len(summed), sum(own)


def _large_alone():
    for changes in ({}, {"prescale_gradients": True, "gradient_predivide_factor": 4.0}):
        together, few, own = _in_buckets_of(10**6, _config(**changes))
        assert own == 0
        alone, sums, own = _in_buckets_of(1, _config(**changes))
        assert few < sums == own, "a gradient that is alone in its bucket was copied"
        assert torch.equal(alone, together)


def test_sums_are_not_copied_and_large_gradients_are_averaged_where_they_are():
    run_on_grid(_large_alone, 2)


def _poisoned(config, method):
    engine = _engine(method, config)
    _steps(engine, 0, 3)
    before, residuals, skipped = _weights(engine), _residuals(engine), engine.skipped_steps
    _steps(engine, 3, 4, poisoned=[(3, 1, 1)])
    assert engine.skipped_steps == skipped + 1
    assert torch.equal(_weights(engine), before), "the step was not skipped"
    assert _same_state(_residuals(engine), residuals), "a NaN reached the residuals"
    losses = _steps(engine, 4, 12)
    assert all(map(torch.isfinite, torch.tensor(losses))) and not torch.equal(_weights(engine), before)
    return _weights(engine)


@pytest.mark.parametrize("method", ["int8", "int4", "sign", "topk", "powersgd"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}],
    ids=["stage 0", "ZeRO-1", "ZeRO-2 bf16"],
)
def test_a_nan_on_one_rank_makes_every_rank_skip_the_step(changes, method):
    first, *others = run_on_grid(_poisoned, 3, config=_config(**changes), method=method)
    assert all(torch.equal(first, other) for other in others)


class _Sparse(torch.nn.Module):
    """A table with row-sparse gradients beside a matrix."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(200, 16, sparse=True)
        self.head = torch.nn.Linear(16, 50)

    def forward(self, items, targets):
        return torch.nn.functional.cross_entropy(self.head(self.table(items)), targets)


def _sparse_rows():
    config = _config(gradient_clipping=0.0, optimizer={"type": "SGD", "params": {"lr": 0.5}})
    plain, ours = _engine(config=config, model=_Sparse()), _engine("int8", config, _Sparse())
    ours.module.load_state_dict(plain.module.state_dict())
    _steps(plain, 0, 1), _steps(ours, 0, 1)
    assert torch.equal(ours.module.table.weight, plain.module.table.weight), "rows are sent without loss"
    assert not torch.equal(ours.module.head.weight, plain.module.head.weight)
    before = ours.module.table.weight.detach().clone()
    ours.module.table.weight.register_hook(lambda g: g * float("nan") if dist.get_rank() == 0 else g)
    _steps(ours, 1, 2)
    assert ours.skipped_steps == 1 and torch.equal(ours.module.table.weight, before)


def test_row_sparse_gradients_are_sent_as_rows():
    run_on_grid(_sparse_rows, 2)


def _overlapped(micro_batches):
    config = _config(gradient_accumulation_steps=micro_batches)
    one = _engine("int8", config, bucket_elements=700)
    other = _engine("int8", config, bucket_elements=700, overlap=False)
    early = one.gradient_compression._adapter._buckets
    started = []
    start = early._start
    early._start = lambda: (started.append(torch._C._current_graph_task_id() != -1), start())
    assert _steps(one, 0, 6) == _steps(other, 0, 6)
    assert torch.equal(_weights(one), _weights(other)) and _same_state(_residuals(one), _residuals(other))
    return started, len(early.buckets)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_overlap_changes_nothing_but_the_moment(micro_batches):
    for started, buckets in run_on_grid(_overlapped, 2, micro_batches=micro_batches):
        assert buckets > 3
        assert not any(started[:buckets]), "in the first step it is not known yet when a gradient is final"
        assert all(started[buckets:]), "later all buckets start within the backward pass"


class _Irregular(Layers):
    """Uses the head a second time in some steps."""

    again = False

    def forward(self, items, targets):
        loss = super().forward(items, targets)
        if self.again:
            loss = loss + torch.utils.checkpoint.checkpoint(self.head, self.embedding(items), use_reentrant=True).sum()
        return loss


def _irregular():
    engine = _engine("int8", _config(gradient_accumulation_steps=1), _Irregular(), bucket_elements=1)
    _steps(engine, 0, 2)
    engine.module.again = True
    with pytest.raises(RuntimeError, match='"overlap": false'):
        _steps(engine, 2, 3)


def test_a_gradient_that_changes_after_it_was_sent_is_an_error():
    run_on_grid(_irregular, 2)


def _resumed(folder, config, method, options):
    engine = _engine(method, config, **options)
    _steps(engine, 0, 4)
    engine.save_checkpoint(str(folder))
    expected = _steps(engine, 4, 8)
    again = _engine(method, config, **options)
    again.load_checkpoint(str(folder))
    losses = _steps(again, 4, 8)
    assert losses == expected and torch.equal(_weights(again), _weights(engine))
    forgetful = _engine(method, config, **options)
    forgetful.load_checkpoint(str(folder))
    forgetful.gradient_compression.reducer.feedback.load_state_dict({})
    assert _steps(forgetful, 4, 8) != expected, "this method's residuals change nothing, so the test shows nothing"


@pytest.mark.parametrize(
    "method, options",
    [
        ("int4", {}),
        ("topk", {"ratio": 0.1}),
        ("randomk", {"ratio": 0.2}),
        ("powersgd", {"rank": 2}),
        ("topk", {"ratio": 0.1, "momentum": 0.9}),
    ],
    ids=["int4", "topk", "randomk", "powersgd", "momentum"],
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_is_bit_equal(tmp_path, method, options, stage):
    config = _config(zero_optimization={"stage": stage})
    if "momentum" in options:
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
        if stage == 2:
            pytest.skip("momentum correction is refused under ZeRO-2")
    run_on_grid(_resumed, 3, folder=tmp_path, config=config, method=method, options=options)


def _save(folder, stage):
    engine = _engine("int4", _config(zero_optimization={"stage": stage}))
    _steps(engine, 0, 4)
    engine.save_checkpoint(str(folder))
    size = dist.get_world_size()
    shape = {name: value.numel() for name, value in engine.module.named_parameters()}
    total = {name: torch.zeros(count) for name, count in shape.items()}
    whole = {}
    for (side, name, start, stop), value in _residuals(engine).items():
        whole.setdefault((side, name), torch.zeros(shape[name]))[start:stop] = value
    for (_, name), value in whole.items():
        total[name] += value
    for value in total.values():
        dist.all_reduce(value)
    return {name: value / size for name, value in total.items()}


def _load(folder):
    engine = _engine("int4")
    engine.gradient_compression.load(folder / "global_step4")
    return {name: value for (_, name, _, _), value in _residuals(engine).items()}


@pytest.mark.parametrize("stage", [0, 1])
def test_residuals_are_shared_out_when_the_data_axis_changes(tmp_path, stage):
    held_back = run_on_grid(_save, 4, folder=tmp_path, stage=stage)[0]
    for residuals in run_on_grid(_load, 2, folder=tmp_path):
        assert residuals.keys() == {name for name, value in held_back.items() if value.any()}
        for name, value in residuals.items():
            assert torch.allclose(value, held_back[name], atol=1e-8), name


def _owned(folder):
    engine = _engine("int4")
    expected = _steps(engine, 0, 8)
    some = _engine("int4", owner_shares=[0, 2, 1])
    assert _steps(some, 0, 4) == expected[:8]
    some.save_checkpoint(str(folder))
    assert _steps(some, 4, 8) == expected[8:] and torch.equal(_weights(some), _weights(engine))
    again = _engine("int4", owner_shares=[0, 2, 1])
    again.load_checkpoint(str(folder))
    assert _steps(again, 4, 8) == expected[8:]
    kept = [(name, value.sum()) for (_, name, *_), value in torch.load(_own(folder))["residuals"].items()]
    total = {name: sum(value for of, value in kept if of == name) for name, _ in kept}
    other = _engine("int4", owner_shares=[1, 1, 1])
    other.load_checkpoint(str(folder))
    shared_out = {name: value.sum() for (_, name, *_), value in _residuals(other).items()}
    return [{name: float(value) for name, value in some.items()} for some in (total, shared_out)]


def _own(folder):
    return folder / "global_step4" / f"compression_rank_{dist.get_rank():05d}.pt"


def test_owners_change_nothing_and_what_they_hold_back_is_shared_out_when_others_take_over(tmp_path):
    ranks = run_on_grid(_owned, 3, folder=tmp_path)
    for name, mean in ranks[0][1].items():
        assert all(shared[name] == mean for _, shared in ranks)
        assert sum(total[name] for total, _ in ranks if name in total) / 3 == pytest.approx(mean, abs=1e-6)


_REFUSED = {
    "ZeRO-3": ({"zero_optimization": {"stage": 3}}, {}, "ZeRO-3"),
    "contiguous": ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, {}, "contiguous_gradients"),
    "one owner": (
        {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
        {},
        "use_multi_rank_bucket_allreduce",
    ),
    "communication dtype": ({"communication_data_type": "bf16"}, {}, "communication_data_type"),
    "Adam with momentum": ({}, {"momentum": 0.9}, "SGD without momentum"),
    "owners of ZeRO": ({"zero_optimization": {"stage": 1}}, {"owner_shares": [1]}, "owner_shares.*ZeRO"),
    "owners of others": ({}, {"owner_shares": [1, 2, 3]}, '"owner_shares" has 3 number.*2 replica'),
}


def _refused(config, options, message):
    with pytest.raises(UserError, match=message) as caught:
        _engine("topk" if options else "int8", config, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", _REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case):
    changes, options, message = _REFUSED[case]
    run_on_grid(_refused, 2, config=_config(**changes), options=options, message=message)


def _auto(slow):
    from ds_recsys.comm import probe

    engine = _engine("auto", _config())
    compression = engine.gradient_compression
    assert set(compression.choice.seconds) == {"none", "int8", "int4"}
    assert compression.choice == probe.decide(compression.choice.seconds, compression.choice.values)
    assert str(compression.choice) in compression.summary()
    _steps(engine, 0, 2)
    return compression.choice


def test_auto_times_the_links_and_all_ranks_agree():
    first, *others = run_on_grid(_auto, 3, slow=False)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    "seconds, method",
    [
        ({"none": 1.0, "int8": 0.95, "int4": 0.91}, "none"),
        ({"none": 1.0, "int8": 0.5, "int4": 0.46}, "int8"),
        ({"none": 1.0, "int8": 0.5, "int4": 0.3}, "int4"),
        ({"none": 1.0, "int8": 1.5, "int4": 0.8}, "int4"),
    ],
)
def test_a_method_with_more_error_must_be_a_tenth_faster(seconds, method):
    from ds_recsys.comm import probe

    assert probe.decide(seconds, 10).method == method


def _probed(shape):
    from ds_recsys.comm.probe import reduction
    from ds_recsys.comm.reducer import Reducer

    reducer = Reducer(None, "powersgd", rank=4)
    flat = torch.ones(4 * 128 * 128)
    reduction(None, "powersgd", lambda _: reducer, shape)(flat)
    assert torch.allclose(flat, torch.full_like(flat, 2.0)), "of rank 1"
    return reducer.bytes_sent / (4 * flat.numel())


def test_powersgd_is_timed_on_matrices():
    assert run_on_grid(_probed, 2, shape=(128, 128)) == [4 * (128 + 128) / 128**2] * 2
    assert run_on_grid(_probed, 2, shape=None) == [1.0] * 2  # one row: nothing to project
