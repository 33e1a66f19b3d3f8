"""`bench.py compression`: compressed all-reduces against dense gloo and torch's hooks, on simulated links and in training.

Part "communication": 25 million fp32 values on four hosts, the arms of a link in turns in one job. Four devices of half a core
each: the two cores that such a machine has at least, shared. Part "training": the quick start's model on MovieLens 100K, four
replicas on a link where dense communication takes as long as compute; the speed from the cluster, loss and ranking figures
from whole trainings without it.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import compression_report, compression_training_report
from benchmarks.compression_links import LINKS, TOPOLOGIES, communication, kernels
from benchmarks.compression_methods import METHODS, OURS
from benchmarks.compression_training import training

HELP = "compressed all-reduces against dense ones on simulated links (--part training: speed and quality of training)"
_REPORTS = (compression_report, compression_training_report)


def arguments(parser) -> None:
    parser.add_argument("--part", choices=("communication", "training"), default="communication")
    parser.add_argument(
        "--repeats", type=int, default=7, help="rounds of a link; three times as many on fast links (7)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)} (all)"
    )
    parser.add_argument("--speed", type=float, default=0.5, help="of a device, as a share of a core (0.5)")
    where = parser.add_argument_group("communication")
    where.add_argument("--values", type=int, default=25_000_000, help="fp32 values that are reduced (25 million)")
    where.add_argument("--links", nargs="*", choices=LINKS, default=list(LINKS), help="between four hosts")
    where.add_argument("--topologies", nargs="*", choices=TOPOLOGIES, default=list(TOPOLOGIES), help="hosts x devices")
    runs = parser.add_argument_group("training")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--ranks", type=int, default=4, help="replicas of the whole trainings (4, as on the cluster)")
    runs.add_argument("--epochs", type=int, help="of the whole trainings, in place of the quick start's")
    runs.add_argument("--data", help="interaction log, in place of MovieLens 100K")
    runs.add_argument("--resume", metavar="F", help="take over the whole trainings that F holds (may be --json's file)")
    runs.add_argument("--run_dir", default="runs/compression")


def measure(options) -> Iterator[dict]:
    """Rows of the kinds that `communication`, `kernels` and `training` name."""
    if options.part == "training":
        options.methods = [method for method in options.methods or OURS if method in OURS]
        yield from training(options)
        return
    options.methods = options.methods or list(METHODS)
    if options.quick:
        options.values, options.repeats, options.methods = 2_000_000, 1, ["int8", "int4", "auto", "ddp_powersgd"]
        options.links, options.topologies = ["1gbit", "loopback"], ["4x1"]
    if "4x1" not in options.topologies:
        options.links = []
    yield from kernels(options.values, options.repeats)
    yield from communication(options)


def figures(rows: list[dict]) -> dict:
    """Those of the parts whose rows there are."""
    return {name: value for report in _REPORTS for name, value in report.figures(rows).items()}


def table(rows: list[dict]) -> str:
    return "\n\n".join(text for report in _REPORTS if (text := report.table(rows)))


def plot(rows: list[dict], path: Path) -> None:
    """Of the training where it was measured."""
    trained = any(row["kind"] == "quality" for row in rows)
    (compression_training_report if trained else compression_report).plot(rows, path)
