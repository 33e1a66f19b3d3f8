"""`bench.py hybrid`: what `"parallel": "auto"` makes of a cluster, against single modes, plain DeepSpeed's hybrid, the ideal.

The workload, the clusters, the links and the arms of `bench.py baselines`, measured in turns with the plugin's own choice. That
is made once for each link rate, by the rule of `ds_recsys.planner` and not by hand. Each capability that it uses is switched
off in turn, all else as chosen: its share of the gain. Then the same on 1 to 8 devices. Last, whole trainings with each way of
summing gradients that was chosen, against dense sums in every step, on equally many samples. --part and --resume put it
together in pieces.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import baselines, modes_quality
from benchmarks.arms import Arms
from benchmarks.baselines import DDP, TOPOLOGIES, UNEVEN, Turn, ideal_seconds_of
from benchmarks.baselines_report import IDEAL
from benchmarks.harness import ROOT, load
from benchmarks.hybrid_ablation import WARMUP, ablation, micro_batches
from benchmarks.hybrid_report import OURS, figures, plot, table, way_of
from benchmarks.hybrid_scaling import DEVICES, scaling
from benchmarks.repeats import interleaved

__all__ = ["HELP", "arguments", "figures", "measure", "plot", "table"]

HELP = 'the grid and methods that "parallel": "auto" chooses, against single modes and the ideal; each capability switched off'
PARTS = ("clusters", "ablation", "scaling", "quality")
_STEPS = 3  # of a measurement of ours: what a late sum leaves to the next step is paid for in it


def arguments(parser) -> None:
    baselines.arguments(parser, [*TOPOLOGIES, UNEVEN])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these (all)")
    parser.add_argument("--resume", metavar="F", help="take over what F holds in whole (may be --json's file)")
    parser.add_argument("--devices", type=int, nargs="*", choices=DEVICES, default=list(DEVICES), help="of the scaling")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the whole trainings")
    parser.add_argument("--epochs", type=int, default=10, help="of the whole trainings (10)")
    parser.add_argument("--run_dir", default="runs/hybrid")


def measure(options) -> Iterator[dict]:
    """Rows of kind "calibration", "workload" and "step" as in baselines, "plan" (what was chosen, the reason), "whole" (a
    cluster, catalogue and preset ended), "ablation", "scaling" and "quality"."""
    # before the first row, for it may be the file that the rows go to
    kept = load(Path(options.resume), "hybrid")["rows"] if options.resume and Path(options.resume).exists() else []
    options.kept = _whole_cells(kept)
    if options.quick:
        options.speed = 1.0
    plans = []
    for row in _clusters(options):
        if row["kind"] == "plan":
            plans.append(row)
        yield row
    if options.quick:
        return
    if "ablation" in options.part:
        yield from ablation(options, plans, kept)
    else:
        yield from (row for row in kept if row["kind"] == "ablation")
    if "scaling" in options.part:
        yield from scaling(options, kept)
    else:
        yield from (row for row in kept if row["kind"] == "scaling")
    if "quality" in options.part:
        chosen = [row["values"] for row in plans if row["values"]["recsys.data"] > 1]
        ways = {way_of(values): None for values in chosen}
        yield from _trainings(list(ways), options, kept)
    else:
        yield from (row for row in kept if row["kind"] == "quality")


def _clusters(options) -> Iterator[dict]:
    """Cells that were kept, then those that are missing."""
    asked = {(topology, items) for topology in options.topologies for items in options.items}
    measured = "clusters" in options.part
    for (topology, items, preset), rows in options.kept.items():
        if not measured or (topology, items) not in asked or preset not in options.presets:
            yield from rows
    if measured:
        yield from baselines.on_clusters(options, _workload)


def _whole_cells(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(topology, items, preset) -> rows, of those that ended."""
    ended = [(row["topology"], row["items"], row["preset"]) for row in rows if row["kind"] == "whole"]
    found: dict[tuple, list[dict]] = {cell: [] for cell in ended}
    for row in rows:
        cell = (row.get("topology"), row.get("items"), row.get("preset"))
        if cell in found and row["kind"] != "ablation":  # which is a part of its own
            found[cell].append(row)
    return found


def _trainings(ways: list[tuple[str, str]], options, kept: list[dict]) -> Iterator[dict]:
    """The quick start's model on four replicas, seed by seed; links change no result."""
    config, every = ROOT / "ds_configs/quickstart.json", 1
    for seed in options.seeds:
        for mode, method in dict.fromkeys([("sync", "none"), *ways]):
            row = {
                "kind": "quality",
                "mode": mode,
                "method": method,
                "seed": seed,
                "ranks": 4,
                "epochs": options.epochs,
            }
            found = [one for one in kept if row.items() <= one.items() and "error" not in one]
            yield (
                found[0] if found else modes_quality.train(config, {**row, "every": every}, None, Path(options.run_dir))
            )


def _workload(cluster, arms: Arms, items: int, options) -> Iterator[dict]:
    """All modes and ours over one catalogue on one cluster, link rate by link rate."""
    from ds_recsys.simulation.presets import PRESETS

    topology = arms.label.split()[0]
    for preset in options.presets:
        yield from options.kept.get((topology, items, preset), ())
    presets = [preset for preset in options.presets if (topology, items, preset) not in options.kept]
    if not presets:
        return
    counts = baselines.start(cluster, arms, items, options)
    first = arms.measure(DDP, counts[0], alone=True)
    ideal = ideal_seconds_of(first)
    rates = {name: PRESETS[name].rate(4 * first["parameters"], ideal, cluster.spec.world_size) for name in presets}
    yield {"kind": "workload", "parameters": first["parameters"], "ideal_seconds": ideal, "rates": rates}
    uneven = topology == UNEVEN
    for preset in presets:
        ratio = round(PRESETS[preset].ratio, 2)
        yield from baselines.calibrated(cluster, preset, rates[preset], uneven)
        plan = _start_ours(cluster, arms, items, options)
        yield {"kind": "plan", "preset": preset, "ratio": ratio, "rate": rates[preset], **plan}
        ours = plan["micro_batches"]
        turns = {f"{IDEAL}|{m}": Turn(cluster, arms, DDP, m) for m in counts}
        links = {"preset": preset, "rate": rates[preset], "uneven": uneven, "traces": options.traces}
        for m in counts:
            turns |= {f"{mode}|{m}": Turn(cluster, arms, mode, m, **links) for mode in options.modes}
        turns[f"{OURS}|{ours}"] = Turn(cluster, arms, OURS, ours, warmup=1, steps=_STEPS, **links)
        label = f"{items:,} items, {ratio:g}x"
        for row in interleaved(turns, options.repeats, warmup=0, budget_s=options.seconds, progress=label):
            mode, m = row.pop("arm").split("|")
            row = {"kind": "step", "mode": mode, "micro_batches": int(m), "preset": preset, "ratio": ratio, **row}
            if mode == IDEAL and "seconds" in row:
                row["ideal_seconds"] = ideal_seconds_of(row)
            yield row
        arms.stop([OURS])
        yield {"kind": "whole", "preset": preset, "ratio": ratio}


def _start_ours(cluster, arms: Arms, items: int, options) -> dict:
    """Start what the rule chooses on these links; {"values", "reason", "micro_batches"}."""
    auto = baselines.settings(items, (1, "auto", 1), 0, options.quick)
    for key in ("recsys.pipe", "recsys.data", "recsys.tensor", "train_micro_batch_size_per_gpu"):
        auto.pop(key, None)
    arms.start(OURS, "deepspeed", {**auto, "recsys.parallel": "auto", "train_micro_batch_size_per_gpu": "auto"})
    plan = arms.plan(OURS)
    print(f"\n{plan['reason']}", flush=True)
    count = micro_batches(plan["values"])
    with arms.in_haste():
        arms.ready([count], [OURS], WARMUP)
    return {**plan, "micro_batches": count}
