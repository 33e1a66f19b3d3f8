"""A simulated cluster on this machine: hosts with their own link rates and device speeds, under the real deepspeed launcher.

python launch/cluster.py run ds_configs/cluster_4x1.yaml launch/train.py --deepspeed_config ds_configs/quickstart.json
"""

import signal
import sys
from pathlib import Path

from command import arguments, run


def main(options) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is torn down on the way out
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        options.action(options)
    except KeyboardInterrupt:
        sys.exit(130)


def build(options) -> None:
    from ds_recsys.simulation import Cluster, load_spec

    with Cluster(load_spec(options.file), loopback=options.loopback) as cluster:
        print(cluster.describe(), flush=True)
        readings = [] if options.no_check else cluster.check()
        if not options.no_check:
            print(cluster.report(readings), flush=True)
        if options.script is None:
            sys.exit(0 if all(reading.ok for reading in readings) else 1)
        job = cluster.start([options.script, *options.arguments], log_dir=options.log_dir)
        print(f"rank logs: {job.log_dir}", flush=True)
        sys.exit(job.wait())


def operate(name: str, *fields: str):
    """The action that prints what ds_recsys.simulation.operate.<name> returns for these options."""

    def action(options) -> None:
        from ds_recsys.simulation import operate

        print(getattr(operate, name)(*(getattr(options, field) for field in fields)))

    return action


if __name__ == "__main__":
    parser = arguments(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, action, words: str, *positional: str):
        made = commands.add_parser(name, help=words, description=words)
        made.set_defaults(action=action)
        for field in positional:
            made.add_argument(field, type=int if field == "rank" else str)
        return made

    job = command("run", build, "build the cluster, measure it, run a script on every device, tear it down")
    job.add_argument("--loopback", action="store_true", help="no root needed: 127.0.0.1, no rates, no speeds")
    job.add_argument("--no_check", action="store_true", help="do not measure rates and speeds first")
    job.add_argument("--log_dir", type=Path, help="folder for the ranks' logs (a temporary one)")
    job.add_argument("file", help="YAML or JSON: hosts, devices, speeds, links, events")
    job.add_argument("script")
    job.add_argument("arguments", nargs="...")
    only = command("check", build, "build the cluster and measure its rates and speeds", "file")
    only.set_defaults(loopback=False, no_check=False, script=None)
    command("list", operate("table"), "running clusters of this user")
    changes = ("link", "up", "down", "device", "speed")
    live = command("set", operate("change", "id", "host", *changes), "change a running cluster", "id", "host")
    for name in changes[:3]:
        live.add_argument(f"--{name}", metavar="RATE", help="such as 60mbit, or none for no limit")
    live.add_argument("--device", type=int)
    live.add_argument("--speed", type=float, help="share of a CPU core")
    fields = ("id", "rank", "signal")
    command("signal", operate("send", *fields), "act on a rank: stop, continue, kill", *fields)
    command("clean", operate("clean"), "remove what clusters of dead owners left")
    command("presets", operate("presets"), "real clusters whose ratio of communication to compute a link can have")
    run(main, parser)
