"""The plot of bench.py balance: a trial over its steps, and the steps of the cuts."""

from pathlib import Path

from benchmarks import plots
from benchmarks.balance_report import cells, seconds, trials

_NAMES = ("uniform", "parameters", "profile", "adaptive", "best")
_GROUPS = {  # part, when: title
    ("straggler", "after"): "one device\nat half speed",
    ("hardware", None): "half of the devices\nat half speed",
    ("head", None): "head of half\nof the compute",
    ("split head", None): "the same, split",
}


def plot(rows: list[dict], path: Path) -> None:
    """Stage and step times of the first trial, with the change and the moves; below, a panel of bars per number of stages."""
    pipes = sorted({row["pipe"] for row in rows}, reverse=True)
    trial = next((found[0] for pipe in pipes if (found := trials(rows, pipe))), None)
    with plots.drawing(path, 2, 2, width=4.6, height=2.7) as axes:
        if trial:
            _stages(axes[0, 0], trial)
            _steps(axes[0, 1], trial)
        for axis, pipe in zip(axes[1], pipes, strict=False):
            _bars(axis, rows, pipe)
        used = [bool(trial), bool(trial), len(pipes) > 0, len(pipes) > 1]
        for axis, drawn in zip(axes.flat, used, strict=True):
            axis.set_visible(drawn)


def _stages(axis, trial: dict) -> None:
    records = trial["records"]
    stages = range(len(records[0]["stage_seconds"]))
    palette, first = plots.colours(f"stage {stage}" for stage in stages), records[0]["step"]
    for stage in stages:
        name, times = f"stage {stage}", [1e3 * record["stage_seconds"][stage] for record in records]
        axis.plot([record["step"] - first for record in records], times, label=name, color=palette[name])
    axis.set(title=f"{len(stages)} stages, adaptive", xlabel="step", ylabel="ms of a micro-batch", ylim=(0, None))
    axis.legend(fontsize=7, ncols=2)
    _marks(axis, trial)


def _steps(axis, trial: dict) -> None:
    axis.plot(range(len(trial["seconds"])), trial["seconds"], color="black")
    axis.set(title="dotted: the change; dashed: a move", xlabel="step", ylabel="seconds of a step", ylim=(0, None))
    _marks(axis, trial)


def _marks(axis, trial: dict) -> None:
    axis.axvline(trial["change"] - 0.5, color="0.3", linestyle=":")
    for step in trial["moved"]:
        axis.axvline(step + 0.5, color="0.3", linestyle="--")


def _bars(axis, rows: list[dict], pipe: int) -> None:
    palette, labels, width = plots.colours(_NAMES), [], 0.16
    for place, (part, when) in enumerate(_GROUPS):
        found = cells(rows, part, pipe, when)
        if "reached" in found:
            found["adaptive"] = found["reached"]
        names = [name for name in _NAMES if name in found]
        for number, name in enumerate(names):
            x = place + (number - (len(names) - 1) / 2) * width
            axis.bar(x, seconds(found[name]), width, color=palette[name], label=name if name not in labels else None)
            labels.append(name)
    axis.set_xticks(range(len(_GROUPS)), _GROUPS.values(), fontsize=7)
    axis.set(title=f"{pipe} stages", ylabel="seconds of a step")
    if labels:
        axis.set_ylim(0, 1.3 * axis.get_ylim()[1])  # room for the legend
        axis.legend(fontsize=7, ncols=2, loc="upper right")
