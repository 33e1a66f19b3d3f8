"""Part "scaling" of bench.py hybrid: 1, 2, 4 and 8 devices, each a host of its own, at one link rate.

Strong: 64 windows a step on all of them together; weak: 16 on each. One device alone is what the others are compared with.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import baselines
from benchmarks.arms import Arms
from benchmarks.baselines import CONFIG, DDP, Turn
from benchmarks.hybrid_report import ALONE, OURS
from benchmarks.repeats import interleaved

DEVICES = (1, 2, 4, 8)
PRESET = "8b-16xa100-100gbe"  # dense sums of four devices take as long as compute
_SPEED = 0.2  # of a device, as a share of a core: eight share two cores
_BATCH, _SHARE = 64, 16
_PIPELINE = "pipeline"


def scaling(options, kept: list[dict]) -> Iterator[dict]:
    """Rows of kind "scaling"; a growth and number of devices that `kept` holds in whole is taken over."""
    from ds_recsys.simulation import Cluster, load_spec

    for growth in ("strong", "weak"):
        same = [row for row in kept if row["kind"] == "scaling" and row["growth"] == growth]
        rate = next((row["rate"] for row in same if "rate" in row), None)
        for devices in sorted(options.devices, key=lambda n: (n != 4, n)):  # four first: the rate follows from them
            hosts = {"count": devices, "devices": 1, "speed": _SPEED}
            batch = _BATCH if growth == "strong" else _SHARE * devices
            place = {"kind": "scaling", "growth": growth, "devices": devices, "batch": batch}
            found = [row for row in same if place.items() <= row.items()]
            if any(row["mode"] == "whole" for row in found):
                yield from found
                continue
            with (
                Cluster(load_spec({"hosts": [hosts]})) as cluster,
                tempfile.TemporaryDirectory() as folder,
                Arms(cluster, Path(folder), CONFIG, f"{growth}, {devices} devices") as arms,
            ):
                for row in _on(cluster, arms, devices, batch, rate, options):
                    rate = row.get("rate", rate)
                    yield {**place, **row}
                yield {**place, "mode": "whole"}


def _on(cluster, arms: Arms, devices: int, batch: int, rate: float | None, options) -> Iterator[dict]:
    common = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": batch // devices}
    world = {**baselines.settings(1682, (1, devices, 1), 0, options.quick), **common}
    names, counts = [DDP], [devices, 4 * devices]
    baselines.set_links(cluster, None)
    with arms.in_haste():
        arms.start(DDP, "ddp", world)
        if devices > 1:
            arms.start(_PIPELINE, "deepspeed", {**world, "recsys.pipe": devices, "recsys.data": 1})
            names.append(_PIPELINE)
        arms.ready(counts)
    alone = arms.measure(DDP, counts[0], alone=True)
    if rate is None:
        rate = link_rate(alone, batch)
        yield {"mode": "links", "rate": rate}
    turns = {f"{ALONE}|{m}": Turn(cluster, arms, DDP, m) for m in counts}
    if devices > 1:
        baselines.set_links(cluster, rate)
        auto = {
            key: value for key, value in world.items() if key not in ("recsys.pipe", "recsys.data", "recsys.tensor")
        }
        arms.start(OURS, "deepspeed", {**auto, "recsys.parallel": "auto", "train_micro_batch_size_per_gpu": "auto"})
        values = arms.plan(OURS)["values"]
        yield {"mode": "plan", "values": values}
        m = values["recsys.data"] * values["gradient_accumulation_steps"]
        arms.ready([m], [OURS])
        links = {"preset": PRESET, "rate": rate}
        turns |= {f"{name}|{count}": Turn(cluster, arms, name, count, **links) for name in names for count in counts}
        turns[f"{OURS}|{m}"] = Turn(cluster, arms, OURS, m, warmup=1, steps=3, **links)
    for row in interleaved(turns, options.repeats, warmup=0, budget_s=options.seconds, progress=arms.label):
        mode, m = row.pop("arm").split("|")
        yield {"mode": mode, "micro_batches": int(m), **row}


def link_rate(alone: dict, batch: int) -> float:
    """Bits a second, the same for all numbers of devices: those of the preset for 64 windows on four.

    Args:
        alone: a measurement of each device by itself over `batch` windows.
    """
    from ds_recsys.simulation.presets import PRESETS

    each = sum(alone["rank_seconds"]) / len(alone["rank_seconds"]) / batch
    return PRESETS[PRESET].rate(4 * alone["parameters"], each * _BATCH / 4, 4)
