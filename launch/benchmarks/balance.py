"""`bench.py balance`: what `recsys.partition.method` "profile" and "adaptive" gain, and what they cost, on simulated clusters.

The real engine on windows of MovieLens 100K; four hosts (and two) of one device each, whose speeds are CPU quotas. Ratios are
of measurements that took turns. The best static cut is found by measuring: those cuts that the cost model, from a profile at
these speeds, puts within 10 % of its best, at most six, because all cuts (3654 of 30 layers in four stages) are too many. One
engine makes the steps of all cuts: its layers move between them.
"""

import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.balance_plot import plot
from benchmarks.balance_report import figures, table
from benchmarks.harness import load

__all__ = ["HELP", "arguments", "figures", "measure", "plot", "table"]

HELP = "stages that rebalance themselves: a device that slows down, a heavy head, unequal devices; cost of watching, of a move"
PARTS = ("straggler", "hardware", "head", "overhead", "jitter", "pause", "solver")
_CORES = 1.6  # of the devices together: two cores, with some left for the rest
_MODEL = "recsys.model.config."


def arguments(parser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--resume", metavar="F", help="take over from F what is not measured")
    parser.add_argument("--pipes", nargs="+", type=int, choices=(2, 4), default=[4, 2], help="stages (4 and 2)")
    parser.add_argument("--repeats", type=int, default=2, help="trials, and rounds of the cuts that are compared (2)")
    parser.add_argument("--steps", type=int, default=2, help="of a cut in a round (2)")
    parser.add_argument("--blocks", type=int, default=27, help="decoder blocks of the straggler's model (27)")
    parser.add_argument("--micro_batches", type=int, default=32, help="of its steps in four stages (32)")
    parser.add_argument("--items", type=int, default=16_000, help="that make the head half of the compute (16,000)")
    parser.add_argument("--cuts", type=int, default=6, help="most that are measured to find the best (6)")
    parser.add_argument("--within", type=float, default=0.1, help="of the predicted best, what is measured (0.1)")
    parser.add_argument("--rounds", type=int, default=8, help="of steps with and without the partition (8)")
    parser.add_argument("--round_steps", type=int, default=40, help="of each (40)")
    parser.add_argument("--jitter_steps", type=int, default=500, help="with nothing wrong but jitter (500)")


def measure(options) -> Iterator[dict]:
    """Rows with "part", "pipe" and "kind"; the modules of the parts say which kinds."""
    if options.quick:
        options.pipes, options.repeats, options.steps, options.cuts = [2], 1, 1, 2
        options.blocks, options.micro_batches, options.items = 4, 2, 2000
        options.rounds, options.round_steps, options.jitter_steps = 2, 4, 4
    if options.resume:  # before the first row, for it may be the file that the rows go to
        yield from others(load(Path(options.resume), "balance")["rows"], options.parts, options.pipes)
    for pipe in options.pipes:
        first = pipe == options.pipes[0]
        if {"straggler", "hardware"} & set(options.parts) or (first and {"overhead", "jitter"} & set(options.parts)):
            yield from _or_error(pipe, "straggler", _straggler_model(pipe, options))
        if "head" in options.parts:
            yield from _or_error(pipe, "head", _head_model(pipe, options, split=False))
        if "head" in options.parts and first:
            yield from _or_error(pipe, "split head", _head_model(pipe, options, split=True))
    if "pause" in options.parts:
        yield from _or_error(options.pipes[0], "pause", _large_model(options.pipes[0], options))
    if "solver" in options.parts:
        from benchmarks.balance_costs import solver

        yield from _named("solver", options.pipes[0], solver(2 if options.quick else 50))


def others(rows: list[dict], parts: list[str], pipes: list[int]) -> list[dict]:
    """Those that are not of `parts` in `pipes`; "split head" belongs to "head", the calibration to the straggler."""
    names = {"split head": "head", "calibration": "straggler"}
    return [row for row in rows if names.get(row["part"], row["part"]) not in parts or row["pipe"] not in pipes]


def _or_error(pipe: int, part: str, rows: Iterator[dict]) -> Iterator[dict]:
    """A job that fails loses its rows from there on, and not those of the others."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield {"part": part, "pipe": pipe, "kind": "job", "error": f"{type(error).__name__}: {error}"}


def _straggler_model(pipe: int, options) -> Iterator[dict]:
    from benchmarks import balance_costs, balance_straggler

    micro_batches = max(2, options.micro_batches * pipe // 4)  # as many per stage
    settings = _settings(pipe, 128, options.blocks, micro_batches, 2)
    settings["recsys.dataset.stride"] = (
        5  # few positions carry a loss, so that the head is about as much work as a block
    )
    with _pipeline(pipe, settings) as pipeline:
        if not options.quick:
            yield from _named("calibration", pipe, _calibration(pipeline))
        if "straggler" in options.parts:
            yield from _named("straggler", pipe, balance_straggler.straggler(pipeline, options))
        if "hardware" in options.parts:
            pipeline.batch(max(2, micro_batches // 2), 2)
            yield from _named("hardware", pipe, balance_straggler.hardware(pipeline, options))
        if pipe == options.pipes[0]:
            # short steps, which a fixed cost shows in; but passes that are long against the 10 ms in which a device gets its
            # share of a core, or stages that wait look faster than those that do not
            pipeline.batch(min(8, options.micro_batches), 2)
            if "overhead" in options.parts:
                rows = balance_costs.overhead(pipeline, options.rounds, options.round_steps)
                yield from _named("overhead", pipe, rows)
            if "jitter" in options.parts:
                yield from _named("jitter", pipe, balance_costs.jitter(pipeline, options.jitter_steps))


def _head_model(pipe: int, options, split: bool) -> Iterator[dict]:
    from benchmarks.balance_head import HEAD_BLOCKS, head

    # passes that are long against the 10 ms in which a device gets its share of a core
    settings = _settings(pipe, 128, 8, max(2, options.micro_batches // 4), 8)
    settings |= {
        "recsys.dataset.stride": None,
        "recsys.dataset.min_catalogue": options.items,
    }  # a loss at each position
    if split:
        settings["recsys.head.blocks"] = HEAD_BLOCKS
    name = "split head" if split else "head"
    with _pipeline(pipe, settings) as pipeline:
        yield from _named(name, pipe, head(pipeline, options, f"pipe {pipe}, {name}"))


def _large_model(pipe: int, options) -> Iterator[dict]:
    from benchmarks import balance_costs

    with _pipeline(pipe, _settings(pipe, 64 if options.quick else 512, 8, 2, 1)) as pipeline:
        yield from _named("pause", pipe, balance_costs.pause(pipeline, 1 if options.quick else 3))


def _settings(pipe: int, hidden: int, blocks: int, micro_batches: int, micro_batch: int) -> dict:
    """Dotted keys over ds_configs/baselines.json."""
    return {
        "train_batch_size": micro_batches * micro_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "recsys.pipe": pipe,
        "recsys.data": 1,
        "recsys.threads_per_rank": 1,
        f"{_MODEL}hidden_size": hidden,
        f"{_MODEL}intermediate_size": 4 * hidden,
        f"{_MODEL}num_hidden_layers": blocks,
        f"{_MODEL}tie_word_embeddings": False,
    }


@contextmanager
def _pipeline(pipe: int, settings: dict):
    from benchmarks.balance_job import Pipeline
    from ds_recsys.simulation import Cluster, load_spec

    speed = _CORES / pipe
    with (
        Cluster(load_spec({"hosts": [{"count": pipe, "devices": 1, "speed": speed}]})) as cluster,
        tempfile.TemporaryDirectory() as folder,
        Pipeline(cluster, Path(folder) / "job", settings, [speed] * pipe) as pipeline,
    ):
        yield pipeline


def _calibration(pipeline) -> Iterator[dict]:
    for reading in pipeline.cluster.check():
        yield {"kind": "calibration", "what": reading.what, "expected": reading.expected, "measured": reading.measured}


def _named(part: str, pipe: int, rows: Iterator[dict]) -> Iterator[dict]:
    for row in rows:
        yield {"part": part, "pipe": pipe, **row}
