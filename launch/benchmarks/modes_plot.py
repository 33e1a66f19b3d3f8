"""The plot of bench.py modes: validation loss over the time that the steps take on each link, and samples a second."""

from pathlib import Path

from benchmarks import plots
from benchmarks.modes_arms import ALONE, MODES, title
from benchmarks.modes_report import by_seed, curve, step_seconds, windows
from benchmarks.modes_speed import CELLS, EVEN, HALF, LINKS, STOP
from benchmarks.repeats import median


def plot(rows: list[dict], path: Path) -> None:
    """Dense arms are drawn solid, int8 dashed or pale; whole trainings without the cluster, seconds a step from it."""
    cells, trained = windows(rows), by_seed(rows)
    colour = plots.colours(MODES)
    links = LINKS if trained else ()
    with plots.drawing(path, 1, len(links) + 1, width=4.4, height=3.8) as axes:
        for axis, link in zip(axes[0], links, strict=False):
            for (mode, method), seeds in trained.items():
                one = step_seconds(rows, mode, method, link)
                if not one:
                    continue
                seconds, losses = curve(list(seeds.values()), one)
                style = {"color": colour[mode], "linestyle": "-" if method == "none" else "--", "linewidth": 1.2}
                axis.plot(seconds, losses, label=title(mode, method), **style)
            axis.set(title=f"dense communication / compute: {link}x", xlabel="seconds", ylabel="validation loss")
            if axis.lines:
                axis.legend(fontsize=7)
        _bars(axes[0][-1], cells, colour)


def _bars(axis, cells: dict, colour: dict) -> None:
    arms = list(dict.fromkeys((key[0], key[1]) for key in cells if key[0] != ALONE))
    width = 0.8 / max(len(arms), 1)
    for number, (mode, method) in enumerate(arms):
        heights = [median(row["samples_per_s"] for row in cells.get((mode, method, *cell), [])) if (mode, method, *cell)
                   in cells else 0 for cell in CELLS]  # fmt: skip
        places = [x + (number - (len(arms) - 1) / 2) * width for x in range(len(CELLS))]
        axis.bar(
            places,
            heights,
            width,
            color=colour[mode],
            alpha=1.0 if method == "none" else 0.5,
            label=title(mode, method),
        )
    alone = cells.get((ALONE, "none", 1, EVEN))
    if alone:
        speed = median(row["samples_per_s"] for row in alone)
        axis.axhline(speed, color="black", linewidth=0.8)
        place = axis.get_yaxis_transform()  # x as a share of the axis
        axis.text(0.01, speed, "replicas alone", transform=place, ha="left", va="bottom", fontsize=7)
    words = {EVEN: "", HALF: "\none at\nhalf speed", STOP: "\none\nstopped"}
    axis.set_xticks(range(len(CELLS)), [f"{link}x{words[situation]}" for link, situation in CELLS])
    axis.set_ylabel("samples/s, all replicas (pale: int8)")
    axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # room for the legend
    if arms:
        axis.legend(fontsize=6, ncols=2, loc="upper right")
