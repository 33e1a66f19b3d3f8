"""`"parallel": "auto"` in real runs: all ranks take one plan, which trains as if it had been set by hand."""

import json

import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log
from test_config import refused
from test_launch import _deepspeed, _run

import ds_recsys
from ds_recsys.config import load_config
from ds_recsys.planner import layers, links

_SECONDS = 0.02  # of a measurement: any plan will do here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner")
    write_log(folder / "log.csv")
    return folder


def _auto(**recsys) -> dict:
    values = config(training={"steps": 6, "eval_every_epochs": 0}, **recsys)
    del values["recsys"]["pipe"], values["train_micro_batch_size_per_gpu"], values["zero_optimization"]
    return {**values, "recsys": {**values["recsys"], **recsys, "parallel": "auto"}}


def _train(folder, name, values, resume=False, steps=None):
    layers._SECONDS = links._SECONDS = _SECONDS
    if steps:
        values["recsys"]["training"]["steps"] = steps
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    trainer.train()
    weights = sum(float(parameter.detach().double().sum()) for parameter in trainer.pipe.parameters())
    return {
        "values": trainer.plan and trainer.plan.values,
        "described": trainer.describe(),
        "place": (trainer.grid.coordinates().pipe, trainer.grid.coordinates().model),
        "weights": weights,
    }


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def measured(folder):
    return run_on_grid(_train, 4, folder=folder, name="auto", values=_auto())


def test_all_ranks_take_one_plan_and_say_why(measured):
    first = measured[0]
    assert all(result["values"] == first["values"] for result in measured)
    assert first["values"]["recsys.pipe"] * first["values"]["recsys.data"] * first["values"]["recsys.tensor"] == 4
    assert "parallel auto: pipe" in first["described"] and "other grids" in first["described"]
    assert ("fused AdamW" in first["described"]) == first["values"].get("optimizer.params.fused", False)
    assert f"recsys.pipe: {first['values']['recsys.pipe']} (auto)" in first["described"]


def test_it_trains_as_if_it_had_been_set_by_hand(folder, measured):
    values = _auto()
    del values["recsys"]["parallel"]
    values = load_config(values, overrides=measured[0]["values"])
    by_hand = run_on_grid(_train, 4, folder=folder, name="hand", values=values.to_dict())
    assert _losses(folder / "hand") == _losses(folder / "auto")
    assert [one["weights"] for one in by_hand] == [one["weights"] for one in measured]


def test_a_resumed_run_keeps_its_plan(folder, measured):
    values = _auto(checkpoint={"every_epochs": 0, "every_steps": 3})
    first = run_on_grid(_train, 4, folder=folder, name="cut", values=values, steps=3)
    again = run_on_grid(_train, 4, folder=folder, name="cut", values=values, resume=True)
    assert again[0]["values"] == first[0]["values"]
    assert "as in the checkpoint" in again[0]["described"]
    assert len(_losses(folder / "cut")) == 6


@pytest.mark.parametrize(
    "recsys, expected",
    [
        ({"pipe": 2, "tensor": 2}, {"recsys.pipe": 2, "recsys.data": 1, "recsys.tensor": 2}),
        ({"data": 2, "compression": {"method": "topk", "ratio": 0.1}}, {"recsys.compression.method": "topk"}),
        ({"tensor": 1, "pipe": 1, "data_parallel": {"mode": "delayed"}}, {"recsys.data_parallel.mode": "delayed"}),
    ],
    ids=["grid", "method", "mode"],
)
def test_what_is_set_by_hand_stays(folder, recsys, expected, request):
    results = run_on_grid(_train, 4, folder=folder, name=request.node.callspec.id, values=_auto(**recsys))
    for result in results:
        assert expected.items() <= result["values"].items()
    assert all(torch.isfinite(torch.tensor(_losses(folder / request.node.callspec.id))))


def test_a_rank_alone_has_nothing_to_share(folder):
    (result,) = run_on_grid(_train, 1, folder=folder, name="alone", values=_auto())
    assert result["values"]["recsys.compression.method"] == "none" and result["values"]["recsys.pipe"] == 1


def test_what_cannot_be_compared_is_one_line():
    values = _auto()
    del values["train_batch_size"]
    values["train_micro_batch_size_per_gpu"] = 4
    refused(lambda: load_config(values), '"recsys.parallel" "auto"', '"train_batch_size"')
    split = _auto(head={"blocks": 2})
    split["recsys"]["model"]["tie"] = False
    refused(lambda: load_config(split), '"recsys.head.blocks" is 2', "leave one of them out")
    plain = {"train_batch_size": 1, "recsys": {"parallel": "auto"}}
    refused(lambda: ds_recsys.initialize(model=torch.nn.Linear(2, 2), config=plain), '"recsys.parallel"', "Trainer")
    assert not torch.distributed.is_initialized()


def test_under_the_launcher(tmp_path, folder):
    (tmp_path / "config.json").write_text(json.dumps(_auto()))
    arguments = ["--deepspeed_config", tmp_path / "config.json", "--data", folder / "log.csv"]
    output = _run(tmp_path, _deepspeed(2), *arguments, "--run_dir", tmp_path / "run")
    assert "parallel auto: measuring layers, tensor 1" in output
    assert "parallel auto: pipe" in output and (tmp_path / "run/export/config.json").exists()
