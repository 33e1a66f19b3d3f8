"""What the rows of hybrid.py show: ours against single modes, DeepSpeed's hybrid and the ideal; what each part gives."""

import statistics
import textwrap
from pathlib import Path

from benchmarks import plots
from benchmarks.baselines_report import HYBRID, IDEAL, label_shares
from benchmarks.harness import markdown
from benchmarks.modes_arms import AHEAD, title
from benchmarks.modes_report import by_seed, curve, value_at
from benchmarks.repeats import groups, median, spread

OURS, ALONE = "ours", "alone"
_ROOM = 0.65  # of the ideal: a best single mode below leaves room
_HEAVY, _SLOW = 100_000, 4.0  # items of the heavy catalogue; the 4x preset
_WIDTH = 34  # characters of a title in the plot
_NAMES = {
    "2x2": "2 hosts x 2 devices",
    "4x1": "4 hosts x 1 device",
    "uneven": "4 hosts, one at half speed, one link at a quarter",
}
Cell = tuple[str, int, float]  # topology, items, ratio


def figures(rows: list[dict]) -> dict:
    """The claims; None where no row is there for one. Every mode counts at its better number of micro-batches."""
    cells = {cell: one for cell in _cells(rows) if (one := _Compared(rows, cell)).whole}
    ratios = {cell: one.single / one.ours for cell, one in cells.items()}
    room = [ratios[cell] for cell, one in cells.items() if one.ideal / one.single < _ROOM]
    vanilla = [one.vanilla / one.ours for cell, one in cells.items() if cell[2] > 0.9 * _SLOW and one.vanilla]
    busy = [one.busy / one.single_busy for one in cells.values() if one.single_busy]
    return {
        "min_share_of_ideal": min((one.ideal / one.ours for one in cells.values()), default=None),
        "min_ratio_to_best_single": min(ratios.values(), default=None),
        "gap_closed_min": min((one.gap_closed for one in cells.values()), default=None),
        "ratio_to_best_single_where_room": min(room, default=None),
        "heavy_ratio_to_best_single": min((r for cell, r in ratios.items() if cell[1] >= _HEAVY), default=None),
        "ratio_to_vanilla_4x": min(vanilla, default=None),
        "busy_ratio_to_best_single": min(busy, default=None),
        "ndcg_off_in_seed_noise": _ndcg_off(rows),
        "spread_max": max((spread(row["seconds"] for row in same) for same in _steps(rows).values()), default=None),
    }


def _ndcg_off(rows: list[dict]) -> float | None:
    """Of the chosen ways, the largest fall of the mean NDCG@10 below dense sums in every step, in its standard deviations."""
    trained = by_seed(rows)
    dense = [row["ndcg"] for row in trained.pop(("sync", "none"), {}).values()]
    if len(dense) < 2 or not trained:
        return None
    means = [statistics.mean(row["ndcg"] for row in seeds.values()) for seeds in trained.values()]
    return max(statistics.mean(dense) - mean for mean in means) / statistics.stdev(dense)


class _Compared:
    """One cluster, catalogue and link: seconds of a step of each, None where it was not measured."""

    def __init__(self, rows: list[dict], cell: Cell):
        seconds, busy, ideals = {}, {}, []
        for (*place, mode, _), same in _steps(rows).items():
            if tuple(place) != cell:
                continue
            if mode == IDEAL:
                ideals.append(median(row["ideal_seconds"] for row in same))
                continue
            took = median(row["seconds"] for row in same)
            if took < seconds.get(mode, float("inf")):
                seconds[mode] = took
                busy[mode] = median(row["busy"] for row in same) if "busy" in same[0] else None
        self.seconds = seconds
        singles = {mode: took for mode, took in seconds.items() if mode != HYBRID and mode != OURS}
        self.best = min(singles, key=singles.get, default=None)
        self.ideal, self.single = min(ideals, default=None), singles.get(self.best)
        self.ours, self.vanilla = seconds.get(OURS), seconds.get(HYBRID)
        self.busy, self.single_busy = busy.get(OURS), busy.get(self.best)
        self.all_busy = busy

    @property
    def whole(self) -> bool:
        return None not in (self.ideal, self.single, self.ours)

    @property
    def gap_closed(self) -> float:
        """Of the distance from the best single mode to the ideal, in samples a second; 1 where there is none."""
        single, ours = self.ideal / self.single, self.ideal / self.ours
        return (ours - single) / (1 - single) if single < 1 else 1.0


def table(rows: list[dict]) -> str:
    """Ours beside what it is compared with; what was chosen; what each capability gives."""
    header = ["cluster", "items", "links", "ideal", "best single mode", "hybrid, DeepSpeed", "ours", "of the ideal",
              "to the best single", "to DeepSpeed's hybrid", "gap closed", "busy, ours / best single"]  # fmt: skip
    lines, chosen, parts = [], [], []
    for cell in _cells(rows):
        one = _Compared(rows, cell)
        place = [_NAMES[cell[0]], f"{cell[1]:,}", f"{cell[2]:g}x"]
        if one.whole:
            busy = f"{one.busy:.0%} / " + (f"{one.single_busy:.0%}" if one.single_busy else "?") if one.busy else ""
            lines.append([
                *place, f"{one.ideal:.2f}", f"{one.best} {one.single:.2f}", f"{one.vanilla:.2f}" if one.vanilla else "",
                f"**{one.ours:.2f}**", f"{one.ideal / one.ours:.0%}", f"{one.single / one.ours:.2f}",
                f"{one.vanilla / one.ours:.2f}" if one.vanilla else "", f"{one.gap_closed:.0%}", busy,
            ])  # fmt: skip
        plan = _plan(rows, cell)
        if plan:
            chosen.append([*place, _said(plan["values"])])
        parts += [[*place, name, f"{took:.2f}", f"{ratio:.2f}"] for name, took, ratio in _without(rows, cell)]
    texts = [
        f"Seconds a step, medians; links: dense gradient communication over compute.\n\n{markdown(header, lines)}",
        f"What the rule chose.\n\n{markdown(['cluster', 'items', 'links', 'grid, micro-batches, gradients'], chosen)}",
    ]
    if parts:
        header = ["cluster", "items", "links", "without", "seconds a step", "to ours"]
        texts.append(f"Each capability switched off, all else as chosen.\n\n{markdown(header, parts)}")
    if any(row["kind"] == "scaling" for row in rows):
        texts.append(_scaling(rows))
    trained = by_seed(rows)
    if trained:
        lines = [
            [title(*way), *(_mean_and_noise(seeds, name) for name in ("loss", "ndcg"))]
            for way, seeds in trained.items()
        ]
        texts.append(
            "Whole trainings on equally many samples: validation loss and NDCG@10, mean ± standard deviation over seeds.\n\n"
            + markdown(["gradients", "validation loss", "NDCG@10"], lines)
        )
        texts += filter(None, [_at_equal_time(rows, trained)])
    return "\n\n".join(texts)


def _at_equal_time(rows: list[dict], trained: dict[tuple, dict]) -> str:
    """Validations when ours ends its training: the best single mode, whose sums are dense, has made fewer steps by then.

    The trainings' steps are taken to last as long, to each other, as those of the clusters.
    """
    lines, dense = [], trained.get(("sync", "none"))
    for cell in _cells(rows):
        one = _Compared(rows, cell)
        plan = _plan(rows, cell)
        ours = trained.get(way_of(plan["values"])) if plan else None
        if not (one.whole and dense and ours) or cell[1] >= _HEAVY:  # the trainings are over the smaller catalogue
            continue
        curves = [
            curve(list(seeds.values()), seconds, "valid_ndcg")
            for seeds, seconds in ((dense, one.single), (ours, one.ours))
        ]
        end = curves[-1][0][-1]
        lines.append(
            [_NAMES[cell[0]], f"{cell[2]:g}x", f"{one.best} {min(1.0, one.ours / one.single):.0%}"]
            + [value_at(found, end) for found in curves]
        )
    header = ["cluster", "links", "best single mode, of its steps", "its NDCG@10", "ours"]
    text = "In equal time: validation NDCG@10, mean over seeds, when ours has made all steps of these trainings."
    return f"{text}\n\n{markdown(header, lines)}" if lines else ""


def _plan(rows: list[dict], cell: Cell) -> dict | None:
    return next((row for row in rows if row["kind"] == "plan" and _cell(row) == cell), None)


def way_of(values: dict) -> tuple[str, str]:
    """(mode, method) of a plan, as bench.py modes names them."""
    mode = AHEAD if values.get("recsys.data_parallel.look_ahead") else values["recsys.data_parallel.mode"]
    return mode, values["recsys.compression.method"]


def _without(rows: list[dict], cell: Cell) -> list[tuple[str, float, float]]:
    """(what was switched off, seconds a step, to the whole plan's in the same rounds)."""
    found = [row for row in rows if row["kind"] == "ablation" and _cell(row) == cell and "seconds" in row]
    seconds = {key: median(row["seconds"] for row in same) for key, same in groups(found, "group", "mode").items()}
    return [
        (mode, took, took / seconds[group, OURS])
        for (group, mode), took in seconds.items()
        if mode != OURS and (group, OURS) in seconds  # the whole plan may have failed
    ]


def _scaling(rows: list[dict]) -> str:
    """Samples a second of each mode, and what is left of as many devices alone."""
    measured = [row for row in rows if row["kind"] == "scaling" and "seconds" in row]
    steps = groups(measured, "growth", "devices", "mode", "batch", "micro_batches")
    speeds, alone = {}, {}
    for (growth, devices, mode, batch, _), same in steps.items():
        speed = batch / median(row["seconds"] for row in same)
        found, key = (alone, (growth, devices)) if mode == ALONE else (speeds, (growth, devices, mode))
        found[key] = max(speed, found.get(key, 0.0))
    modes = list(dict.fromkeys(mode for _, _, mode in speeds))
    lines = [
        [growth, devices, f"{one:.1f}"]
        + [
            f"{speed:.1f} ({speed / devices / one:.0%})" if (speed := speeds.get((growth, devices, mode))) else ""
            for mode in modes
        ]
        for (growth, devices), one in sorted(alone.items())
    ]
    text = "Windows a second (share of as many devices alone); strong: 64 windows a step on all, weak: 16 on each."
    return f"{text}\n\n{markdown(['growth', 'devices', 'one alone', *modes], lines)}"


def _mean_and_noise(seeds: dict[int, dict], name: str) -> str:
    values = [row[name] for row in seeds.values()]
    noise = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{noise}"


def plot(rows: list[dict], path: Path) -> None:
    """A panel per cluster and catalogue: shares of the ideal, over the links; no file where no cluster was measured."""
    cells = _cells(rows)
    if not cells:
        return
    places = list(dict.fromkeys(cell[:2] for cell in cells))
    ratios = sorted({cell[2] for cell in cells})
    bars = ("best single mode", HYBRID, OURS)
    colour = plots.colours(bars)
    with plots.drawing(path, 1, len(places), width=3.4, height=3.2, sharey=True) as axes:
        for axis, place in zip(axes[0], places, strict=True):
            for i, bar in enumerate(bars):
                shares = []
                for ratio in ratios:
                    one = _Compared(rows, (*place, ratio))
                    took = {bars[0]: one.single, bars[1]: one.vanilla, bars[2]: one.ours}[bar]
                    shares.append(one.ideal / took if took and one.ideal else float("nan"))
                at = [x + 0.27 * (i - 1) for x in range(len(ratios))]
                axis.bar(at, shares, 0.25, color=colour[bar], label=bar)
            axis.set_title(textwrap.fill(f"{_NAMES[place[0]]}, {place[1]:,} items", _WIDTH))
        label_shares(axes[0], ratios)


def _said(values: dict) -> str:
    pipe, data, tensor = (values[f"recsys.{axis}"] for axis in ("pipe", "data", "tensor"))
    method, mode = values["recsys.compression.method"], values["recsys.data_parallel.mode"]
    mode += " looking ahead" if values.get("recsys.data_parallel.look_ahead") else ""
    count, size = values["gradient_accumulation_steps"], values["train_micro_batch_size_per_gpu"]
    size = "/".join(map(str, values.get("recsys.data_shares") or [size]))
    words = f"pipe {pipe} x data {data} x tensor {tensor}, {count} of {size}"
    owners = "/".join(f"{share:.2g}" for share in values.get("recsys.compression.owner_shares") or ())
    summed = f", summed in parts of {owners}" if owners else ""
    return words + (f", {'fp32' if method == 'none' else method}, {mode}{summed}" if data > 1 else "")


def _cell(row: dict) -> Cell:
    return row["topology"], row["items"], row["ratio"]


def _cells(rows: list[dict]) -> list[Cell]:
    """By cluster, catalogue and link, in whatever order they were measured."""
    found = {_cell(row) for row in rows if row["kind"] == "step"}
    return sorted(found, key=lambda cell: (list(_NAMES).index(cell[0]), *cell[1:]))


def _steps(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(topology, items, ratio, mode, micro-batches) -> repeats."""
    steps = [row for row in rows if row["kind"] == "step"]
    return groups(steps, "topology", "items", "ratio", "mode", "micro_batches")
