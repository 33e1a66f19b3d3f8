"""Whether the simulation is honest: link rates and device speeds measured beside what was asked for."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ds_recsys.simulation import network
from ds_recsys.simulation.processes import CLUSTER_MARK
from ds_recsys.simulation.units import format_rate

TOLERANCE = 0.05
_PROBE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("probe.py"))]
_LINK_SECONDS = 1.6  # for all links together
_DEVICE_SECONDS = 1.2  # for all devices one at a time
_LONGEST, _SHORTEST = 0.5, 0.2


@dataclass(frozen=True)
class Reading:
    """`expected` and `measured` in `unit`: bit/s of payload at the receiver, or cores of CPU time."""

    what: str
    expected: float
    measured: float
    unit: str

    @property
    def share(self) -> float:
        return self.measured / self.expected

    @property
    def ok(self) -> bool:
        return abs(self.share - 1) <= TOLERANCE


def check(
    cluster_id: str, hosts: list[dict], groups: dict[str, list[Path]], cores: dict[str, list[int]]
) -> list[Reading]:
    """Readings of every limited link and of every device, alone and all at once.

    Args:
        hosts: name, speed and link of each, as in the cluster file.
        groups, cores: control group and core of each device, by host.
    """
    readings = []
    cluster_group = next(iter(groups.values()))[0].parent
    directions = sum(host["link"][way] is not None for host in hosts for way in ("up", "down"))
    seconds = _share_of(_LINK_SECONDS, directions)
    for index, host in enumerate(hosts):
        for way in ("up", "down"):
            rate = host["link"][way]
            if rate is not None:
                measured = _link(cluster_id, cluster_group, host["name"], index, way, seconds)
                readings.append(Reading(f"{host['name']} {way}", rate, measured, "bit/s"))
    devices = [(host["name"], d, speed) for host in hosts for d, speed in enumerate(host["speed"])]
    each = [(groups[name][d], cores[name][d]) for name, d, _ in devices]
    seconds = _share_of(_DEVICE_SECONDS, len(devices))
    alone = [_speeds(cluster_id, [one], seconds)[0] for one in each]
    together = _speeds(cluster_id, each, _LONGEST)
    for (name, d, speed), one, all_at_once in zip(devices, alone, together, strict=True):
        readings.append(Reading(f"{name} device {d}", speed, one, "core"))
        readings.append(Reading(f"{name} device {d}, all busy", speed, all_at_once, "core"))
    return readings


def report(readings: list[Reading]) -> str:
    """An aligned table, one line a reading."""
    rows = [("calibration", "asked", "measured", "share", "")]
    for reading in readings:
        show = format_rate if reading.unit == "bit/s" else lambda cores: f"{cores:.3f} core"
        verdict = "ok" if reading.ok else f"more than {TOLERANCE:.0%} off"
        rows.append((reading.what, show(reading.expected), show(reading.measured), f"{reading.share:.3f}", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        f"{what:<{widths[0]}}  {asked:>{widths[1]}}  {got:>{widths[2]}}  {share:>{widths[3]}}  {verdict}".rstrip()
        for what, asked, got, share, verdict in rows
    ]
    return "\n".join(lines)


def _share_of(total: float, parts: int) -> float:
    return min(_LONGEST, max(_SHORTEST, total / max(parts, 1)))


def _link(cluster_id: str, group: Path, host: str, index: int, way: str, seconds: float) -> float:
    """bit/s of one TCP stream between the host and the switch."""
    inside, switch = network.namespace(cluster_id, host), network.namespace(cluster_id)
    sender, receiver = (inside, switch) if way == "up" else (switch, inside)
    target = network.SWITCH_ADDRESS if way == "up" else network.address(index)
    entered = str(_probe_file(group))
    receiving = _start(cluster_id, [*network.enter(receiver), *_PROBE, "receive", entered, str(seconds)])
    port = receiving.stdout.readline().strip()
    sending = _start(cluster_id, [*network.enter(sender), *_PROBE, "send", entered, target, port])
    measured = json.loads(receiving.communicate()[0] or "0")
    sending.communicate()
    return measured


def _speeds(cluster_id: str, places: list[tuple[Path, int]], seconds: float) -> list[float]:
    """Cores' worth of time that a busy process in each (group, core) gets, all of them at the same time."""
    start = time.monotonic() + 0.05 + 0.02 * len(places)
    probes = [
        _start(cluster_id, [*_PROBE, "busy", str(_probe_file(group)), str(core), str(start), str(seconds)])
        for group, core in places
    ]
    return [json.loads(probe.communicate()[0] or "0") for probe in probes]


def _probe_file(group: Path) -> Path:
    leaf = group / "probe"
    leaf.mkdir(exist_ok=True)
    return leaf / "cgroup.procs"


def _start(cluster_id: str, command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, env={CLUSTER_MARK: cluster_id}, stdout=subprocess.PIPE, text=True)
