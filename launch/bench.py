"""The README's figures, one sub-command each: measured anew, or shown from the rows that were kept.

python launch/bench.py quality ds_configs/ml100k_quality.json --json runs/quality.json     three seeds, mean and spread
python launch/bench.py head --json runs/head.json                      the item head's cross-entropy against its peers
python launch/bench.py head --from launch/benchmarks/results/head.json    table, figures and plot without measuring
"""

import signal

import benchmarks
from benchmarks import harness
from command import arguments, run


def main(options) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's background jobs ignore the second
        signal.signal(number, signal.default_int_handler)  # a benchmark ends its processes on a Ctrl-C
    harness.run(options.name, options.benchmark, options)


if __name__ == "__main__":
    parser = arguments(__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name in benchmarks.NAMES:
        benchmark = benchmarks.load(name)
        command = commands.add_parser(name, help=benchmark.HELP, description=benchmark.HELP)
        command.set_defaults(benchmark=benchmark)
        harness.arguments(command)
        benchmark.arguments(command)
    run(main, parser)
