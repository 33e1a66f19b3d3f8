"""Replicas with unlike parts of the batch, for devices of unlike speed: the step of equal parts, but for rounding."""

import json

import pytest
import torch
from bench_runs import whole_grid
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys import UserError
from ds_recsys.config import load_config

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    write_log(folder / "log.csv")
    return folder


def _train(folder, name, grid, mode, shares, method):
    values = config(
        pipe=grid[0],
        tensor=grid[2],
        data_shares=shares,
        data_parallel={"mode": mode},
        compression={"method": method, "min_elements": 100},
        training={"epochs": 2, "keep_best": False},
    )
    values["zero_optimization"]["stage"] = 0
    values["recsys"]["model"] = {"config": _LLAMA}
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    rank = trainer.engine.grid.get_data_parallel_rank()
    trainer.train()
    sizes = {len(inputs) for step in trainer.batches.epoch_iterator(0) for inputs, _ in step}
    weights = {key: value.clone() for key, value in trainer.pipe.hf_state_dict().items()}
    return {"rank": rank, "sizes": sizes, "weights": weights}


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize(
    "grid, mode, method",
    [
        ((2, 2, 1), "sync", "none"),
        ((1, 2, 1), "delayed", "none"),
        pytest.param((1, 2, 1), "sync", "int8", marks=whole_grid),
        pytest.param((1, 2, 2), "sync", "none", marks=whole_grid),
    ],
)
def test_training_is_that_of_equal_parts(folder, grid, mode, method):
    runs = {}
    for name, shares in (("even", None), ("uneven", [3, 1])):
        run = f"{name}-{grid}-{mode}-{method}"
        arguments = {"grid": grid, "mode": mode, "method": method, "shares": shares, "name": run}
        runs[name] = run_on_grid(_train, 2 * grid[0] * grid[2], folder=folder, **arguments), _losses(folder / run)
    (even, losses), (uneven, others) = runs["even"], runs["uneven"]
    assert all(one["sizes"] == {4} for one in even)
    assert all(one["sizes"] == ({6} if one["rank"] == 0 else {2}) for one in uneven)
    exact = method == "none"  # what int8 rounds differs with what each replica has
    assert others == pytest.approx(losses, abs=1e-4 if exact else 5e-2)
    for one, other in zip(even, uneven, strict=True):
        assert one["weights"].keys() == other["weights"].keys()
        for key, value in one["weights"].items() if exact else ():
            torch.testing.assert_close(other["weights"][key], value, atol=2e-4, rtol=0)
    first = [one["weights"] for one in uneven if one["rank"] == 0]
    second = [one["weights"] for one in uneven if one["rank"] == 1]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items()), "replicas differ"


def test_what_cannot_work_is_one_line():
    values = config(pipe=1, data_shares=[1, 1, 1])
    with pytest.raises(UserError, match='"recsys.data_shares" has 3 number.* the data axis 2 replica'):
        load_config(values).resolve(world_size=2)
    values = config(pipe=1, data_shares=[1, 2], data_parallel={"mode": "local_sgd"})
    values["zero_optimization"]["stage"] = 0
    with pytest.raises(UserError, match='"local_sgd" does not work with "recsys.data_shares"'):
        load_config(values)
    with pytest.raises(UserError, match="data_shares"):
        load_config(config(data_shares=[1, 0]))
