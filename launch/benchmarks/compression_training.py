"""The training part of bench.py compression: steps on a simulated cluster, and whole trainings without it.

Links change no result, so losses and ranking figures come from trainings that run as fast as the machine goes; what a step
takes and sends comes from a few steps of the same model on four hosts.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import quality
from benchmarks.arms import Arms
from benchmarks.compression_methods import AUTO, DENSE, OURS, rounds
from benchmarks.harness import ROOT, load
from benchmarks.repeats import interleaved, median

_CONFIG = ROOT / "ds_configs/quickstart.json"
_HOSTS, _QUICK_HOSTS = 4, 2  # of one device each
_STEPS = 10  # of a measurement
_BIN = 20  # steps whose losses are averaged in a row
_COMMON = {
    "recsys.pipe": 1,
    "recsys.tensor": 1,
    "recsys.threads_per_rank": 1,
    "zero_optimization.stage": 0,
    "recsys.training.eval_every_epochs": 1_000_000,  # that is, after the last step
    "recsys.checkpoint.every_epochs": 0,
}


def training(options) -> Iterator[dict]:
    """Rows of kind "workload" (what the link follows from), "step" (a measurement) and "quality" (a whole training)."""
    if not options.quick:
        found = _resumed(options.resume)  # before the first row, for it may be the file that the rows go to
        yield from _speed(_CONFIG, options.methods, options)
        yield from _quality(_CONFIG, options.methods, options, found)
        return
    options.methods, options.seeds, options.ranks, options.repeats, options.speed = ["int8"], [0], 2, 1, 1.0
    with tempfile.TemporaryDirectory() as scratch:
        config, log = quality.small(Path(scratch))
        options.data, options.run_dir = str(log), f"{scratch}/runs"
        yield from _speed(config, options.methods, options)
        yield from _quality(config, options.methods, options, {})


def settings(config: Path, method: str, ranks: int, data: str | None = None) -> dict:
    """Dotted keys over the config: plain data parallelism of one micro-batch, and the method's compression."""
    from ds_recsys import load_config

    batch = load_config(config).train_batch_size
    options = OURS[method] if method != DENSE else {}
    compression = {f"recsys.compression.{key}": value for key, value in options.items()}
    path = {"recsys.dataset.path": data} if data else {}
    return {**_COMMON, "train_micro_batch_size_per_gpu": batch // ranks, **path, **compression}


def link_rate(parameters: int, compute_seconds: float, ranks: int) -> float:
    """bit/s at which a ring all-reduce of the fp32 gradients takes as long as the compute of a step."""
    return 8 * 4 * parameters * 2 * (ranks - 1) / ranks / compute_seconds


def _speed(config: Path, methods: list[str], options) -> Iterator[dict]:
    from ds_recsys import load_config
    from ds_recsys.simulation import Cluster, load_spec

    quality.fetch(config, options.data)
    hosts = _QUICK_HOSTS if options.quick else _HOSTS
    spec = load_spec({"hosts": [{"count": hosts, "devices": 1, "speed": options.speed}]})
    groups, rate, batch = rounds(methods), None, load_config(config).train_batch_size
    with Cluster(spec) as cluster:
        for number, names in enumerate(groups):
            with (
                tempfile.TemporaryDirectory() as folder,
                Arms(cluster, Path(folder), config, f"group {number + 1} of {len(groups)}") as arms,
            ):
                _set_links(cluster, None)
                _start(arms, config, [name for name in names if name != AUTO], hosts, options.data)
                if rate is None:
                    workload = _workload(arms, hosts)
                    rate = workload["rate"]
                    yield workload
                _set_links(cluster, rate)
                if AUTO in names:  # which shall see the link
                    _start(arms, config, [AUTO], hosts, options.data)
                turns = {name: lambda name=name: arms.measure(name, hosts, steps=_STEPS) for name in names}
                for row in interleaved(turns, options.repeats, progress=arms.label):
                    yield _step_row(row, number, batch)


def _start(arms: Arms, config: Path, names: list[str], hosts: int, data: str | None) -> None:
    for name in names:
        arms.start(name, "deepspeed", settings(config, name, hosts, data))
    arms.ready([hosts])


def _workload(arms: Arms, hosts: int) -> dict:
    """The dense arm over unlimited links: parameters, compute of a step, and the link that takes as long."""
    found = [arms.measure(DENSE, hosts) for _ in range(5)]
    compute, parameters = median(row["split"]["compute"] for row in found), found[0]["parameters"]
    rate = link_rate(parameters, compute, hosts)
    place = {"kind": "workload", "hosts": hosts, "parameters": parameters}
    return {**place, "compute_seconds": compute, "rate": rate}


def _step_row(row: dict, group: int, batch: int) -> dict:
    kept = {"kind": "step", "method": row["arm"], "group": group, "repeat": row["repeat"]}
    if "error" in row:
        return {**kept, "error": row["error"]}
    sent = max(row["sent_bytes"].values(), default=0) / _STEPS
    split = row.get("split")
    return {**kept, "seconds": row["seconds"], "samples_per_s": batch / row["seconds"], "bytes": sent, "split": split}


def _quality(config: Path, methods: list[str], options, found: dict[tuple, dict]) -> Iterator[dict]:
    """Seed by seed, so that a broken-off run has whole seeds. Without "auto", which would choose for this machine."""
    for seed in options.seeds:
        for method in [DENSE, *(method for method in methods if method != AUTO)]:
            row = found.get((method, seed, options.ranks, options.epochs))
            yield row or _train(config, method, seed, options)


def _resumed(file: str | None) -> dict[tuple, dict]:
    """(method, seed, ranks, epochs) -> the row of a training in a kept result."""
    rows = load(Path(file), "compression")["rows"] if file and Path(file).exists() else []
    trained = [row for row in rows if row["kind"] == "quality" and "error" not in row]
    return {(row["method"], row["seed"], row["ranks"], row["epochs"]): row for row in trained}


def _train(config: Path, method: str, seed: int, options) -> dict:
    from ds_recsys.errors import UserError
    from ds_recsys.runlog import read_log

    changes = settings(config, method, options.ranks)
    if options.epochs:
        changes["recsys.training.epochs"] = options.epochs
    run_dir = Path(options.run_dir) / f"{method}-seed{seed}"
    place = {"kind": "quality", "method": method, "seed": seed, "ranks": options.ranks, "epochs": options.epochs}
    print(f"\n{method}, seed {seed}", flush=True)
    try:
        result = quality.train(config, options.data, seed, options.ranks, run_dir, _texts(changes))
    except UserError as error:
        return {**place, "error": str(error)}
    records = read_log(run_dir / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    valid = [record["valid"] for record in records if "valid" in record][-1]
    return {
        **place,
        "steps": len(losses),
        "train_seconds": result["seconds"]["train"],
        "valid_loss": valid["loss"],
        "train_loss": statistics.mean(losses[-max(1, len(losses) // 30) :]),
        "ndcg": result["trained"]["NDCG@10"],
        "hit_rate": result["trained"]["HR@10"],
        "loss_bin": _BIN,
        "losses": thin(losses, _BIN),
    }


def thin(losses: list[float], size: int) -> list[float]:
    """Means of `size` losses in a row; the last may be of fewer."""
    return [round(statistics.mean(losses[i : i + size]), 5) for i in range(0, len(losses), size)]


def _texts(changes: dict) -> list[str]:
    """As train.py's --set takes them: JSON where it is not a text."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]


def _set_links(cluster, rate: float | None) -> None:
    for host in cluster.spec.hosts:
        cluster.set_link(host.name, up=rate, down=rate)
