"""What the rows of compression_training.py show: speed, final loss and ranking figures of each method against dense."""

import statistics
from pathlib import Path

from benchmarks import plots
from benchmarks.compression_methods import DENSE, title
from benchmarks.harness import markdown
from benchmarks.repeats import groups, median

_SOURCES = """Losses: whole trainings without the cluster, mean over the seeds.
Time and bytes of a step: the same model on the cluster."""


def figures(rows: list[dict]) -> dict:
    """By method: ratios to the dense run of the same seed, the mean over seeds; NDCG@10; ratio of samples per second.

    loss is that of the validation; train_loss the mean over the last thirtieth of the training.
    """
    found = {}
    trained, speed = _by_seed(rows), speed_ratios(rows)
    for method, seeds in trained.items():
        found[f"ndcg_{method}"] = statistics.mean(row["ndcg"] for row in seeds.values())
        for name, key in (("loss_ratio", "valid_loss"), ("train_loss_ratio", "train_loss")):
            paired = _paired(trained, method, key)
            if paired and method != DENSE:
                found[f"{name}_{method}"] = statistics.mean(paired)
    if DENSE in trained:
        found["ndcg_seed_noise"] = _deviation([row["ndcg"] for row in trained[DENSE].values()])
    found |= {f"samples_per_s_ratio_{method}": value for method, value in speed.items() if method != DENSE}
    return found


def table(rows: list[dict]) -> str:
    """A line per method."""
    trained, speed, cells = _by_seed(rows), speed_ratios(rows), _steps(rows)
    methods = list(dict.fromkeys([*cells, *trained]))
    if not methods:
        return ""
    lines = []
    for method in methods:
        line = [title(method)]
        line += [f"{_samples(cells[method]):.0f}", f"{speed.get(method, 1):.2f}"] if method in cells else ["", ""]
        line.append(f"{_bytes(cells[method]) / 1e6:.3f}" if method in cells else "")
        if method in trained:
            seeds = trained[method].values()
            losses = [row["valid_loss"] for row in seeds]
            line += [_mean(losses), _percent(_paired(trained, method, "valid_loss"))]
            line += [_percent(_paired(trained, method, "train_loss")), _mean([row["ndcg"] for row in seeds])]
        lines.append(line + [""] * (8 - len(line)))
    header = [
        "",
        "samples/s",
        "x dense",
        "MB sent per step",
        "validation loss",
        "to dense",
        "training loss to dense",
        "NDCG@10",
    ]
    return f"{_caption(rows)}\n\n{markdown(header, lines)}" + _failures(rows)


def plot(rows: list[dict], path: Path) -> None:
    """Training loss over the time and over the bytes that the steps take on the cluster."""
    trained, cells = _by_seed(rows), _steps(rows)
    methods = [method for method in trained if method in cells]
    palette = plots.colours(methods)
    with plots.drawing(path, 1, 2, width=4.6, height=3.8, sharey=True) as axes:
        for number, method in enumerate(methods):
            steps, losses = curve(list(trained[method].values()))
            style = {"color": palette[method], "linestyle": "-" if number < 7 else "--", "linewidth": 1.2}
            seconds, sent = median(row["seconds"] for row in cells[method]), _bytes(cells[method])
            axes[0][0].plot([step * seconds for step in steps], losses, label=title(method), **style)
            axes[0][1].plot([step * sent / 1e6 for step in steps], losses, **style)
        axes[0][0].set(xlabel="seconds", ylabel="training loss (nats per item)")
        axes[0][1].set(xlabel="MB sent by a host", xscale="log")
        axes[0][0].legend(fontsize=7)
        axes[0][0].figure.supxlabel(_SOURCES, fontsize=7)


def curve(seeds: list[dict], smooth: int = 10) -> tuple[list[float], list[float]]:
    """(steps, losses) of trainings with equally many steps: the mean over the seeds, then over `smooth` bins in a row.

    Batches hold windows of one length each, so their losses differ much.
    """
    size = seeds[0]["loss_bin"]
    means = [statistics.mean(values) for values in zip(*(row["losses"] for row in seeds), strict=True)]
    smooth = min(smooth, len(means))
    windows = range(len(means) - smooth + 1)
    steps = [min((i + smooth) * size, seeds[0]["steps"]) for i in windows]
    return steps, [statistics.mean(means[i : i + smooth]) for i in windows]


def speed_ratios(rows: list[dict]) -> dict[str, float]:
    """method -> samples per second over the dense one's of the same round, the median."""
    steps = [row for row in rows if row["kind"] == "step" and "error" not in row]
    dense = {(row["group"], row["repeat"]): row["seconds"] for row in steps if row["method"] == DENSE}
    found = {}
    for method, cell in _steps(rows).items():
        pairs = [(dense.get((row["group"], row["repeat"])), row["seconds"]) for row in cell]
        values = [other / seconds for other, seconds in pairs if other]
        if values:
            found[method] = median(values)
    return found


def _steps(rows: list[dict]) -> dict[str, list[dict]]:
    cells = groups([row for row in rows if row["kind"] == "step"], "method")
    return {key[0]: cell for key, cell in cells.items()}


def _by_seed(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """method -> seed -> the row of its training."""
    found = {}
    for row in rows:
        if row["kind"] == "quality" and "error" not in row:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def _paired(trained: dict, method: str, key: str) -> list[float]:
    """Ratios to the dense training of the same seed."""
    dense = trained.get(DENSE, {})
    return [row[key] / dense[seed][key] for seed, row in trained[method].items() if seed in dense]


def _samples(cell: list[dict]) -> float:
    return median(row["samples_per_s"] for row in cell)


def _bytes(cell: list[dict]) -> float:
    return median(row["bytes"] for row in cell)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean(values: list[float]) -> str:
    noise = f" ± {_deviation(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{noise}"


def _percent(ratios: list[float]) -> str:
    return f"{statistics.mean(ratios) - 1:+.2%}" if ratios else ""


def _caption(rows: list[dict]) -> str:
    parts = []
    for row in (row for row in rows if row["kind"] == "workload"):
        parts.append(
            f"{row['parameters']:,} parameters on {row['hosts']} hosts x 1 rank, "
            f"compute {1e3 * row['compute_seconds']:.0f} ms a step, links of {row['rate'] / 1e6:.0f} Mbit/s, "
            "where the dense gradients take as long on the wire."
        )
    trained = [row for row in rows if row["kind"] == "quality" and "error" not in row]
    if trained:
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in trained}))
        parts.append(
            f"Loss and NDCG@10: whole trainings of {trained[0]['steps']:,} steps on {trained[0]['ranks']} replicas without "
            f"the cluster, seeds {seeds}: mean ± standard deviation, and the mean ratio to dense with the same seed."
        )
    return " ".join(parts)


def _failures(rows: list[dict]) -> str:
    failed = [row for row in rows if "error" in row and row["kind"] in ("step", "quality")]
    return "".join(f"\n- failed: {title(row['method'])}, {row['error']}" for row in failed)
