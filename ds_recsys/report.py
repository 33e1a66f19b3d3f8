"""What a run is judged by: one table against the baselines, metrics.json and a plot."""

import json
from collections.abc import Sequence
from pathlib import Path

from ds_recsys.baselines import item_knn, popularity
from ds_recsys.runlog import read_log

_COLUMNS = ("HR@{k}", "NDCG@{k}", "MRR", "coverage@{k}")


def baselines(trainer, names: Sequence[str] = ("popularity", "item_knn")) -> dict[str, dict[str, float]]:
    """Popularity and ItemKNN on the test items, in the protocol of the run. Local: no rank needs another."""
    evaluation = trainer.config.recsys.evaluation
    known = {"popularity": popularity, "item_knn": item_knn}
    return {
        name: known[name](
            trainer.interactions, trainer.split, "test", ks=evaluation.k, filter_seen=evaluation.filter_seen
        )
        for name in names
    }


def table(results: dict[str, dict], k: int) -> str:
    """Markdown, a row per model."""
    names = [name.format(k=k) for name in _COLUMNS]
    rows = [["", *names]]
    rows += [[model, *(f"{figures[name]:.4f}" for name in names)] for model, figures in results.items() if figures]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def write(run_dir: str | Path, results: dict[str, dict], protocol: str, seconds: dict[str, float]) -> None:
    """metrics.json: {"popularity": {...}, "item_knn": {...}, "untrained": {...}, "trained": {...}, "seconds": {...}}."""
    content = {**results, "protocol": protocol, "seconds": {name: round(value, 1) for name, value in seconds.items()}}
    Path(run_dir, "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


def plot(run_dir: str | Path, k: int) -> Path:
    """Training loss and validation NDCG@k over the steps, from log.jsonl -> run_dir/training.png."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(Path(run_dir, "log.jsonl"))
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    valid = [(record["step"], record["valid"][f"NDCG@{k}"]) for record in records if "valid" in record]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps, values = zip(*losses, strict=True)
    window = max(1, len(values) // 40)  # batches hold windows of one length each, so their losses differ a lot
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    left.plot(steps, values, linewidth=0.5, alpha=0.25, color="C0", label="one batch")
    left.plot(steps[window - 1 :], smooth, color="C0", label=f"mean of {window} batches")
    left.set(xlabel="optimizer step", ylabel="training loss (nats per item)", title="Loss")
    left.legend(frameon=False)
    if valid:
        right.plot(*zip(*valid, strict=True), marker="o", markersize=3)
        right.set_ylim(0, 1.1 * max(value for _, value in valid))
    right.set(xlabel="optimizer step", ylabel=f"NDCG@{k}, full ranking", title="Validation")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(run_dir, "training.png")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
