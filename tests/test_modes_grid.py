"""Modes on pipe x data x tensor grids, where a replica is a whole pipeline, and in the Trainer: saved, resumed, finished."""

import copy
import json
import threading
from itertools import islice

import pytest
import torch
import torch.distributed as dist
from compression_grid import differing
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys

MODES = {
    "delayed": {"mode": "delayed", "delay_correction": 1.0},
    "ahead": {"mode": "delayed", "look_ahead": True},
    "local_sgd": {"mode": "local_sgd", "every": 3, "dense_until": 2},
    "diloco": {"mode": "diloco", "every": 3},
    "streaming": {"mode": "diloco", "every": 4, "fragments": 3, "overlap_steps": 2, "mixing": 0.3},
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
INT8 = {"method": "int8", "min_elements": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    write_log(folder / "log.csv")
    return folder


def _values(mode, pipe=2, tensor=1, compression=None, **recsys):
    recsys = {"training": {"steps": 10, "eval_every_epochs": 0}, "checkpoint": {"every_epochs": 0}, **recsys}
    values = config(pipe=pipe, tensor=tensor, data_parallel=MODES[mode], **recsys)
    values["zero_optimization"] = {"stage": 0}
    values["train_micro_batch_size_per_gpu"] = 4
    values["recsys"]["model"] = {"config": copy.deepcopy(LLAMA), "tie": True}
    values["recsys"]["compression"] = compression or {"method": "none"}
    return values


def _steps(trainer, count):
    losses = []
    while len(losses) < count:
        epoch, position = divmod(trainer.state["step"], trainer.batches.steps_per_epoch)
        micro_batches = next(iter(trainer.batches.epoch_iterator(epoch, position)))
        losses.append(trainer._step(micro_batches).item())
    return losses


def _differing_in_replica(trainer) -> list[str]:
    """Tied and tensor-replicated weights that are not the same bit for bit on all ranks of this replica."""
    shards = trainer.pipe.builder.shards()
    rank = trainer.engine.grid.get_slice_parallel_rank()
    mine = {
        (name, rank if name in shards else -1): parameter.detach().view(-1).numpy().tobytes()
        for name, parameter in trainer.pipe.hf_named_parameters()
    }
    group = trainer.mode.replica_group
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    copies = {}
    for held in everyone:
        for name, value in held.items():
            copies.setdefault(name, []).append(value)
    assert any(len(values) > 1 for values in copies.values())
    return sorted(str(name) for name, values in copies.items() if len(set(values)) > 1)


def _copies(folder, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=None)
    trainer.callbacks = []
    local = trainer.mode.options.local
    for _ in range(9):
        losses = [None] * dist.get_world_size()
        dist.all_gather_object(losses, (trainer.mode.data_rank, _steps(trainer, 1)[0]))
        assert _differing_in_replica(trainer) == []
    assert len(set(losses)) == 2, "the ranks of a replica have one loss"
    assert (len({loss for _, loss in losses}) == 2) == local, "a loss is the replica's own where it trains alone"
    apart = local or trainer.mode.options.look_ahead
    assert bool(differing(trainer.engine)) == apart, "replicas differ between two averages, and only where they may"
    with trainer.mode.evaluation():
        assert differing(trainer.engine) == []
    trainer.mode.flush()
    assert differing(trainer.engine) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pipe, tensor, compression", [(2, 1, INT8), (1, 2, None)], ids=["pipe int8", "tensor fp32"])
def test_copies_of_a_weight_stay_equal_bit_for_bit(folder, mode, pipe, tensor, compression):
    values = _values(mode, pipe, tensor, compression)
    if mode == "local_sgd":
        values["recsys"]["data_parallel"] = {"mode": "local_sgd", "every": 4, "dense_until": 2}
    if mode == "diloco":
        values["recsys"]["data_parallel"] = {"mode": "diloco", "every": 4}
    run_on_grid(_copies, 4, folder=folder, values=values)


def _train(folder, name, values, resume=False):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    trainer.train()
    figures = trainer.evaluate("test")
    assert differing(trainer.engine) == []
    return figures, {n: value.detach().clone() for n, value in trainer.pipe.hf_state_dict().items()}


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("mode", MODES)
def test_a_pipeline_is_a_replica_like_another(folder, mode):
    """The figures of pipe 2 x data 2 and of tensor 2 x data 2 are those of data 2."""
    found = {}
    for pipe, tensor in ((1, 1), (2, 1), (1, 2)):
        values = _values(mode, pipe, tensor)
        if mode == "streaming":  # what travels together depends on the stages
            values["recsys"]["data_parallel"] = {**MODES[mode], "fragments": 1}
        name = f"{mode}-{pipe}-{tensor}"
        found[pipe, tensor] = run_on_grid(_train, 2 * pipe * tensor, folder=folder, name=name, values=values)
    plain = _losses(folder / f"{mode}-1-1")
    for pipe, tensor in ((2, 1), (1, 2)):
        assert _losses(folder / f"{mode}-{pipe}-{tensor}") == pytest.approx(plain, abs=1e-4)
        assert found[pipe, tensor][0][0] == pytest.approx(found[1, 1][0][0], abs=2e-3)
    assert len(plain) == len(set(plain)) == 10


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_the_trainer_resumes_bit_exactly(folder, mode):
    """Saved between two averages, at step 5; validations in between change nothing that is not repeated."""
    training = {"steps": 11, "eval_every_epochs": 1}
    values = _values(mode, compression=INT8, training=training, checkpoint={"every_epochs": 0, "every_steps": 5})
    whole = run_on_grid(_train, 4, folder=folder, name=f"{mode}-whole", values=values)
    again = f"{mode}-again"
    _copy_until(folder / f"{mode}-whole", folder / again, 5)
    resumed = run_on_grid(_train, 4, folder=folder, name=again, values=values, resume=True)
    assert _losses(folder / again) == _losses(folder / f"{mode}-whole")
    for (figures, parts), (expected, kept) in zip(resumed, whole, strict=True):
        assert figures == expected
        assert all(torch.equal(value, kept[name]) for name, value in parts.items())
    assert json.loads((folder / again / "data_parallel.json").read_text())["mode"] == MODES[mode]["mode"]


def _finish(folder):
    values = _values("diloco", pipe=1, training={"steps": 10, "eval_every_epochs": 1, "keep_best": False})
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "finished")
    trainer.train()
    return trainer.evaluate("valid")


def test_the_last_validation_shows_what_the_run_ends_with(folder):
    """10 = 3 x 3 + 1 steps: the last of them is part of it."""
    found = run_on_grid(_finish, 2, folder=folder)
    records = [json.loads(line) for line in (folder / "finished" / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if "valid" in record][-1]
    assert last == {"step": 10, "valid": found[0]}


def _copy_until(source, target, step):
    """The run as it would be had it been killed after the checkpoint of `step`."""
    import shutil

    shutil.copytree(source, target)
    for newer in (target / "checkpoints").glob("step_*"):
        if int(newer.name[5:]) > step:
            shutil.rmtree(newer)
    (target / "checkpoints" / "latest").write_text(f"step_{step:08d}")


def _reshape(folder, name, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=True)
    trainer.callbacks = []
    assert trainer.state["step"] == trainer.mode.steps == 5
    before = trainer.evaluate("test")
    losses = _steps(trainer, 4)
    trainer.mode.flush()
    assert differing(trainer.engine) == []
    return before, losses


def _shown(folder, values):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / "grid", overwrite=True)
    trainer.callbacks = []
    _steps(trainer, 5)
    trainer.save()
    return trainer.evaluate("test")


def test_another_grid_goes_on_from_the_common_weights(folder):
    values = _values("streaming", training={"steps": 20, "eval_every_epochs": 0})
    shown = run_on_grid(_shown, 4, folder=folder, values=values)[0]
    other = copy.deepcopy(values)
    other["recsys"]["pipe"] = 1
    found = run_on_grid(_reshape, 2, folder=folder, name="grid", values=other)
    assert found[0][0] == pytest.approx(shown, abs=1e-4)
    assert all(torch.tensor(losses).isfinite().all() for _, losses in found)


def _sums_behind_the_gradients(folder):
    values = config(pipe=1, data=2, data_parallel={"mode": "delayed"}, training={"steps": 3, "eval_every_epochs": 0})
    trainer = ds_recsys.Trainer({**values, "zero_optimization": {"stage": 0}}, data=folder / "log.csv", run_dir=None)
    trainer.callbacks = []
    mode, found, main = trainer.engine.data_parallel, [], threading.get_ident()
    send, all_reduce, under_way = mode._courier.send, dist.all_reduce, []

    def sent(*arguments):
        under_way.append(True)
        return send(*arguments)

    def seen(tensor, *arguments, **options):
        group = options.get("group")
        if under_way and threading.get_ident() == main and dist.get_world_size(group) > 1:
            found.append(tuple(tensor.shape))
        return all_reduce(tensor, *arguments, **options)

    mode._courier.send, dist.all_reduce = sent, seen
    losses = []
    for micro_batches in islice(trainer.batches.epoch_iterator(0), 3):
        under_way.clear()
        losses.append(trainer._step(micro_batches).item())
    return found, losses


def test_nothing_of_a_delayed_step_waits_behind_the_gradients_on_the_links(folder):
    (found, losses), (others, same_losses) = run_on_grid(_sums_behind_the_gradients, 2, folder=folder)
    assert found == others == []
    assert losses == same_losses  # the mean of both
