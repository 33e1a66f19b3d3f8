"""Saves are atomic and loads are verified, on a two-rank plain DeepSpeed engine."""

import json
import os
import signal

import deepspeed
import pytest
import torch
from distributed import distributed, run_on_grid

from ds_recsys import UserError, checkpoint

_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


def _engine():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=_CONFIG)[0]


def _step(engine):
    engine.backward(engine(torch.ones(2, 4)).square().mean())
    engine.step()


@distributed(data=2)
def test_round_trip_and_prune(tmp_path):
    engine = _engine()
    for step in (1, 2, 3):
        _step(engine)
        checkpoint.save(engine, tmp_path, step, {"step": step}, keep_last=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    checkpoint.save(engine, tmp_path, 1, {"step": 1}, keep_last=2)  # as after --resume step_00000001
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000001", "step_00000003"]
    assert checkpoint.find(tmp_path).name == "step_00000001"
    checkpoint.save(engine, tmp_path, 3, {"step": 3}, keep_last=2)
    expected = engine.module.weight.detach().clone()
    _step(engine)
    assert not torch.equal(engine.module.weight, expected)
    assert checkpoint.load(engine, checkpoint.find(tmp_path)) == {"step": 3}
    assert torch.equal(engine.module.weight, expected)


def _die_in_the_second_save(folder, moment):
    engine = _engine()
    _step(engine)
    checkpoint.save(engine, folder, 1, {"step": 1})
    if torch.distributed.get_rank() == 0:
        owner, name = {"half written": (engine, "save_checkpoint"), "before the rename": (checkpoint.os, "replace")}[
            moment
        ]
        setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
    checkpoint.save(engine, folder, 2, {"step": 2})


@pytest.mark.parametrize("moment", ["half written", "before the rename"])
def test_kill_during_a_save_leaves_the_previous_one(tmp_path, moment):
    with pytest.raises(AssertionError, match="rank 0 failed"):
        run_on_grid(_die_in_the_second_save, 2, folder=tmp_path, moment=moment)
    assert (tmp_path / ".writing").exists()
    run_on_grid(_go_on_after_the_kill, 2, folder=tmp_path)


def _go_on_after_the_kill(folder):
    tmp_path, engine = folder, _engine()
    assert checkpoint.load(engine, checkpoint.find(tmp_path)) == {"step": 1}
    _step(engine)
    checkpoint.save(engine, tmp_path, 2, {"step": 2})
    assert checkpoint.load(engine, checkpoint.find(tmp_path)) == {"step": 2}


@distributed(data=2)
def test_damage_is_named_on_every_rank(tmp_path):
    engine = _engine()
    _step(engine)
    checkpoint.save(engine, tmp_path, 1, {})
    whole = checkpoint.save(engine, tmp_path, 2, {})
    victim = sorted(whole.glob("*model_states.pt"))[0]
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    torch.distributed.barrier()
    with pytest.raises(UserError, match=f"{victim.name}.*--resume step_00000001"):
        checkpoint.load(engine, checkpoint.find(tmp_path))


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint to resume"):
        checkpoint.find(tmp_path)
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_00000001" / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="no whole checkpoint 'step_9'; there are step_00000001"):
        checkpoint.find(tmp_path, "step_9")
