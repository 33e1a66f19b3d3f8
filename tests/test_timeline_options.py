"""`recsys.timeline` in a config: through the Trainer and through `ds_recsys.initialize`."""

import contextlib
import csv
import io
import json
import os

import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys import UserError
from ds_recsys.timeline import CATEGORIES


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def _train(folder, name, timeline):
    values = config(training={"epochs": 2, "keep_best": False}, timeline=timeline)
    values["csv_monitor"] = {"enabled": True, "output_path": str(folder / name), "job_name": "monitor"}
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train()
    assert "train_batch" not in vars(trainer.engine), "a hook is left behind"
    return trainer.state["step"], printed.getvalue()


def test_trainer_reports_its_steps_and_its_losses_stay_bit_equal(tmp_path):
    write_log(tmp_path / "log.csv")
    run_on_grid(_train, 2, folder=tmp_path, name="off", timeline={})
    assert not (tmp_path / "off" / "timeline.json").exists()
    on = {"enabled": True, "every": 2, "trace_step": 3}
    (steps, printed), (_, silence) = run_on_grid(_train, 2, folder=tmp_path, name="on", timeline=on)
    assert _losses(tmp_path / "on") == _losses(tmp_path / "off") and len(_losses(tmp_path / "on")) == steps

    assert "a step: compute" not in silence
    for step in range(2, steps + 1, 2):
        assert printed.count(f"step {step}  ") == 1
    assert "mean of 2 ranks" in printed and "rank 1: pipe 1 data 0 tensor 0" in printed

    summary = json.loads((tmp_path / "on" / "timeline.json").read_text())
    assert summary["times"].keys() == set(CATEGORIES) and 0 < summary["busy"] < 1
    assert [rank["steps"] for rank in summary["ranks"]] == [steps, steps]
    events = json.loads((tmp_path / "on" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    figures = {path.name: path for path in (tmp_path / "on" / "monitor").iterdir()}
    with open(figures["Timeline_compute.csv"]) as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + steps // 2 and float(rows[1][1]) > 0


def _drop_in(folder, timeline):
    os.chdir(folder)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "recsys": {"timeline": timeline},
    }
    engine = ds_recsys.initialize(model=model, model_parameters=model.parameters(), config=values)[0]
    losses = []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(4):
            loss = engine(torch.ones(2, 8)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    steps = hasattr(engine, "step_timeline") and len(engine.step_timeline.steps)
    return losses, steps, printed.getvalue().count("s a step: compute")


def test_initialize_reports_the_steps_of_any_engine(tmp_path):
    off = run_on_grid(_drop_in, 2, folder=tmp_path, timeline={"enabled": False})
    assert not list(tmp_path.iterdir())
    on = run_on_grid(_drop_in, 2, folder=tmp_path, timeline={"enabled": True, "every": 2, "trace_step": 2})
    assert [losses for losses, _, _ in on] == [losses for losses, _, _ in off]
    assert [figures[1:] for figures in on] == [(4, 2), (4, 0)]
    assert [figures[1:] for figures in off] == [(False, 0), (False, 0)]
    assert (tmp_path / "timeline_trace.json").exists()


def test_options_are_checked():
    with pytest.raises(UserError, match="timeline.every"):
        ds_recsys.load_config(config(timeline={"every": 0}))
    with pytest.raises(UserError, match="recsys.timeline"):
        ds_recsys.load_config(config(timeline={"trace": 3}))
