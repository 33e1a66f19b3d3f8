"""`bench.py baselines`: single-mode parallelism and plain DeepSpeed's hybrid on simulated clusters, against the ideal.

Same model, global batch, precision and optimizer in every mode. The ideal is measured: each device computes the whole
global batch by itself, without communication and all devices at once; the ideal step takes one over the sum of their speeds.
Link rates follow from it: dense gradients take 0.25, 1 and 4 times the ideal step.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arms import Arms
from benchmarks.baselines_report import IDEAL, figures, plot, table
from benchmarks.repeats import interleaved

__all__ = ["HELP", "arguments", "figures", "measure", "plot", "table"]

HELP = "step time of data-, tensor- and pipeline-parallel training on simulated clusters, as a share of the ideal"
DDP = "data, DDP"
MODES = {  # name: engine, pipe x data x tensor, ZeRO stage
    DDP: ("ddp", (1, 4, 1), 0),
    "data, DeepSpeed": ("deepspeed", (1, 4, 1), 0),
    "data, ZeRO-1": ("deepspeed", (1, 4, 1), 1),
    "tensor": ("deepspeed", (1, 1, 4), 0),
    "pipeline": ("deepspeed", (4, 1, 1), 0),
    "hybrid, DeepSpeed": ("deepspeed", (2, 2, 1), 0),
}
CONFIG = Path(__file__).parents[2] / "ds_configs/baselines.json"
TOPOLOGIES = {"2x2": (2, 2), "4x1": (4, 1)}  # hosts, devices on each
UNEVEN = "uneven"  # as 4x1, the last host's devices at half speed, the link of the one before at a quarter of the rate
PRESET_NAMES = ("8b-16xa100-400gbe", "8b-16xa100-100gbe", "8b-16xa100-25gbe")
_TINY = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "recsys.model.config.num_hidden_layers": 4,
    "recsys.model.config.hidden_size": 32,
    "recsys.model.config.intermediate_size": 64,
}


def arguments(parser, topologies=tuple(TOPOLOGIES)) -> None:
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="a measurement that has used these is not repeated")
    parser.add_argument("--speed", type=float, default=0.4, help="of a device, as a share of a core (0.4)")
    parser.add_argument("--topologies", nargs="+", choices=topologies, default=list(topologies))
    parser.add_argument("--items", type=int, nargs="+", default=[1682, 100_000], help="catalogue sizes")
    parser.add_argument("--presets", nargs="+", choices=PRESET_NAMES, default=list(PRESET_NAMES))
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="beside the ideal, which the DDP job measures"
    )
    parser.add_argument("--traces", metavar="DIR", help="also write a Chrome trace of one step of each arm")


def measure(options) -> Iterator[dict]:
    """Rows of kind "calibration" (a reading), "workload" (what the links follow from) and "step" (a measurement)."""
    yield from on_clusters(options, _workload)


def on_clusters(options, workload: Callable[..., Iterator[dict]]) -> Iterator[dict]:
    """Rows of workload(cluster, arms, items, options) on every cluster over every catalogue."""
    if options.quick:
        options.topologies, options.items, options.presets = ["2x2"], [1682], [PRESET_NAMES[1]]
        options.modes, options.repeats = ["data, DDP", "pipeline"], 1
    from ds_recsys.simulation import Cluster, load_spec

    for topology in options.topologies:
        with Cluster(load_spec({"hosts": hosts_of(topology, options.speed)})) as cluster:
            for items in options.items:
                place = {"topology": topology, "items": items}
                with (
                    tempfile.TemporaryDirectory() as folder,
                    Arms(cluster, Path(folder), CONFIG, f"{topology} {items}") as arms,
                ):
                    for row in workload(cluster, arms, items, options):
                        yield {**place, **row}


def hosts_of(topology: str, speed: float) -> list[dict]:
    """As a cluster's file has them."""
    hosts, devices = TOPOLOGIES["4x1" if topology == UNEVEN else topology]
    slow = [speed] * (hosts - 1) + [speed / 2 if topology == UNEVEN else speed]
    return [{"name": f"host{i}", "devices": devices, "speed": slow[i]} for i in range(hosts)]


def _workload(cluster, arms: Arms, items: int, options) -> Iterator[dict]:
    """All modes over one catalogue on one cluster."""
    from ds_recsys.simulation.presets import PRESETS

    micro_batches = start(cluster, arms, items, options)
    first = arms.measure(DDP, micro_batches[0], alone=True)
    ideal, rates = ideal_seconds_of(first), {}
    for name in options.presets:
        rates[name] = PRESETS[name].rate(4 * first["parameters"], ideal, cluster.spec.world_size)
        yield from calibrated(cluster, name, rates[name])
    yield {"kind": "workload", "parameters": first["parameters"], "ideal_seconds": ideal, "rates": rates}
    runs = {f"{IDEAL}|{m}|": Turn(cluster, arms, DDP, m) for m in micro_batches}
    for preset in options.presets:
        for mode in options.modes:
            for m in micro_batches:
                runs[f"{mode}|{m}|{preset}"] = Turn(cluster, arms, mode, m, preset, rates[preset], options.traces)
    for row in interleaved(runs, options.repeats, warmup=0, budget_s=options.seconds, progress=f"{items:,} items"):
        mode, m, preset = row.pop("arm").split("|")
        row = {"kind": "step", "mode": mode, "micro_batches": int(m), **row}
        if preset:
            row |= {"preset": preset, "ratio": round(PRESETS[preset].ratio, 2)}
        elif "seconds" in row:
            row["ideal_seconds"] = ideal_seconds_of(row)
        yield row


def start(cluster, arms: Arms, items: int, options) -> list[int]:
    """Start every mode, on links without limit, and wait until all are ready; the numbers of micro-batches to compare."""
    micro_batches = [cluster.spec.world_size, 4 * cluster.spec.world_size]
    set_links(cluster, None)
    with arms.in_haste():
        for mode in dict.fromkeys([DDP, *options.modes]):
            engine, grid, zero = MODES[mode]
            arms.start(mode, engine, settings(items, grid, zero, options.quick))
        arms.ready(micro_batches)
    return micro_batches


def calibrated(cluster, name: str, rate: float, uneven: bool = False) -> Iterator[dict]:
    """Set a preset's rate on all links, measure and print; rows of kind "calibration"."""
    from ds_recsys.simulation.presets import PRESETS

    set_links(cluster, rate, uneven)
    readings = cluster.check()
    print(f"\n{PRESETS[name].describe()}\n{cluster.report(readings)}", flush=True)
    for reading in readings:
        yield {"kind": "calibration", "preset": name, "what": reading.what,
               "expected": reading.expected, "measured": reading.measured}  # fmt: skip


@dataclass
class Turn:
    """One measurement of one arm at one link rate; the first also writes the trace.

    Attributes:
        warmup, steps: untimed steps before, and those that are timed.
        uneven: as in `set_links`.
    """

    cluster: object
    arms: Arms
    mode: str
    micro_batches: int
    preset: str | None = None
    rate: float | None = None
    traces: str | None = None
    warmup: int = 0
    steps: int = 1
    uneven: bool = False

    def __call__(self) -> dict:
        if not self.preset:
            return self.arms.measure(self.mode, self.micro_batches, alone=True)
        set_links(self.cluster, self.rate, self.uneven)
        trace, self.traces = self._trace_file(), None
        row = self.arms.measure(self.mode, self.micro_batches, self.steps, trace=trace, warmup=self.warmup)
        sent = {host: nbytes / (self.warmup + self.steps) for host, nbytes in row["sent_bytes"].items()}
        return {**row, "sent_bytes": sent}

    def _trace_file(self) -> str | None:
        if not self.traces:
            return None
        folder = Path(self.traces).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.arms.label} {self.mode} {self.micro_batches} micro-batches {self.preset}".lower()
        return str(folder / f"{re.sub('[^a-z0-9]+', '-', name)}.json")


def set_links(cluster, rate: float | None, uneven: bool = False) -> None:
    """The same rate on all links, but for one where they are uneven."""
    hosts = cluster.spec.hosts
    for number, host in enumerate(hosts):
        own = rate / 4 if rate and uneven and number == len(hosts) - 2 else rate
        cluster.set_link(host.name, up=own, down=own)


def ideal_seconds_of(row: dict) -> float:
    """Of a step that every device made alone: what all devices together would need, at the speed that each showed."""
    return 1 / sum(1 / seconds for seconds in row["rank_seconds"])


def settings(items: int, grid: tuple, zero: int, quick: bool) -> dict:
    """Dotted keys over ds_configs/baselines.json."""
    pipe, data, tensor = grid
    return {
        **(_TINY if quick else {}),
        "recsys.pipe": pipe,
        "recsys.data": data,
        "recsys.tensor": tensor,
        "recsys.threads_per_rank": 1,
        "recsys.dataset.min_catalogue": items,
        "zero_optimization.stage": zero,
    }
