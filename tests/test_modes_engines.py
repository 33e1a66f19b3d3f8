"""Modes in a plain engine: off, NaN, compression, saving and resuming, evaluation, precision, what is refused."""

import importlib
import sys

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid
from modes import ADAM, SGD, Reference, config, engine, farthest, mean, same, small_model, train, weights

import ds_recsys
from ds_recsys import UserError

MODES = {
    "delayed": {"delay_correction": 1.0},
    "ahead": {"look_ahead": True},
    "local_sgd": {"every": 4, "dense_until": 2},
    "diloco": {"every": 4},
    "streaming": {"every": 4, "fragments": 3, "overlap_steps": 2, "mixing": 0.3},
}
SCHEDULE = {
    "type": "WarmupDecayLR",
    "params": {"total_num_steps": 30, "warmup_num_steps": 10, "warmup_min_lr": 2e-3, "warmup_max_lr": 1e-2},
}


def _make(mode, values=None, method="none"):
    compression = {} if method == "none" else {"method": method, "min_elements": 1, **METHODS[method]}
    return engine({"streaming": "diloco", "ahead": "delayed"}.get(mode, mode), values, compression, **MODES[mode])


METHODS = {"int8": {}, "topk": {"ratio": 0.2}, "powersgd": {"rank": 2}}


# ---- off


def _sync():
    values = config(recsys={"data_parallel": {"mode": "sync"}})
    model = small_model()
    ours = ds_recsys.initialize(model=model, model_parameters=model.parameters(), config=values)[0]
    plain = engine()
    assert train(ours, 0, 5) == train(plain, 0, 5) and same(weights(ours), weights(plain))
    assert not hasattr(ours, "data_parallel")
    closed = _make("diloco")
    closed.data_parallel.close()
    assert train(closed, 0, 5) == train(engine(), 0, 5)


def test_sync_and_closed_modes_change_nothing():
    run_on_grid(_sync, 2)


def _imported():
    for name in [name for name in sys.modules if name.partition(".")[0] == "ds_recsys"]:
        del sys.modules[name]  # the fork server had imported it all
    fresh = importlib.import_module("ds_recsys")
    model, values = small_model(), config(recsys={"data_parallel": {"mode": "sync"}})
    fresh.initialize(model=model, model_parameters=model.parameters(), config=values)
    return [name for name in sys.modules if name.startswith("ds_recsys.comm")]


def test_sync_imports_nothing_that_compresses():
    assert run_on_grid(_imported, 1) == [[]]


# ---- NaN


def _poisoned_delayed(method):
    made = _make("delayed", config(SGD), method)
    made.data_parallel.options = made.data_parallel.options.model_copy(update={"delay_correction": 0.0})
    train(made, 0, 4, poisoned=[(3, 1)])
    before, residuals = weights(made), made.data_parallel._reducer.feedback.state_dict()
    train(made, 4, 5)  # the NaN of step 3 arrives
    assert made.skipped_steps == 1 and same(weights(made), before)
    if method == "int8":
        after = made.data_parallel._reducer.feedback.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in residuals.items()) and residuals
    train(made, 5, 8)
    made.data_parallel.flush()
    return weights(made)


@pytest.mark.parametrize("method", ["none", "int8", "topk"])
def test_a_nan_on_one_rank_makes_every_rank_skip_the_delayed_step(method):
    first, *others = run_on_grid(_poisoned_delayed, 3, method=method)
    assert all(same(first, other) for other in others)
    if method == "none":
        reference, late = Reference(1, SGD), None
        for step in [0, 1, 2, 3, 4, 5, 6, 7, None]:
            own = step is not None and mean([reference.gradients(replica, step, model=0) for replica in range(3)])
            if late is not None:
                reference.step(0, late)
            late = own if step != 3 else None
        assert farthest(first, reference.weights()) < 1e-6


def _poisoned_local():
    made = _make("diloco")
    train(made, 0, 4)
    before = weights(made)
    train(made, 4, 6, poisoned=[(4, 1), (5, 1)])
    assert made.skipped_steps == (2 if dist.get_rank() == 1 else 0)
    assert same(weights(made), before) == (dist.get_rank() == 1), "only the replica with a NaN skips"
    train(made, 6, 7)
    if dist.get_rank() == 1:
        made.module.head.weight.data[3, 3] = float("inf")  # whatever may come of a faulty device
    train(made, 7, 8)
    assert same(weights(made), before), "all go back to the outer weights"
    losses = train(made, 8, 12)
    assert torch.tensor(losses).isfinite().all() and not same(weights(made), before)
    return weights(made)


def test_a_nan_stays_in_its_replica_and_reaches_no_average():
    first, second = run_on_grid(_poisoned_local, 2)
    assert same(first, second)


# ---- compression


def _compressed(mode, method):
    made = _make(mode, config(), method)
    losses = train(made, 0, 32)
    made.data_parallel.flush()
    figures = made.data_parallel.as_dict()
    plain = _make(mode)
    train(plain, 0, 32)
    plain.data_parallel.flush()
    return losses, weights(made), figures, weights(plain), plain.data_parallel.as_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_sends_can_be_compressed(mode, method):
    found = run_on_grid(_compressed, 2, mode=mode, method=method)
    for losses, trained, figures, plain, dense in found:
        assert same(trained, found[0][1]) and sum(losses[-8:]) < 0.95 * sum(losses[:8])
        assert figures["method"] == method and figures["sent_bytes"] < 0.8 * dense["sent_bytes"]
        assert 0 < farthest(trained, plain)
        if method == "int8":
            assert farthest(trained, plain) < 0.05


def _auto():
    made = engine("local_sgd", None, {"method": "auto"}, every=2)
    train(made, 0, 4)
    assert "auto: " in made.data_parallel.summary() and made.data_parallel.method in ("none", "int8", "int4")
    return made.data_parallel.method


def test_auto_compression_is_resolved_alike():
    assert len(set(run_on_grid(_auto, 2))) == 1


# ---- saving and resuming


def _resumed(folder, mode, method):
    values = config(scheduler=SCHEDULE)
    unbroken = _make(mode, values, method)
    expected = train(unbroken, 0, 13, poisoned=[(3, 1)])
    saved = _make(mode, values, method)
    begun = train(saved, 0, 7, poisoned=[(3, 1)])
    before = weights(saved)
    saved.save_checkpoint(str(folder))
    assert same(weights(saved), before)
    assert str(begun + train(saved, 7, 13)) == str(expected), "saving changed the course"  # NaN is not NaN
    again = _make(mode, values, method)
    again.load_checkpoint(str(folder))
    losses = train(again, 7, 13)
    assert losses == expected[14:] and same(weights(again), weights(unbroken))
    assert again.get_lr() == unbroken.get_lr() and again.skipped_steps == unbroken.skipped_steps
    for made in (again, unbroken):
        made.data_parallel.flush()
    assert same(weights(again), weights(unbroken))
    forgetful = _make(mode, values, method)
    forgetful.data_parallel.load = lambda folder: None
    forgetful.load_checkpoint(str(folder))
    assert train(forgetful, 7, 13) != expected[14:], "nothing of the mode's was needed: the test shows nothing"


@pytest.mark.parametrize("mode, method", [(m, c) for m in MODES for c in ("none", "int8", "topk")])
def test_a_run_resumed_between_two_averages_is_bit_equal(tmp_path, mode, method):
    run_on_grid(_resumed, 2, folder=tmp_path, mode=mode, method=method)


def _save(folder, mode):
    made = _make(mode)
    train(made, 0, 7)
    made.save_checkpoint(str(folder))
    with made.data_parallel.consensus():
        shown = weights(made)
    made.data_parallel.flush()
    return shown, weights(made)


def _load(folder, mode):
    made = _make(mode)
    made.load_checkpoint(str(folder))
    loaded = weights(made)
    made.data_parallel.flush()
    flushed = weights(made)
    train(made, 7, 11)
    made.data_parallel.flush()
    return loaded, flushed, weights(made)


@pytest.mark.parametrize("mode", MODES)
def test_another_number_of_replicas_begins_from_the_common_weights(tmp_path, mode):
    shown, flushed = run_on_grid(_save, 3, folder=tmp_path, mode=mode)[0]
    found = run_on_grid(_load, 2, folder=tmp_path, mode=mode)
    for loaded, now, later in found:
        assert same(loaded, shown) and same(later, found[0][2]) and not same(later, loaded)
        if mode in ("delayed", "ahead"):  # the gradient that was under way is not lost
            assert farthest(now, flushed) < 1e-6


def _change_mode(folder):
    first = engine()
    train(first, 0, 3)
    first.save_checkpoint(str(folder))
    local = _make("local_sgd")
    local.load_checkpoint(str(folder))
    assert same(weights(local), weights(first)) and local.data_parallel.steps == 3
    train(local, 3, 5)
    assert local.data_parallel.apart
    local.save_checkpoint(str(folder), tag="local")
    back = engine()
    back.load_checkpoint(str(folder), tag="local")
    local.data_parallel.flush()
    assert farthest(weights(back), weights(local)) < 1e-6
    outer = engine("diloco", every=3)
    outer.load_checkpoint(str(folder), tag="local")
    assert same(weights(outer), weights(back)) and not outer.data_parallel.apart


def test_a_checkpoint_of_another_mode_gives_its_common_weights(tmp_path):
    run_on_grid(_change_mode, 2, folder=tmp_path)


def _fragments_changed(folder):
    made = _make("streaming")
    train(made, 0, 3)
    made.save_checkpoint(str(folder))
    other = engine("diloco", every=4, fragments=2)
    with pytest.raises(UserError, match='"fragments" 3, this run has 2') as caught:
        other.load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_other_fragments_than_those_that_were_saved_are_refused(tmp_path):
    run_on_grid(_fragments_changed, 1, folder=tmp_path)


# ---- evaluation


def _evaluated(mode):
    made = _make(mode)
    at = 7 if mode in ("local_sgd", "streaming") else 6
    train(made, 0, at)
    own = weights(made)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    with made.data_parallel.evaluation():
        shown = weights(made)
        with made.data_parallel.evaluation():
            assert same(weights(made), shown)
    after = weights(made)
    if mode in ("delayed", "ahead"):
        assert same(shown, after) and not same(shown, own), "what was under way has been applied"
    else:
        assert same(after, own) and not same(shown, own)
    if mode == "local_sgd":
        assert farthest(shown, mean(everyone)) < 1e-6
    if mode == "diloco":
        again = _make(mode)
        train(again, 0, 4)  # the outer weights of the last round
        assert same(shown, weights(again))
    return shown


@pytest.mark.parametrize("mode", MODES)
def test_an_evaluation_sees_common_weights_and_training_goes_on_from_its_own(mode):
    first, second = run_on_grid(_evaluated, 2, mode=mode)
    assert same(first, second)


# ---- the delayed step


BF16_OPTIMIZER = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 1},
}


def _one_batch(values, tolerance):
    plain, ours = engine(None, values), engine("delayed", values)
    assert hasattr(ours.optimizer, "bf16_groups") == ("data_types" in values)
    start = weights(ours)
    train(plain, 0, 1)
    train(ours, 0, 1)
    assert same(weights(ours), start), "the first step only sends"
    assert (ours.global_steps, ours.skipped_steps, ours.get_lr()) == (1, 0, _lr_at_start(values))
    ours.data_parallel.flush()
    assert farthest(weights(ours), weights(plain)) <= tolerance and farthest(weights(ours), start) > 1e-5
    train(ours, 1, 4), train(plain, 1, 4)
    ours.data_parallel.flush()
    ours.data_parallel.flush()
    assert ours.get_lr() == plain.get_lr() and ours.global_steps == plain.global_steps == 4
    assert ours.global_samples == plain.global_samples


def _lr_at_start(values):
    return engine(None, values).get_lr()


@pytest.mark.parametrize(
    "ranks, changes, tolerance",
    [
        (2, {}, 1e-6),
        (2, {"gradient_clipping": 0.05}, 1e-6),
        (1, {"bf16": {"enabled": True}, "gradient_clipping": 0.05}, 0.0),
        # DeepSpeed's own averaging rounds to bf16, also with one rank: a digit of the weights
        (1, {**BF16_OPTIMIZER, "gradient_clipping": 0.05}, 2e-3),
        (2, BF16_OPTIMIZER, 2e-3),
    ],
    ids=str,
)
def test_a_batch_and_a_flush_are_a_plain_step(ranks, changes, tolerance):
    optimizer = {"type": "SGD", "params": {"lr": 0.5}}
    scheduler = {**SCHEDULE, "params": {**SCHEDULE["params"], "warmup_min_lr": 1.0, "warmup_max_lr": 2.0}}
    values = config(optimizer, scheduler=scheduler, **changes)
    run_on_grid(_one_batch, ranks, values=values, tolerance=tolerance)


# ---- what is refused


class _Rows(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 4, sparse=True)


_REFUSED = {
    "ZeRO-1": ("diloco", {"zero_optimization": {"stage": 1}}, {}, "ZeRO-1.*stage 0"),
    "delayed ZeRO-2": ("delayed", {"zero_optimization": {"stage": 2}}, {}, "ZeRO-2.*stage 0"),
    "bf16": ("local_sgd", {"bf16": {"enabled": True}}, {}, "fp32"),
    "communication dtype": ("delayed", {"communication_data_type": "bf16"}, {}, "communication_data_type"),
    "momentum": ("diloco", {}, {"method": "topk", "momentum": 0.9}, "momentum"),
    "sync": ("sync", {}, {}, "leave the call out"),
    "rows": ("delayed", {}, {}, "table are rows"),
}


def _refused(case):
    mode, changes, compression, message = _REFUSED[case]
    made = engine(None, config(ADAM if case != "rows" else SGD, **changes))
    if case == "rows":
        made.module.add_module("sparse", _Rows())
    with pytest.raises(UserError, match=message) as caught:
        ds_recsys.data_parallel(made, mode, compression)
    assert "\n" not in str(caught.value)
    assert not hasattr(made, "data_parallel")


@pytest.mark.parametrize("case", _REFUSED)
def test_what_cannot_work_is_refused_in_one_line(case):
    run_on_grid(_refused, 1, case=case)


def _twice():
    made = _make("diloco")
    with pytest.raises(UserError, match="a mode already"):
        ds_recsys.data_parallel(made, "delayed")
    compressed = engine()
    ds_recsys.compress_gradients(compressed, "int8")
    with pytest.raises(UserError, match="compressed already"):
        ds_recsys.data_parallel(compressed, "delayed")


def test_two_at_once_are_refused():
    run_on_grid(_twice, 1)
