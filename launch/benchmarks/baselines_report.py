"""What the rows of baselines.py show: shares of the ideal, where the time goes, spread and calibration."""

from pathlib import Path

from benchmarks import plots
from benchmarks.harness import markdown
from benchmarks.repeats import groups, median, spread

IDEAL, HYBRID = "ideal", "hybrid, DeepSpeed"
_PLACE = ("topology", "items")
_TOPOLOGIES = {"2x2": "2 hosts x 2 devices", "4x1": "4 hosts x 1 device"}
_SPLIT = ("compute", "pipeline", "gradients", "tensor", "optimizer", "other")


def figures(rows: list[dict]) -> dict:
    """Shares of the ideal at the better number of micro-batches; the widest spread; the worst calibration reading."""
    shares = _shares(rows)
    single, hybrid = {}, {}
    for (*place, ratio), modes in _by_place(shares).items():
        name = f"{place[0]}, {place[1]:,} items, {ratio:g}x"
        alone = [share for mode, share in modes.items() if mode != HYBRID]
        if alone:
            single[name] = max(alone)
        if HYBRID in modes:
            hybrid[name] = modes[HYBRID]
    spreads = [spread(row["seconds"] for row in cell) for cell in _cells(rows).values()]
    off = [abs(row["measured"] / row["expected"] - 1) for row in rows if row["kind"] == "calibration"]
    return {
        "best_single_share_of_ideal": single,
        "deepspeed_hybrid_share_of_ideal": hybrid,
        "spread_median": median(spreads),
        "spread_max": max(spreads),
        "calibration_worst": max(off, default=None),
    }


def table(rows: list[dict]) -> str:
    """Step seconds and shares of the ideal; below, where the time goes when communication takes as long as compute."""
    return f"{_steps(rows)}\n\n{_where(rows)}"


def plot(rows: list[dict], path: Path) -> None:
    """A panel per cluster and catalogue: every mode's share of the ideal over the links."""
    shares = _shares(rows)
    places = list(dict.fromkeys(key[:2] for key in shares))
    ratios = sorted({key[2] for key in shares})
    modes = list(dict.fromkeys(key[3] for key in shares))
    colour, width = plots.colours(modes), 0.8 / len(modes)
    with plots.drawing(path, 1, len(places), width=3.4, height=3.2, sharey=True) as axes:
        for axis, place in zip(axes[0], places, strict=True):
            for i, mode in enumerate(modes):
                found = [(x, max(shares[(*place, ratio, mode)].values())) for x, ratio in enumerate(ratios)
                         if (*place, ratio, mode) in shares]  # fmt: skip
                axis.bar(
                    [x + (i - (len(modes) - 1) / 2) * width for x, _ in found],
                    [share for _, share in found],
                    width,
                    color=colour[mode],
                    label=mode,
                )
            axis.set_title(f"{_TOPOLOGIES[place[0]]}, {place[1]:,} items")
        label_shares(axes[0], ratios)


def label_shares(axes, ratios: list[float]) -> None:
    """What panels of shares of the ideal have in common: the ideal, the links below, one legend."""
    for axis in axes:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xlim(-0.6, len(ratios) - 0.4)
        axis.set_xticks(range(len(ratios)), [f"{ratio:g}x" for ratio in ratios])
        axis.set_xlabel("gradient communication / compute")
    axes[0].set_ylabel("share of the ideal speed")
    axes[0].set_ylim(0, 1.05)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)


def _steps(rows: list[dict]) -> str:
    shares, seconds, ideals = _shares(rows), _seconds(rows), _ideals(rows)
    ratios = sorted({key[2] for key in shares})
    counts = sorted({m for cell in shares.values() for m in cell})
    header = ["cluster", "items", "mode", *(f"{ratio:g}x, M {m}" for ratio in ratios for m in counts)]
    lines = []
    for topology, items in dict.fromkeys(key[:2] for key in shares):
        start = [_TOPOLOGIES[topology], f"{items:,}"]
        ideal = [f"{ideals[topology, items, m]:.2f}" for m in counts]
        lines.append([*start, "ideal", *ideal * len(ratios)])
        for mode in dict.fromkeys(key[3] for key in shares if key[:2] == (topology, items)):
            cells = []
            for ratio in ratios:
                for m in counts:
                    share = shares.get((topology, items, ratio, mode), {}).get(m)
                    cells.append(
                        "" if share is None else f"{seconds[topology, items, ratio, mode, m]:.2f} ({share:.0%})"
                    )
            lines.append([*start, mode, *cells])
    return f"Seconds a step (share of the ideal); M micro-batches.\n\n{markdown(header, lines)}"


def _where(rows: list[dict]) -> str:
    """The split of each mode at the link nearest to 1x, with its better number of micro-batches."""
    shares = _shares(rows)
    nearest = min({key[2] for key in shares}, key=lambda ratio: abs(ratio - 1))
    header = ["cluster", "items", "mode", "M", *_SPLIT, "busy", "MB sent per host"]
    lines = []
    for (topology, items, ratio, mode), cell in shares.items():
        if ratio != nearest:
            continue
        m = max(cell, key=cell.get)
        found = _cells(rows)[topology, items, ratio, mode, m]
        split = ["" for _ in _SPLIT]
        busy = ""
        if "split" in found[0]:
            split = [f"{median(row['split'][part] for row in found):.2f}" for part in _SPLIT]
            busy = f"{median(row['busy'] for row in found):.0%}"
        sent = median(max(row["sent_bytes"].values()) for row in found) / 1e6
        lines.append([_TOPOLOGIES[topology], f"{items:,}", mode, m, *split, busy, f"{sent:.0f}"])
    title = f"Where a step's seconds go at {nearest:g}x (mean over devices); busy is compute over the whole step."
    return f"{title}\n\n{markdown(header, lines)}"


def _cells(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(topology, items, ratio, mode, micro-batches) -> repeats."""
    steps = [row for row in rows if row["kind"] == "step" and row.get("mode") != IDEAL]
    return groups(steps, *_PLACE, "ratio", "mode", "micro_batches")


def _ideals(rows: list[dict]) -> dict[tuple, float]:
    """(topology, items, micro-batches) -> seconds of the ideal step."""
    steps = [row for row in rows if row["kind"] == "step" and row.get("mode") == IDEAL]
    return {
        key: median(row["ideal_seconds"] for row in cell)
        for key, cell in groups(steps, *_PLACE, "micro_batches").items()
    }


def _seconds(rows: list[dict]) -> dict[tuple, float]:
    return {key: median(row["seconds"] for row in cell) for key, cell in _cells(rows).items()}


def _shares(rows: list[dict]) -> dict[tuple, dict[int, float]]:
    """(topology, items, ratio, mode) -> {micro-batches: share of the ideal speed at that number of micro-batches}."""
    ideals, shares = _ideals(rows), {}
    for (topology, items, ratio, mode, m), seconds in _seconds(rows).items():
        shares.setdefault((topology, items, ratio, mode), {})[m] = ideals[topology, items, m] / seconds
    return shares


def _by_place(shares: dict) -> dict[tuple, dict[str, float]]:
    """(topology, items, ratio) -> {mode: its best share}."""
    found = {}
    for (topology, items, ratio, mode), cell in shares.items():
        found.setdefault((topology, items, ratio), {})[mode] = max(cell.values())
    return found
