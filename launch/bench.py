"""The README's figures, one sub-command each; --json FILE holds rows, machine, commit and figures.

python launch/bench.py quality ds_configs/ml100k_quality.json --json runs/quality.json     three seeds, mean and spread
python launch/bench.py head --json runs/head.json                      the item head's cross-entropy against its peers
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import bench_head
from command import arguments, run

_ROOT = Path(__file__).parents[1]


def quality(options) -> dict:
    """Train with each seed under the deepspeed launcher; the test figures of every model, per seed and over the seeds."""
    from ds_recsys import report

    rows = []
    for seed in options.seeds:
        run_dir = Path(options.run_dir) / f"{Path(options.config).stem}-seed{seed}"
        command = ["deepspeed", "--num_gpus", str(options.ranks), str(_ROOT / "launch/train.py")]
        command += [
            "--deepspeed_config",
            options.config,
            "--run_dir",
            str(run_dir),
            "--overwrite",
            "--set",
            f"recsys.seed={seed}",
        ]
        command += ["--data", options.data] if options.data else []
        for setting in options.set:
            command += ["--set", setting]
        path = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, check=True, env=path)
        rows.append({"seed": seed, **json.loads((run_dir / "metrics.json").read_text())})
    models = [name for name, figures in rows[0].items() if isinstance(figures, dict) and name != "seconds"]
    figures = {
        model: {
            name: {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else 0.0}
            for name in rows[0][model]
            for values in [[row[model][name] for row in rows]]
        }
        for model in models
    }
    k = next(name.split("@")[1] for name in rows[0][models[0]] if name.startswith("HR@"))
    means = {model: {name: value["mean"] for name, value in figures[model].items()} for model in models}
    print(f"\n{rows[0]['protocol']}\nmean over seeds {options.seeds}\n{report.table(means, k)}")
    for name in (f"HR@{k}", f"NDCG@{k}"):
        each = ", ".join(f"{row['trained'][name]:.4f}" for row in rows)
        spread = figures["trained"][name]["spread"]
        print(f"trained {name}: {each}; mean {means['trained'][name]:.4f}, standard deviation {spread:.4f}")
    print(f"seconds of training: {', '.join(str(row['seconds']['train']) for row in rows)}")
    return {"rows": rows, "figures": figures}


def machine() -> dict:
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """Of the checkout; None without git or a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def main(options) -> None:
    result = options.measure(options)
    if options.json:
        result = {**result, "machine": machine(), "commit": commit()}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _add(commands, measure):
    """A sub-command named after the function that measures: options -> {"rows": ..., "figures": ...}."""
    command = commands.add_parser(measure.__name__, help=measure.__doc__)
    command.set_defaults(measure=measure)
    command.add_argument("--json", help="file for rows, machine, commit and figures")
    return command


if __name__ == "__main__":
    parser = arguments(__doc__)
    commands = parser.add_subparsers(required=True)
    command = _add(commands, quality)
    command.add_argument("config", help="ds_config JSON")
    command.add_argument("--data", help="interaction log; in place of recsys.dataset.path")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.add_argument("--ranks", type=int, default=4)
    command.add_argument("--run_dir", default="runs/bench")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    bench_head.arguments(_add(commands, bench_head.head))
    run(main, parser)
