"""`bench.py timeline`: what `recsys.timeline` costs. The same steps with and without it, in turns, on two local ranks.

The tensor-parallel job is the hard case: its step has hundreds of small collectives, each of which is timed. A second arm
without the timeline shows what two equal arms differ by.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.arms import Arms
from benchmarks.harness import markdown
from benchmarks.repeats import groups, interleaved, median

HELP = "what the timing of steps costs, with and without it in turns"
_CONFIG = Path(__file__).parents[2] / "ds_configs/baselines.json"
_GRIDS = {"pipeline": {"recsys.pipe": 2}, "tensor": {"recsys.tensor": 2}}
_MICRO_BATCHES = 8
_ARMS = ("off", "on", "off again")
_TINY = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}


def arguments(parser) -> None:
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="of a repeat")


def measure(options) -> Iterator[dict]:
    """One row per mode, arm and repeat: seconds and CPU seconds of a step."""
    from ds_recsys.simulation import Cluster, load_spec

    repeats, steps = (1, 1) if options.quick else (options.repeats, options.steps)
    with (
        Cluster(load_spec({"hosts": [{"devices": 2}]}), loopback=True) as cluster,
        tempfile.TemporaryDirectory() as folder,
        Arms(cluster, Path(folder), _CONFIG, "timeline") as arms,
    ):
        for mode, grid in _GRIDS.items():
            arms.start(mode, "deepspeed", {**(_TINY if options.quick else {}), **grid, "recsys.threads_per_rank": 1})
        arms.ready([_MICRO_BATCHES])
        runs = {
            f"{mode}|{arm}": lambda mode=mode, arm=arm: arms.measure(
                mode, _MICRO_BATCHES, steps=steps, timeline=arm == "on"
            )
            for mode in _GRIDS
            for arm in _ARMS
        }
        for row in interleaved(runs, repeats, progress="timeline"):
            mode, arm = row.pop("arm").split("|")
            kept = {key: row[key] for key in ("repeat", "seconds", "cpu_seconds", "error") if key in row}
            yield {"mode": mode, "timeline": arm, **kept}


def figures(rows: list[dict]) -> dict:
    """Ratio of the median with the timeline to the mean of the two without, minus 1; `noise`: of those two."""
    found = {}
    for mode in _GRIDS:
        for name, key in (("wall", "seconds"), ("cpu", "cpu_seconds")):
            off, on, again = _medians(rows, mode, key)
            found[f"{mode}_overhead_{name}"] = 2 * on / (off + again) - 1
            found[f"{mode}_noise_{name}"] = abs(again / off - 1)
    return found


def table(rows: list[dict]) -> str:
    found, lines = figures(rows), []
    for mode in _GRIDS:
        for name, key in (("wall", "seconds"), ("cpu", "cpu_seconds")):
            seconds = [f"{value:.4f}" for value in _medians(rows, mode, key)]
            cost, noise = found[f"{mode}_overhead_{name}"], found[f"{mode}_noise_{name}"]
            lines.append([mode, name, *seconds, f"{cost:+.2%}", f"{noise:.2%}"])
    return markdown(["mode", "seconds of a step", *_ARMS, "cost", "between two without"], lines)


def plot(rows: list[dict], path: Path) -> None:
    """Every repeat."""
    with plots.drawing(path, 1, len(_GRIDS)) as axes:
        for axis, mode in zip(axes[0], _GRIDS, strict=True):
            for arm in _ARMS:
                cell = groups(rows, "mode", "timeline")[mode, arm]
                axis.plot([row["repeat"] for row in cell], [row["seconds"] for row in cell], ".-", label=arm)
            axis.set(title=mode, xlabel="repeat", ylabel="seconds a step", ylim=(0, None))
            axis.legend(frameon=False)


def _medians(rows: list[dict], mode: str, key: str) -> list[float]:
    """Of the arms, in their order."""
    cells = groups(rows, "mode", "timeline")
    return [median(row[key] for row in cells[mode, arm]) for arm in _ARMS]
