"""`bench.py timeline`: what `recsys.timeline` costs. The same steps with and without it, in turns, on two local ranks.

The tensor-parallel job is the hard case: its step has hundreds of small collectives, each of which is timed.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.arms import Arms
from benchmarks.harness import markdown
from benchmarks.repeats import groups, interleaved, median, spread

HELP = "what the timing of steps costs, with and without it in turns"
_CONFIG = Path(__file__).parents[2] / "ds_configs/baselines.json"
_GRIDS = {"pipeline": {"recsys.pipe": 2}, "tensor": {"recsys.tensor": 2}}
_MICRO_BATCHES = 8
_SMALL = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}


def arguments(parser) -> None:
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="of a repeat")


def measure(options) -> Iterator[dict]:
    """One row per mode, with or without the timeline, and repeat: seconds and CPU seconds of a step."""
    from ds_recsys.simulation import Cluster, load_spec

    repeats, steps = (1, 1) if options.quick else (options.repeats, options.steps)
    with (
        Cluster(load_spec({"hosts": [{"devices": 2}]}), loopback=True) as cluster,
        tempfile.TemporaryDirectory() as folder,
        Arms(cluster, Path(folder), _CONFIG, "timeline") as arms,
    ):
        for mode, grid in _GRIDS.items():
            arms.start(mode, "deepspeed", {**_SMALL, **grid, "recsys.threads_per_rank": 1})
        arms.ready([_MICRO_BATCHES])
        runs = {
            f"{mode}|{on}": lambda mode=mode, on=on: arms.measure(mode, _MICRO_BATCHES, steps=steps, timeline=bool(on))
            for mode in _GRIDS
            for on in (0, 1)
        }
        for row in interleaved(runs, repeats, progress="timeline"):
            mode, on = row.pop("arm").split("|")
            kept = {key: row[key] for key in ("repeat", "seconds", "cpu_seconds", "error") if key in row}
            yield {"mode": mode, "timeline": bool(int(on)), **kept}


def figures(rows: list[dict]) -> dict:
    """Ratio of the medians with and without, minus 1, of wall and CPU time."""
    found = {}
    for mode in _GRIDS:
        for name, key in (("wall", "seconds"), ("cpu", "cpu_seconds")):
            found[f"{mode}_overhead_{name}"] = _overhead(rows, mode, key)
    return found


def table(rows: list[dict]) -> str:
    header = ["mode", "step", "with the timeline", "cost", "spread", "CPU", "with the timeline", "cost"]
    lines = []
    for mode in _GRIDS:
        cells = groups(rows, "mode", "timeline")
        off, on = cells[mode, False], cells[mode, True]
        wall, cpu = ([median(row[key] for row in arm) for arm in (off, on)] for key in ("seconds", "cpu_seconds"))
        spreads = max(spread(row["seconds"] for row in arm) for arm in (off, on))
        costs = [f"{_overhead(rows, mode, key):+.2%}" for key in ("seconds", "cpu_seconds")]
        lines.append(
            [mode, *(f"{s:.4f} s" for s in wall), costs[0], f"{spreads:.0%}", *(f"{s:.4f} s" for s in cpu), costs[1]]
        )
    return markdown(header, lines)


def plot(rows: list[dict], path: Path) -> None:
    """Every repeat, off and on."""
    with plots.drawing(path, 1, len(_GRIDS)) as axes:
        for axis, mode in zip(axes[0], _GRIDS, strict=True):
            for (name, on), cell in groups(rows, "mode", "timeline").items():
                if name == mode:
                    axis.plot(
                        [row["repeat"] for row in cell],
                        [row["seconds"] for row in cell],
                        ".-",
                        label="on" if on else "off",
                    )
            axis.set(title=mode, xlabel="repeat", ylabel="seconds a step", ylim=(0, None))
            axis.legend(frameon=False)


def _overhead(rows: list[dict], mode: str, key: str) -> float:
    cells = groups(rows, "mode", "timeline")
    off, on = (median(row[key] for row in cells[mode, state]) for state in (False, True))
    return on / off - 1
