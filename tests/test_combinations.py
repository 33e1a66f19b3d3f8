"""Every pair of choices that a config allows together trains in some run; a pair it does not is refused in one line.

Choices: grid, ZeRO stage, precision, tied weights, partition, compression, mode, loss. The runs are drawn so that each pair is
in one of them (pairwise testing, https://csrc.nist.gov/projects/automated-combinatorial-testing-for-software).
DS_RECSYS_FULL_GRID=1 trains them all.
"""

import functools
import itertools
import math
import random

import pytest
from bench_runs import whole_grid
from compression_grid import differing
from deepspeed.accelerator import get_accelerator
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys import UserError
from ds_recsys.config import load_config

_CHOICES = {
    "pipe": [1, 2],
    "data": [1, 2],
    "tensor": [1, 2],
    "zero": [0, 1],
    "precision": ["fp32", "bf16", "fp16"],
    "tie": [True, False],
    "partition": ["parameters", "adaptive"],
    "compression": ["none", "int8", "int4", "topk", "powersgd"],
    "mode": ["sync", "delayed", "local_sgd", "diloco", "async"],
    "loss": ["full", "sampled"],
}
_STEPS = 4
_DEFAULT = 3  # every third run is one of the default tests


def _values(row: dict) -> dict:
    mode = {"mode": row["mode"], **({"every": 2} if row["mode"] in ("local_sgd", "diloco") else {})}
    compression = {"method": row["compression"]}
    if row["compression"] != "none":
        compression["min_elements"] = 64
    values = config(
        pipe=row["pipe"],
        data=row["data"],
        tensor=row["tensor"],
        partition={"method": row["partition"]},
        compression=compression,
        data_parallel=mode,
        head={"loss": row["loss"], **({"negatives": 16} if row["loss"] != "full" else {})},
        training={"steps": _STEPS, "eval_every_epochs": 0},
        checkpoint={"every_epochs": 0},
    )
    values["recsys"]["model"]["tie"] = row["tie"]
    values["zero_optimization"] = {"stage": row["zero"]}
    if row["precision"] != "fp32":
        values[row["precision"]] = {"enabled": True}
    return values


def _reason(row: dict) -> str | None:
    """Why the config does not allow the row; None where it does."""
    try:
        load_config(_values(row)).resolve(world_size=row["pipe"] * row["data"] * row["tensor"])
    except UserError as error:
        return str(error)
    return None


def _pairs(row: dict) -> set:
    return set(itertools.combinations(sorted(row.items(), key=lambda item: list(_CHOICES).index(item[0])), 2))


def _all_pairs() -> set:
    return {
        ((one, a), (other, b))
        for one, other in itertools.combinations(_CHOICES, 2)
        for a in _CHOICES[one]
        for b in _CHOICES[other]
    }


@functools.cache
def _drawn() -> tuple[list[dict], dict]:
    """(rows that hold every pair that can be, {a pair that cannot be: the reason}), the same at every call."""
    generator = random.Random(0)
    missing, rows, refused = _all_pairs(), [], {}
    while missing:
        pair = min(missing, key=str)
        best, reason = None, None
        for attempt in range(60):
            row = {name: generator.choice(values) for name, values in _CHOICES.items()}
            if attempt >= 20:  # most choices go with the plain ones
                row.update(zero=0, precision="fp32", partition="parameters", mode="sync", compression="none", data=2)
            row.update(dict(pair))
            why = _reason(row)
            if why:
                reason = why
            elif best is None or len(_pairs(row) & missing) > len(_pairs(best) & missing):
                best = row
            if attempt == 19 and best:
                break
        if best is None:
            refused[pair] = reason
            missing.discard(pair)
        else:
            rows.append(best)
            missing -= _pairs(best)
    return rows, refused


def pytest_generate_tests(metafunc):
    """Rows are drawn by pytest alone, and not by each rank that imports this file."""
    if "row" in metafunc.fixturenames:
        rows, _ = _drawn()
        marks = [() if number % _DEFAULT == 0 else whole_grid for number in range(len(rows))]
        metafunc.parametrize(
            "row", [pytest.param(row, id=_name(row), marks=m) for row, m in zip(rows, marks, strict=True)]
        )


def _name(row: dict) -> str:
    return "-".join(map(str, row.values()))


def _train(folder, name, values):
    get_accelerator().is_fp16_supported = lambda: True  # slow on most CPUs, and the same
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name)
    losses = []
    step = trainer._step
    trainer._step = lambda batches: losses.append(step(batches)) or losses[-1]
    trainer.train()
    figures = trainer.evaluate("valid")
    return [float(loss) for loss in losses], differing(trainer.engine), figures["loss"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("combinations")
    write_log(folder / "log.csv")
    return folder


def test_it_trains(folder, row):
    ranks = row["pipe"] * row["data"] * row["tensor"]
    results = run_on_grid(_train, ranks, folder=folder, name=_name(row), values=_values(row))
    for losses, unequal, loss in results:
        assert losses and all(map(math.isfinite, losses)) and math.isfinite(loss)
        assert unequal == []
    assert len({loss for _, _, loss in results}) == 1


def test_pairs_that_are_refused_say_why():
    """What cannot be together is known, and said in one line that names both."""
    assert {tuple(value for _, value in pair) for pair in _drawn()[1]} == {
        (1, "delayed"), (1, "local_sgd"), (1, "diloco"), (1, "async"),
        ("fp16", "delayed"), ("fp16", "local_sgd"), ("fp16", "diloco"), ("fp16", "async"),
        ("bf16", "local_sgd"), ("bf16", "diloco"), ("bf16", "async"),
        ("adaptive", "delayed"), ("adaptive", "local_sgd"), ("adaptive", "diloco"), ("adaptive", "async"),
        ("powersgd", "async"),
    }  # fmt: skip
    for reason in _drawn()[1].values():
        assert "\n" not in reason and "recsys." in reason
