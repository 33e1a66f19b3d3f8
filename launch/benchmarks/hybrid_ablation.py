"""Part "ablation" of bench.py hybrid: each capability that a plan uses switched off in turn, all else as it was chosen."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import baselines
from benchmarks.arms import Arms
from benchmarks.baselines import CONFIG, UNEVEN, Turn, hosts_of
from benchmarks.hybrid_report import OURS
from benchmarks.repeats import interleaved

_TOGETHER = 3  # beside the whole plan: more jobs at once take more than the memory of such a machine
_STEPS = 3  # of a measurement
WARMUP = 3  # steps after which an average that comes a step late has touched all its memory


def ablation(options, plans: list[dict], kept: list[dict]) -> Iterator[dict]:
    """Rows of kind "ablation" for the rows `plans`; a cell that `kept` holds in whole is taken over."""
    from ds_recsys.simulation import Cluster, load_spec

    asked = [row for row in plans if _is_asked(row, options)]
    others = [row for row in plans if not _is_asked(row, options)]
    for plan in others:
        yield from _kept(plan, kept)
    for topology in dict.fromkeys(plan["topology"] for plan in asked):
        with Cluster(load_spec({"hosts": hosts_of(topology, options.speed)})) as cluster:
            for plan in asked:
                if plan["topology"] == topology:
                    yield from _kept(plan, kept) or _measured(cluster, plan, options)


def _is_asked(plan: dict, options) -> bool:
    return (
        plan["topology"] in options.topologies and plan["items"] in options.items and plan["preset"] in options.presets
    )


def _place(plan: dict) -> dict:
    return {"kind": "ablation", **{key: plan[key] for key in ("topology", "items", "preset", "ratio")}}


def _kept(plan: dict, kept: list[dict]) -> list[dict]:
    """A cell's rows, if it ended with the same plan."""
    place = _place(plan)
    found = [row for row in kept if place.items() <= row.items()]
    whole = any(row["mode"] == "whole" and row["values"] == plan["values"] for row in found)
    return found if whole else []


def _measured(cluster, plan: dict, options) -> Iterator[dict]:
    place, topology, items = _place(plan), plan["topology"], plan["items"]
    whole = {**baselines.settings(items, (1, "auto", 1), 0, options.quick), **plan["values"]}
    parts = list(without(plan["values"], cluster.spec).items())
    links = {"preset": plan["preset"], "rate": plan["rate"], "uneven": topology == UNEVEN}
    for first in range(0, len(parts), _TOGETHER):
        label = f"{topology} {items} {plan['ratio']:g}x, ablation {first // _TOGETHER + 1}"
        with tempfile.TemporaryDirectory() as folder, Arms(cluster, Path(folder), CONFIG, label) as arms:
            turns = {}
            baselines.set_links(cluster, None)
            with arms.in_haste():
                for name, changes in [(OURS, {}), *parts[first : first + _TOGETHER]]:
                    values = {**whole, **changes}
                    arms.start(name, "deepspeed", values)
                    turns[name] = Turn(cluster, arms, name, micro_batches(values), warmup=1, steps=_STEPS, **links)
                for name, turn in turns.items():
                    arms.ready([turn.micro_batches], [name], WARMUP)
            for row in interleaved(turns, options.repeats, warmup=0, budget_s=options.seconds, progress=label):
                yield {**place, "mode": row.pop("arm"), "group": first, **row}
    yield {**place, "mode": "whole", "values": plan["values"]}


def without(values: dict, spec) -> dict[str, dict]:
    """What is switched off -> the keys that change, for every capability that a plan uses."""
    found = {}
    replicas, pipe = values["recsys.data"], values["recsys.pipe"]
    compressed = values["recsys.compression.method"] != "none"
    if compressed:
        found["compression"] = {"recsys.compression.method": "none", "recsys.compression.owner_shares": None}
    if values["recsys.data_parallel.mode"] != "sync":
        found["delay"] = {"recsys.data_parallel.mode": "sync", "recsys.data_parallel.look_ahead": False}
    elif compressed:
        found["overlap"] = {"recsys.compression.overlap": False}
        if pipe == 1:
            found["early head"] = {"recsys.compression.early_head": False}
    if compressed and replicas * values["recsys.tensor"] > max(len(host.speeds) for host in spec.hosts):
        if any(len(host.speeds) > 1 for host in spec.hosts):
            found["sums within hosts"] = {"recsys.compression.hierarchical": False}
    if values.get("optimizer.params.fused"):
        found["fused AdamW"] = {"optimizer.params.fused": False}
    if values.get("recsys.data_shares"):
        found["parts by speed"] = {"recsys.data_shares": None}
    if values.get("recsys.compression.owner_shares"):
        found["owners by link"] = {"recsys.compression.owner_shares": None}
    if pipe > 1 and "recsys.partition.bounds" in values:
        found["measured cut"] = {"recsys.partition.bounds": None, "recsys.partition.method": "parameters"}
    if pipe * values["recsys.tensor"] > 1:
        world = pipe * replicas * values["recsys.tensor"]
        batch = replicas * values["gradient_accumulation_steps"] * values["train_micro_batch_size_per_gpu"]
        found["grid"] = {
            "recsys.pipe": 1,
            "recsys.data": world,
            "recsys.tensor": 1,
            "recsys.data_shares": None,
            "recsys.compression.owner_shares": None,
            "recsys.partition.bounds": None,
            "recsys.partition.method": "parameters",
            "train_micro_batch_size_per_gpu": batch // world,
            "gradient_accumulation_steps": 1,
        }
    return found


def micro_batches(values: dict) -> int:
    """Of a step, over all replicas."""
    return values["recsys.data"] * values["gradient_accumulation_steps"]
