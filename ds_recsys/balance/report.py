"""What an `AdaptivePartition` saw and did: a text, a file, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from statistics import median

from ds_recsys.balance.adaptive import AdaptivePartition, Move, Record


def idle_share(records: Sequence[Record], micro_batches: int) -> float:
    """Of the stages' time in these steps, the part in which they computed no micro-batch; between 0 and 1."""
    stages = len(records[0].stage_seconds)
    busy = median(micro_batches * sum(record.stage_seconds) / record.step_seconds for record in records)
    return max(0.0, 1 - busy / stages)


def describe(balance: AdaptivePartition) -> str:
    """A line for each cut that was in force: steps, seconds, stage times, idle share."""
    micro_batches, lines = balance.engine.micro_batches, []
    for bounds, group in groupby(balance.records, key=lambda record: record.bounds):
        records = list(group)
        stages = [1e3 * median(column) for column in zip(*(r.stage_seconds for r in records), strict=True)]
        seconds, idle = median(record.step_seconds for record in records), idle_share(records, micro_batches)
        lines.append(
            f"steps {records[0].step}-{records[-1].step}, bounds {list(bounds)}: {seconds:.3f} s a step, stages "
            f"{' '.join(f'{one:.1f}' for one in stages)} ms a micro-batch, waiting {idle:.0%} of their time"
        )
    return "\n".join(["Partition", *lines])


def write(balance: AdaptivePartition, path: str | Path) -> None:
    """Records and moves as JSON: {"records": [...], "moves": [...]}, fields as in `Record` and `Move`."""
    content = {name: [asdict(one) for one in getattr(balance, name)] for name in ("records", "moves")}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def plot(records: Sequence[Record], moves: Sequence[Move], path: str | Path) -> Path:
    """Seconds of a micro-batch on each stage, and of the step, over the steps; a line where layers moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    steps = [record.step for record in records]
    for stage, seconds in enumerate(zip(*(record.stage_seconds for record in records), strict=True)):
        above.plot(steps, [1e3 * one for one in seconds], linewidth=1, label=f"stage {stage}")
    below.plot(steps, [record.step_seconds for record in records], linewidth=1, color="0.2")
    for move in moves:
        decision, back = move.decision, move.decision.back
        since = (record.step for record in records if record.step > decision.step and record.bounds == decision.bounds)
        place = next(since, decision.step + 1) - 0.5
        for axes in (above, below):
            axes.axvline(place, color="C3" if back else "0.5", linestyle="--", linewidth=1)
        above.annotate(
            "taken back" if back else f"{list(decision.bounds)}",
            (place, 1.02),
            xycoords=("data", "axes fraction"),
            fontsize=7,
        )
    above.set(ylabel="ms of a micro-batch", ylim=(0, None))
    above.legend(frameon=False, fontsize=8, ncols=4)
    below.set(xlabel="optimizer step", ylabel="seconds of a step", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return Path(path)
