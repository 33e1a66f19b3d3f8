"""`bench.py modes`: when the replicas tell each other what they learned, in speed on simulated clusters and in quality.

The quick start's model on MovieLens 100K, 64 windows a step, plain data parallelism of four replicas, dense and int8. Four
devices of half a core each: the two cores that such a machine has at least, shared.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import modes_plot, modes_report, quality
from benchmarks.harness import ROOT, load
from benchmarks.modes_arms import BATCH, METHODS, MODES, SYNC
from benchmarks.modes_quality import trainings
from benchmarks.modes_speed import speed

HELP = "data-parallel modes: samples a second on slow links and with a slow or stopped replica, and ranking figures"
_CONFIG = ROOT / "ds_configs/quickstart.json"

figures, table, plot = modes_report.figures, modes_report.table, modes_plot.plot


def arguments(parser) -> None:
    parser.add_argument("--part", choices=("speed", "quality"), help="one of the two (both)")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="beside sync (all)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="compressors (both)")
    parser.add_argument("--every", type=int, default=20, help="steps between averages of local SGD and DiLoCo (20)")
    parser.add_argument("--data", help="interaction log, in place of MovieLens 100K")
    parser.add_argument("--resume", metavar="F", help="take over what F holds in whole (may be --json's file)")
    where = parser.add_argument_group("speed")
    where.add_argument("--repeats", type=int, default=3)
    where.add_argument("--seconds", type=float, default=15.0, help="of a measurement (15)")
    where.add_argument("--stop", type=float, default=10.0, help="seconds for which a replica is stopped (10)")
    where.add_argument("--speed", type=float, default=0.5, help="of a device, as a share of a core (0.5)")
    runs = parser.add_argument_group("quality")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--ranks", type=int, default=4, help="replicas of the whole trainings (4, as on the cluster)")
    runs.add_argument("--epochs", type=int, default=20, help="of the whole trainings (20)")
    runs.add_argument("--run_dir", default="runs/modes")


def measure(options) -> Iterator[dict]:
    """Rows of the kinds that `speed` and `trainings` name."""
    # before the first row, for it may be the file that the rows go to
    kept = load(Path(options.resume), "modes")["rows"] if options.resume and Path(options.resume).exists() else []
    given = options.modes or (["diloco", "async"] if options.quick else MODES)
    options.modes = [mode for mode in MODES if mode in (SYNC, *given)]
    options.batch = None if options.quick else BATCH
    if not options.quick:
        yield from _parts(_CONFIG, options, kept)
        return
    options.methods, options.seeds, options.ranks, options.epochs, options.every = ["none"], [0], 2, None, 3
    options.repeats, options.speed, options.seconds, options.stop = 1, 1.0, 1.0, 1.0
    with tempfile.TemporaryDirectory() as scratch:
        config, log = quality.small(Path(scratch))
        options.data, options.run_dir = str(log), f"{scratch}/runs"
        yield from _parts(config, options, kept)


def _parts(config: Path, options, kept: list[dict]) -> Iterator[dict]:
    """A part that is not asked for is shown as it was kept."""
    if options.part != "quality":
        yield from speed(config, options, kept)
    else:
        yield from (row for row in kept if row["kind"] != "quality")
    if options.part != "speed":
        yield from trainings(config, options, kept)
    else:
        yield from (row for row in kept if row["kind"] == "quality")
