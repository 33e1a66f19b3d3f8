"""What one does to the running clusters of this user from another terminal."""

from ds_recsys.errors import UserError
from ds_recsys.simulation import state
from ds_recsys.simulation.cluster import Cluster
from ds_recsys.simulation.presets import PRESETS
from ds_recsys.simulation.teardown import remove_abandoned
from ds_recsys.simulation.units import format_rate, parse_rate


def change(cluster_id: str, host: str, link=None, up=None, down=None, device=None, speed=None) -> str:
    """Set a link's rates (texts such as "60mbit" or "none"), a device's speed, or both; says what the host has now.

    Raises:
        UserError: nothing to change, an unknown cluster, host or device, or a value out of range.
    """
    if (device is None) != (speed is None):
        raise UserError("--device and --speed go together")
    if link is not None and (up is not None or down is not None):
        raise UserError("--link sets both directions: give it, or --up and --down")
    rates = {"up": up or link, "down": down or link}
    rates = {way: _rate(text, f"--{way}") for way, text in rates.items() if text is not None}
    if not rates and device is None:
        raise UserError("nothing to change: give --link, --up, --down, or --device with --speed")
    cluster = Cluster.attach(cluster_id)
    if rates:
        cluster.set_link(host, **rates)
    if device is not None:
        cluster.set_speed(host, device, speed)
    return next(_words(one, cluster.loopback) for one in state.load(cluster_id)["spec"]["hosts"] if one["name"] == host)


def send(cluster_id: str, rank: int, name: str) -> str:
    """Stop, continue or kill a rank; says so."""
    Cluster.attach(cluster_id).signal(rank, name)
    return f"cluster {cluster_id}: rank {rank}: {name}"


def table() -> str:
    """Each cluster with its owner, its command, and its hosts as they are set now."""
    blocks = []
    for cluster_id in state.ids():
        found = state.load(cluster_id)
        dead = "" if state.alive(found["owner"]) else ", dead: `cluster.py clean` removes it"
        lines = [f"{cluster_id}  process {found['owner']['pid']}{dead}  {found['command']}"]
        lines += [f"  {_words(host, found['loopback'])}" for host in found["spec"]["hosts"]]
        blocks.append("\n".join(lines))
    return "\n".join(blocks) or "no cluster"


def clean() -> str:
    """Remove what clusters of dead owners left; says which."""
    with state.locked():
        removed = remove_abandoned()
    return f"removed {', '.join(removed)}" if removed else "nothing to remove"


def presets() -> str:
    return "\n".join(preset.describe() for preset in PRESETS.values())


def _rate(text: str, where: str) -> float | None:
    return None if text == "none" else parse_rate(text, where)


def _words(host: dict, loopback: bool) -> str:
    link = host["link"]
    rates = "loopback" if loopback else f"up {format_rate(link['up'])}, down {format_rate(link['down'])}"
    return f"{host['name']}: {rates}; device speeds {', '.join(f'{speed:g}' for speed in host['speed'])}"
