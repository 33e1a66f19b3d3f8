"""Hosts as network namespaces on one switch, each link with its own rate in either direction.

A cluster's switch is a namespace too, so that nothing of it meets the machine's own interfaces, addresses, ports or
firewall, nor another cluster: every cluster has the addresses 10.77.0.x for itself. A host is reached by the others and by the
switch, and by nothing else. https://man7.org/linux/man-pages/man8/tc-tbf.8.html
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from ds_recsys.errors import UserError

INTERFACE = "eth0"
SWITCH_ADDRESS = "10.77.0.254"
_NAMESPACES = Path("/run/netns")
_MTU = 9000  # at 1500 the headers take 4.4 % of the rate
_QUEUE_SECONDS = 0.05
_BURST_SECONDS = 0.002
_GSO_LARGEST = 65536


def missing() -> str | None:
    """What this machine or user lacks for namespaces, in a few words; None if nothing."""
    if os.geteuid() != 0:
        return "root"
    for tool, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(tool) is None:
            return f"`{tool}` (package {package})"
    return None


def address(index: int) -> str:
    return f"10.77.0.{index + 1}"


def names(hosts) -> str:
    """Lines of an /etc/hosts file: without them c10d looks for a name server, and warns that there is none."""
    forms = ("", "::ffff:")  # c10d's sockets are IPv6 ones that hold IPv4 addresses
    return "".join(f"{form}{address(index)} {host.name}\n" for form in forms for index, host in enumerate(hosts))


def namespace(cluster_id: str, host: str | None = None) -> str:
    """Name of a host's namespace; the switch's without `host`."""
    return f"dsr-{cluster_id}" + (f"-{host}" if host else "")


def build(cluster_id: str, hosts) -> None:
    """Namespaces, the switch and the links of `hosts` (spec.Host), with their rates."""
    switch = namespace(cluster_id)
    names = [namespace(cluster_id, host.name) for host in hosts]
    _ip([f"netns add {name}" for name in (switch, *names)])
    for name in (switch, *names):
        _prepare(name)
    commands = ["link set lo up", "link add br0 type bridge", f"link set br0 mtu {_MTU} up"]
    for index, name in enumerate(names):
        commands += [
            f"link add h{index} mtu {_MTU} type veth peer name {INTERFACE} mtu {_MTU} netns {name}",
            f"link set h{index} master br0 up",
        ]
    _ip([*commands, f"addr add {SWITCH_ADDRESS}/24 dev br0"], switch)
    for index, (host, name) in enumerate(zip(hosts, names, strict=True)):
        _ip(["link set lo up", f"addr add {address(index)}/24 dev {INTERFACE}", f"link set {INTERFACE} up"], name)
        set_up(cluster_id, host.name, host.link.up)
        set_down(cluster_id, index, host.link.down)


def set_up(cluster_id: str, host: str, rate: float | None) -> None:
    """Rate in bit/s from the host; None is unlimited."""
    _shape(namespace(cluster_id, host), INTERFACE, rate)


def set_down(cluster_id: str, index: int, rate: float | None) -> None:
    """Rate in bit/s to the host of that index; None is unlimited."""
    _shape(namespace(cluster_id), f"h{index}", rate)


def link_bytes(cluster_id: str, host: str) -> tuple[int, int]:
    """(sent, received) by the host's interface so far."""
    text = _run(["ip", "-n", namespace(cluster_id, host), "-j", "-s", "link", "show", INTERFACE])
    counters = json.loads(text)[0]["stats64"]
    return counters["tx"]["bytes"], counters["rx"]["bytes"]


def remove(cluster_id: str) -> None:
    """Remove the namespaces; interfaces and queues go with them."""
    for name in (namespace(cluster_id), *(path.name for path in _NAMESPACES.glob(f"{namespace(cluster_id)}-*"))):
        if (_NAMESPACES / name).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter(name: str) -> list[str]:
    """Command prefix: runs the rest of the command line in that network namespace."""
    return ["nsenter", f"--net={_NAMESPACES / name}"]


def _prepare(name: str) -> None:
    """No IPv6; and the congestion control that kernels come with, so that a step takes the same time on every machine."""
    settings = (
        ("ipv6/conf/all/disable_ipv6", 1),
        ("ipv6/conf/default/disable_ipv6", 1),
        ("ipv4/tcp_congestion_control", "cubic"),
    )
    script = "; ".join(f"echo {value} > /proc/sys/net/{key}" for key, value in settings)
    subprocess.run([*enter(name), "sh", "-c", script], capture_output=True)  # a kernel without one keeps what it has


def _shape(name: str, interface: str, rate: float | None) -> None:
    """A token bucket that lets through no more than 2 ms of the rate at once: small messages pay for the link too."""
    if rate is None:
        command = ["tc", "-n", name, "qdisc", "del", "dev", interface, "root"]
        subprocess.run(command, capture_output=True)  # fails where there is no limit
        _ip([f"link set {interface} gso_max_size {_GSO_LARGEST}"], name)
        return
    burst = int(min(max(rate / 8 * _BURST_SECONDS, 20_000), 256_000))
    # Packets larger than the bucket would be cut up in the queue, which costs CPU time.
    _ip([f"link set {interface} gso_max_size {min(_GSO_LARGEST, burst - 2_000)}"], name)
    limit = int(rate / 8 * _QUEUE_SECONDS) + burst
    options = ["rate", f"{round(rate)}bit", "burst", f"{burst}b", "limit", f"{limit}b"]
    _run(["tc", "-n", name, "qdisc", "replace", "dev", interface, "root", "tbf", *options])


def _ip(commands: list[str], name: str | None = None) -> None:
    _run(["ip", *(["-n", name] if name else []), "-batch", "-"], "\n".join(commands) + "\n")


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"`{' '.join(command)}` failed: {reason}; this needs the rights of root on the machine (or --loopback)"
        )
    return done.stdout
