"""The gradient of a tied item table in two parts: what trains is as if it had come in one."""

import json

import pytest
import torch
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys.head.row_sparse import rows_pay

_ITEMS = 4_000  # many, against the items in a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    write_log(folder / "log.csv")
    return folder


def _config(tensor=1, items=_ITEMS, steps=6, **compression):
    values = config(training={"steps": steps, "eval_every_epochs": 0}, tensor=tensor, pipe=1)
    values["recsys"]["dataset"]["min_catalogue"] = items
    values["recsys"]["compression"] = compression
    return {**values, "zero_optimization": {"stage": 0}}


def _train(folder, name, values, resume=False):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    trainer.train()
    compression, split, first = getattr(trainer.engine, "gradient_compression", None), False, False
    weights = {name: parameter.detach().clone() for name, parameter in trainer.pipe.hf_named_parameters()}
    if compression:
        table, buckets = compression._adapter._table, compression._adapter._buckets.buckets
        split = table is not None and table.head is not None
        first = split and buckets[0].parameters[0] is table.head
        compression.close()
        assert not trainer.pipe.tied_modules["item_table"].embedding.sparse
    return {"split": split, "first": first, "weights": weights, "names": list(dict(trainer.pipe.named_parameters()))}


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("tensor", [1, 2])
def test_sums_of_fp32_are_those_of_deepspeed(folder, tensor):
    name = f"fp32 {tensor}"
    dense = {"method": "int8", "min_elements": 10**9}  # nothing is that large: all is sent as fp32
    ours = run_on_grid(_train, 2 * tensor, folder=folder, name=name, values=_config(tensor, **dense))
    plain = run_on_grid(_train, 2 * tensor, folder=folder, name=f"plain {name}", values=_config(tensor))
    assert all(result["split"] and result["first"] for result in ours)
    assert _losses(folder / name) == pytest.approx(_losses(folder / f"plain {name}"), abs=2e-6)
    for one, other in zip(ours, plain, strict=True):
        assert one["names"] == other["names"], "the leaf is none of the module's parameters"
        for key, weight in one["weights"].items():
            assert torch.allclose(weight, other["weights"][key], atol=2e-5), key


def test_replicas_stay_equal_and_a_resumed_run_goes_on(folder):
    int8 = {"method": "int8", "min_elements": 1}
    whole = run_on_grid(_train, 2, folder=folder, name="whole", values=_config(**int8))
    assert all(result["split"] for result in whole)
    for key, weight in whole[0]["weights"].items():
        assert torch.equal(weight, whole[1]["weights"][key]), key
    for steps in (3, 6):
        values = _config(steps=steps, **int8)
        values["recsys"]["checkpoint"] = {"every_epochs": 0, "every_steps": 3}
        values["scheduler"]["params"] |= {"total_num_steps": 6, "warmup_num_steps": 2}
        cut = run_on_grid(_train, 2, folder=folder, name="cut", values=values, resume=steps == 6)
    values = _config(**int8)
    values["scheduler"]["params"] |= {"total_num_steps": 6, "warmup_num_steps": 2}
    unbroken = run_on_grid(_train, 2, folder=folder, name="unbroken", values=values)
    assert _losses(folder / "cut") == _losses(folder / "unbroken")
    for key, weight in unbroken[0]["weights"].items():
        assert torch.equal(weight, cut[0]["weights"][key]), key


@pytest.mark.parametrize("change", [{"items": 0}, {"early_head": False}, {"overlap": False}], ids=str)
def test_a_table_that_is_small_or_may_not_be_split_stays_whole(folder, change):
    result = run_on_grid(
        _train, 2, folder=folder, name=str(change), values=_config(**change, method="int8", min_elements=1)
    )
    assert not any(one["split"] for one in result)


def test_rows_pay_where_they_are_few():
    assert rows_pay(100_000, 2_000, 4, 1.0)
    assert not rows_pay(100_000, 2_000, 4, 0.1)  # the table is sent as little
    assert not rows_pay(100_000, 2_000, 16, 1.0)  # rows go to each replica
    assert not rows_pay(100_000, 50_000, 2, 4.0)
