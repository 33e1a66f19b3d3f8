"""Part "speed" of bench.py modes: samples a second of each mode on four hosts of one device, on two links.

On link "1x" a dense ring all-reduce of the gradients takes as long as the compute of a step, on "4x" four times as long. On the
first one also with one replica at half speed, and with one that is stopped for a while.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import quality
from benchmarks.compression_training import link_rate
from benchmarks.modes_arms import ALONE, SYNC, arm, groups, margin, settings
from benchmarks.modes_job import SLOWED, Replicas
from benchmarks.repeats import interleaved

HOSTS, QUICK_HOSTS = 4, 2  # of one device each
LINKS = (1, 4)  # dense communication over compute
EVEN, HALF, STOP = "even", "half", "stop"  # all replicas at full speed, one at half, one stopped for a while
CELLS = ((1, EVEN), (4, EVEN), (1, HALF), (1, STOP))
_STARTING_SPEED = 1.0  # imports and building need not take as long as on slow devices


def speed(config: Path, options, kept: list[dict]) -> Iterator[dict]:
    """Rows of kind "workload" (what the links follow from) and "window" (a measurement).

    Args:
        kept: rows of an earlier run; of those with the same options, groups of arms that are whole are taken over.
    """
    from ds_recsys import load_config
    from ds_recsys.simulation import Cluster, load_spec

    quality.fetch(config, options.data)
    hosts = QUICK_HOSTS if options.quick else HOSTS
    place = {"hosts": hosts, "speed": options.speed, "every": options.every, "window": options.seconds}
    place |= {"stop": options.stop, "batch": options.batch}
    workload = next((row for row in kept if row["kind"] == "workload" and place.items() <= row.items()), None)
    samples = (options.batch or load_config(config).train_batch_size) // hosts
    if workload:
        yield workload
    with Cluster(load_spec({"hosts": [{"count": hosts, "devices": 1, "speed": options.speed}]})) as cluster:
        for number, arms in enumerate(groups(options.modes, options.methods)):
            found = _whole(kept, number, arms, options.repeats) if workload else None
            if found:
                yield from found
                continue
            with tempfile.TemporaryDirectory() as folder, Replicas(cluster, Path(folder), config) as replicas:
                bench = _Bench(cluster, replicas, options, samples)
                bench.start(config, arms)
                if workload is None:
                    workload = {"kind": "workload", **place, **bench.workload()}
                    yield workload
                turns = {
                    f"{mode}|{method}|{link}|{situation}": bench.turn(
                        arm(mode, method), workload["rate"] / link, situation
                    )
                    for link, situation in CELLS
                    for mode, method in arms
                    if mode != ALONE or (link, situation) == CELLS[0]
                }
                for row in interleaved(turns, options.repeats, warmup=0, progress=f"group {number + 1}"):
                    mode, method, link, situation = row.pop("arm").split("|")
                    cell = {"mode": mode, "method": method, "link": int(link), "situation": situation}
                    yield {"kind": "window", "group": number, **cell, **row}


class _Bench:
    """The cluster's links and speeds, and the jobs that run on it."""

    def __init__(self, cluster, replicas: Replicas, options, samples_per_step: int):
        self._cluster, self._replicas, self._options, self._samples = cluster, replicas, options, samples_per_step

    def start(self, config: Path, arms: list[tuple[str, str]]) -> None:
        self._set(None, [_STARTING_SPEED] * len(self._cluster.spec.hosts))
        every, hosts = self._options.every, len(self._cluster.spec.hosts)
        for mode, method in arms:
            changes = settings(config, mode, method, hosts, every, self._options.data, self._options.batch)
            self._replicas.start(arm(mode, method), changes, margin(mode, every))
        self._replicas.ready()

    def workload(self) -> dict:
        """The dense arm over unlimited links: parameters, compute of a step, and the rate of the link that takes as long."""
        row = self.turn(SYNC, None, EVEN)()
        hosts, compute = len(self._cluster.spec.hosts), row["compute_seconds"]
        rate = link_rate(row["parameters"], compute, hosts)
        return {"parameters": row["parameters"], "compute_seconds": compute, "rate": rate}

    def turn(self, name: str, rate: float | None, situation: str) -> Callable[[], dict]:
        def run() -> dict:
            options = self._options
            speeds = [options.speed] * len(self._cluster.spec.hosts)
            if situation == HALF:
                speeds[SLOWED] /= 2
            self._set(rate, speeds)
            stopped = options.stop if situation == STOP else 0.0
            return self._replicas.window(name, options.seconds, speeds, self._samples, stopped)

        return run

    def _set(self, rate: float | None, speeds: list[float]) -> None:
        for host, share in zip(self._cluster.spec.hosts, speeds, strict=True):
            self._cluster.set_link(host.name, up=rate, down=rate)
            self._cluster.set_speed(host.name, 0, share)


def _whole(kept: list[dict], number: int, arms: list[tuple[str, str]], repeats: int) -> list[dict] | None:
    """The rows of a group in an earlier result, where none is missing."""
    rows = [row for row in kept if row["kind"] == "window" and row["group"] == number and row["repeat"] < repeats]
    found = {(row["mode"], row["method"], row["link"], row["situation"], row["repeat"]) for row in rows}
    wanted = {
        (mode, method, link, situation, repeat)
        for mode, method in arms
        for link, situation in CELLS
        for repeat in range(repeats)
        if mode != ALONE or (link, situation) == CELLS[0]
    }
    return rows if wanted == found and not any("error" in row for row in rows) else None
