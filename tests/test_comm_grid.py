"""Every method in every kind of engine, under the deepspeed launcher: it trains, and what is replicated stays equal.

DS_RECSYS_FULL_GRID=1 runs every pair. Without it every method runs in two engines, and every engine with a fifth of the
methods.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from logs import write_log
from test_launch import _deepspeed, _environment

_METHODS = {
    "none": None,
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "int4 rotated": {"method": "int4", "rotate": True},
    "sign": {"method": "sign"},
    "topk": {"method": "topk", "ratio": 0.1},
    "topk int8": {"method": "topk", "ratio": 0.1, "values": "int8"},
    "randomk": {"method": "randomk", "ratio": 0.2},
    "powersgd": {"method": "powersgd", "rank": 2},
}
_STEPS = 50
_BASE = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "steps_per_print": 100_000,
}
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _pipe(pipe, tensor, **config):
    return {
        "engine": "pipe",
        "config": {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "steps_per_print": 100_000,
            **config,
            "recsys": {
                "pipe": pipe,
                "tensor": tensor,
                "dataset": {"max_length": 12},
                "model": {"config": _LLAMA, "tie": True},
                "training": {"steps": _STEPS, "eval_every_epochs": 0},
            },
        },
    }


_BF16 = {"bf16": {"enabled": True}}
_CELLS = {
    "plain": {"engine": "plain", "config": _BASE},
    "ZeRO-1": {"engine": "plain", "config": {**_BASE, "zero_optimization": {"stage": 1}}},
    "ZeRO-1 bf16": {"engine": "plain", "config": {**_BASE, **_BF16, "zero_optimization": {"stage": 1}}},
    "ZeRO-2": {"engine": "plain", "config": {**_BASE, "zero_optimization": {"stage": 2}}},
    "PP fp32": _pipe(2, 1),
    "PP bf16": _pipe(2, 1, **_BF16),
    "PP bf16 late": _pipe(2, 1, bf16={"enabled": True, "immediate_grad_update": False}),
    "PP ZeRO-1": _pipe(2, 1, zero_optimization={"stage": 1}),
    "PP x TP": _pipe(2, 2),
    "TP": _pipe(1, 2),
}


def _pairs(names):
    """(engine, method), "none" with every engine."""
    whole = os.environ.get("DS_RECSYS_FULL_GRID") == "1"
    lossy = list(_METHODS)[1:]
    for number, name in enumerate(_CELLS):
        chosen = lossy if whole else lossy[number % 5 :: 5]
        if name in names:
            yield from ((name, method) for method in ["none", *chosen])


def _run(tmp_path, ranks, names):
    """{(engine, method): result} in the engines `names`, in one start of the launcher."""
    pairs = list(_pairs(names))
    cells = [
        {**_CELLS[name], "compression": block and {"min_elements": 1, **block}, "steps": _STEPS}
        for name, block in ((name, _METHODS[method]) for name, method in pairs)
    ]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    write_log(tmp_path / "log.csv")
    script = Path(__file__).with_name("compression_grid.py")
    command = [*_deepspeed(ranks), script, tmp_path / "cells.json", tmp_path / "results.json", tmp_path / "log.csv"]
    process = subprocess.run(
        [*map(str, command)],
        env=_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert process.returncode == 0, process.stdout[-8000:]
    return dict(zip(pairs, json.loads((tmp_path / "results.json").read_text()), strict=True))


@pytest.mark.parametrize(
    "ranks, names",
    [
        (4, ["plain", "ZeRO-1", "ZeRO-1 bf16", "ZeRO-2"]),
        (4, [n for n in _CELLS if n[:2] in ("PP", "TP") and "x" not in n]),
        (8, ["PP x TP"]),
    ],
    ids=["plain engines", "pipelines", "pipelines with tensor parallelism"],
)
def test_every_method_trains_and_keeps_copies_equal(tmp_path, ranks, names):
    results = _run(tmp_path, ranks, names)
    for (name, method), result in results.items():
        dense, losses = results[name, "none"]["losses"], result["losses"]
        assert result["differing"] == [], (name, method)
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10]), (name, method, losses)
        if method == "none":
            continue
        assert result["sent"]["steps"] == _STEPS and result["sent"]["skipped"] == 0, (name, method)
        assert result["sent"]["sent_bytes"] < result["sent"]["dense_bytes"], (name, method)
        if not (method == "bf16" and "bf16" in name):  # DeepSpeed's own averaging sends bf16 there
            assert losses != dense, f"{name}, {method}: nothing was compressed"
        if method in ("bf16", "int8"):
            assert sum(losses[-10:]) == pytest.approx(sum(dense[-10:]), rel=0.05), (name, method)
