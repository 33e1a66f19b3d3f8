"""A running pipeline rebalances itself: a stage that slows, a head that costs more, engines and scripts of others."""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys import UserError
from ds_recsys.balance.decide import Rule
from ds_recsys.balance.report import describe, idle_share, plot, write
from ds_recsys.topology import Grid

_LAYERS, _MICRO_BATCHES, _SECONDS = 8, 8, 0.004


class _Pace(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(ctx, value, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None


class _Layer(torch.nn.Linear):
    """Sleeps `weight` units of time on a device that is `slowdown` times as slow as it should be."""

    slowdown = 1.0  # of this process, which is the device

    def __init__(self, units=1):
        super().__init__(8, 8)
        self.units = units

    def forward(self, value):
        return torch.tanh(_Pace.apply(super().forward(value), _SECONDS * self.units * _Layer.slowdown))


def _engine(pipe, data=1, units=(), initialize=deepspeed.initialize, **block):
    torch.manual_seed(0)
    _Layer.slowdown = 1.0
    units = units or [1] * _LAYERS
    model = PipelineModule(
        [_Layer(one) for one in units],
        topology=Grid(pipe, data).deepspeed(),
        loss_fn=torch.nn.MSELoss(),
        partition_method="uniform",
    )
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": _MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": 1000,
        **block,
    }
    return initialize(model=model, model_parameters=list(model.parameters()), config=values)[0]


def _train(engine, steps, after=lambda step: None):
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        values = [torch.randn(2, 8, generator=generator) for _ in range(_MICRO_BATCHES)]
        losses.append(engine.train_batch(iter([(value, value.flip(0)) for value in values])).item())
        after(step)
    return losses


def _straggler(data):
    """Stage 0 is half as fast from step 12 on: (losses, losses without moves, the balance's view, step of the change)."""
    change, steps, lines = 12, 30, []
    stayed = _train(_engine(2, data), steps)
    engine = _engine(2, data)
    balance = ds_recsys.AdaptivePartition(engine, rule=Rule(patience=2, evidence=0.3), announce=lines.append)

    def after(step):
        balance()
        if step == change and engine.module.stage_id == 0:
            _Layer.slowdown = 2.0

    moved = _train(engine, steps, after)
    balance.close()
    _train(engine, 1, lambda _: balance())
    seen = [record.step for record in balance.records]
    missing = set(range(1, seen[-1] + 1)).difference(seen)  # between a decision and its move
    assert seen == sorted(set(seen)) and steps - 6 < seen[-1] <= steps and len(missing) <= 2 * len(balance.moves)
    return stayed, moved, balance.records, balance.moves, lines


@pytest.mark.parametrize("data", [1, 2])
def test_a_stage_that_slows_down_gives_layers_away_and_nothing_else_changes(data):
    results = run_on_grid(_straggler, 2 * data, data=data)
    stayed, moved, records, moves, lines = results[0]
    assert moved == stayed  # losses, bit for bit
    assert [move.decision.bounds for move in moves] == [(0, 3, 8)]
    assert records[0].bounds == (0, 4, 8) and records[-1].bounds == (0, 3, 8)
    step = moves[0].decision.step
    assert 13 < step < 13 + 10
    before, after = (median(r.step_seconds for r in part) for part in (records[13:step], records[-8:]))
    assert after < before
    assert moves[0].realised_gain == pytest.approx(moves[0].decision.predicted_gain, rel=0.4)
    assert moves[0].after.idle_share < moves[0].before.idle_share
    assert "bounds [0, 4, 8] -> [0, 3, 8]" in lines[0] and "of a step" in lines[1] and len(lines) == 2
    assert all([m.decision for m in r[3]] == [m.decision for m in moves] for r in results)
    assert not any(lines for *_, lines in results[1:])


def _exchanges():
    """The steps after which a rank told the others something, and the steps that are recorded then."""
    engine = _engine(2)
    balance, calls = ds_recsys.AdaptivePartition(engine), []
    with mock.patch.object(torch.distributed, "all_gather", side_effect=torch.distributed.all_gather) as gathered:
        _train(engine, 12, lambda step: (balance(), calls.append(gathered.call_count)))
        told = [step + 1 for step in range(12) if calls[step] > (calls[step - 1] if step else 0)]
    return told, [record.step for record in balance.records]


def test_ranks_tell_each_other_their_times_after_each_fifth_step_and_hear_in_the_next():
    """Where rank 0's word starts, too."""
    assert run_on_grid(_exchanges, 2) == [([5, 6, 10, 11], list(range(1, 11)))] * 2


def _heavy(method, folder):
    """The last layer costs as much as five others; cut once."""
    engine, lines = _engine(2, units=[1] * 7 + [5]), []
    balance = ds_recsys.AdaptivePartition(engine, method=method, announce=lines.append)
    _train(engine, 32, lambda _: balance())
    if torch.distributed.get_rank() == 0:
        print(describe(balance))
        write(balance, folder / "balance.json")
        plot(balance.records, balance.moves, folder / "balance.png")
    return list(engine.module.parts), len(balance.records), lines, idle_share(balance.records, _MICRO_BATCHES)


def test_profile_cuts_by_what_was_measured_and_looks_once_more(tmp_path):
    parts, seen, lines, idle = run_on_grid(_heavy, 2, method="profile", folder=tmp_path)[0]
    assert parts == [0, 6, 8] and len(lines) == 2 and "[0, 4, 8] -> [0, 6, 8]" in lines[0]
    assert "bounds [0, 6, 8] are the best there are" in lines[1]
    assert seen < 24  # and watches no longer
    assert 0.1 < idle < 0.5  # (4 + 8) units of 2 x 8, and the first micro-batch alone
    written = json.loads((tmp_path / "balance.json").read_text())
    assert len(written["records"]) == seen and written["moves"][0]["migration"]["bounds"] == [0, 6, 8]
    assert (tmp_path / "balance.png").stat().st_size > 5000


def _by_config():
    """`ds_recsys.initialize` reads the block: nothing is called after the steps."""
    block = {"recsys": {"pipe": 2, "partition": {"method": "profile"}}}
    engine = _engine(2, units=[1] * 7 + [5], initialize=ds_recsys.initialize, **block)
    _train(engine, 12)
    assert list(engine.module.parts) == [0, 6, 8]
    assert len(engine.adaptive_partition.moves) == 1


def test_a_config_is_enough():
    run_on_grid(_by_config, 2)


def _mistakes():
    engine = _engine(1)
    with pytest.raises(UserError, match='method "parameters"; give "adaptive" or "profile"'):
        ds_recsys.AdaptivePartition(engine, method="parameters")
    assert ds_recsys.AdaptivePartition(engine)() is None  # one stage has nothing to move
    model = torch.nn.Linear(2, 2)
    block = {"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    plain = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=block)[0]
    with pytest.raises(UserError, match="no pipeline"):
        ds_recsys.AdaptivePartition(plain)


def test_mistakes_are_one_line():
    run_on_grid(_mistakes, 1)


def _recommender(folder, name, steps, resume, heavy, tie=True):
    """A Trainer whose last stage gets slow: (bounds, losses), and what its checkpoint says."""
    block = {"method": "adaptive", "min_gain": 0.1}
    values = config(partition=block, training={"steps": steps, "eval_every_epochs": 0}, checkpoint={"every_steps": 10})
    values["recsys"]["model"]["tie"] = tie
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    first = list(trainer.pipe.parts)
    if heavy and trainer.pipe.is_last_stage:
        for layer in trainer.pipe.forward_funcs:
            if isinstance(layer, torch.nn.Module):
                layer.register_forward_hook(lambda *_: time.sleep(0.02))
    trainer.train()
    return first, list(trainer.pipe.parts)


def test_a_trainer_moves_layers_and_a_run_resumes_at_its_bounds(tmp_path):
    write_log(tmp_path / "log.csv")
    first, moved = run_on_grid(_recommender, 2, folder=tmp_path, name="run", steps=30, resume=False, heavy=True)[0]
    assert moved[1] > first[1]
    state = json.loads((tmp_path / "run/checkpoints/step_00000030/state.json").read_text())
    assert state["bounds"] == moved and (tmp_path / "run/balance.png").exists()
    resumed, _ = run_on_grid(_recommender, 2, folder=tmp_path, name="run", steps=32, resume=True, heavy=False)[0]
    assert resumed == moved


def test_a_head_of_its_own_is_found_while_layers_are_sampled(tmp_path):
    write_log(tmp_path / "log.csv")
    first, moved = run_on_grid(
        _recommender, 2, folder=tmp_path, name="run", steps=30, resume=False, heavy=True, tie=False
    )[0]
    assert moved[1] > first[1]


_SCRIPT = """
import time
import deepspeed, torch
from deepspeed.pipe import PipelineModule
{first}
deepspeed.init_distributed("gloo")
torch.manual_seed(0)

class Slow(torch.nn.Linear):
    def forward(self, value):
        time.sleep(0.03)
        return super().forward(value)

net = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(6)], Slow(8, 8), Slow(8, 4))
net = PipelineModule(layers=net, num_stages=2, loss_fn=torch.nn.CrossEntropyLoss(), partition_method="uniform")
data = [(torch.randn(8), torch.randint(4, ())) for _ in range(64)]
config = {{
    "train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 1000,
    "optimizer": {{"type": "AdamW", "params": {{"lr": 1e-3, "torch_adam": True}}}},
}}
engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), training_data=data, config=config)
{second}
for step in range(24):
    loss = engine.train_batch()
    {third}
if engine.global_rank == 0:
    print("ended", loss.item(), list(engine.module.parts))
"""


def test_deepspeeds_own_example_with_two_added_lines(tmp_path):
    """An nn.Sequential as PipelineModule, a dataset, `train_batch()`, the deepspeed launcher."""
    found = {}
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port"]
    lines = ("", "balance = __import__('ds_recsys').AdaptivePartition(engine)", "balance()")
    for port, name, added in ((29731, "plain", ("", "", "pass")), (29732, "balanced", lines)):
        script = tmp_path / f"{name}.py"
        script.write_text(_SCRIPT.format(first=added[0], second=added[1], third=added[2]))
        done = subprocess.run([*launcher, str(port), str(script)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = next(line for line in done.stdout.splitlines() if "ended" in line).split("ended")[1].split()
        assert ("bounds [0, 4, 8] -> [0, 7, 8]" in done.stdout) == (name == "balanced")
    assert found["plain"][0] == found["balanced"][0] and found["balanced"][1:] == ["[0,", "7,", "8]"]
