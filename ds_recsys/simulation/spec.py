"""The cluster file: hosts, devices, speeds, links and timed events, checked before anything is built."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ds_recsys.errors import UserError
from ds_recsys.simulation.presets import PRESETS
from ds_recsys.simulation.units import parse_rate

SIGNALS = ("stop", "continue", "kill")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,29}[a-z0-9])?")
_MOST_HOSTS = 250  # one /24


@dataclass(frozen=True)
class Link:
    """Rates of a host's link in bit/s, from the host (`up`) and to it (`down`); None is unlimited."""

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True)
class Host:
    """`speeds` holds one share of a CPU core per device, 0.01 to 1."""

    name: str
    speeds: tuple[float, ...]
    link: Link = Link()

    @property
    def devices(self) -> int:
        return len(self.speeds)


@dataclass(frozen=True)
class Event:
    """A change `after` that many seconds from the start of a job: of a host's link, a device's speed, or a rank's life."""

    after: float
    host: str | None = None
    link: Link | None = None
    device: int | None = None
    speed: float | None = None
    rank: int | None = None
    signal: str | None = None


@dataclass(frozen=True)
class ClusterSpec:
    hosts: tuple[Host, ...]
    events: tuple[Event, ...] = ()

    @property
    def world_size(self) -> int:
        return sum(host.devices for host in self.hosts)

    @property
    def ranks(self) -> tuple[tuple[Host, int], ...]:
        """(host, device) of every rank, as the deepspeed launcher numbers them: LOCAL_RANK is rank modulo devices."""
        places, rank = [], 0
        for host in self.hosts:
            for _ in range(host.devices):
                places.append((host, rank % host.devices))
                rank += 1
        return tuple(places)

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise UserError(f"no host is called {name!r}; there are {', '.join(host.name for host in self.hosts)}")


def load_spec(source) -> ClusterSpec:
    """`source`: a YAML or JSON file, or the mapping that one holds.

    Raises:
        UserError: not readable, an unknown key, a value out of range; the line names the place.
    """
    if isinstance(source, dict):
        return _spec(source, "cluster")
    return _spec(_read(Path(source)), str(source))


def _read(path: Path):
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cluster file {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cluster file {path}: {' '.join(str(error).split())}") from None


def _spec(data, where: str) -> ClusterSpec:
    _keys(data, where, {"hosts", "link", "events"})
    groups = _list(data.get("hosts"), f"{where}: hosts")
    if not groups:
        raise UserError(f"{where}: hosts: name at least one, such as hosts: [{{count: 2, devices: 1, speed: 0.5}}]")
    drafts = []
    for index, group in enumerate(groups):
        drafts += _group(group, f"{where}: hosts[{index}]", len(drafts))
    world_size = sum(len(speeds) for _, speeds, _ in drafts)
    default = _link(data.get("link"), f"{where}: link", world_size)
    hosts = tuple(
        Host(name, speeds, default if given is None else _link(given[0], given[1], world_size))
        for name, speeds, given in drafts
    )
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: hosts: the name {name} is used twice")
    if len(hosts) > _MOST_HOSTS:
        raise UserError(f"{where}: hosts: {len(hosts)} of them; at most {_MOST_HOSTS}")
    spec = ClusterSpec(hosts)
    events = [
        _event(event, f"{where}: events[{index}]", spec)
        for index, event in enumerate(_list(data.get("events"), f"{where}: events"))
    ]
    return ClusterSpec(hosts, tuple(sorted(events, key=lambda event: event.after)))


def _group(group, where: str, first: int) -> list:
    """[(name, speeds, (link, where) or None)] of one entry of `hosts`."""
    _keys(group, where, {"count", "name", "devices", "speed", "link"})
    count = _whole(group.get("count", 1), f"{where}.count", 1)
    devices = _whole(group.get("devices", 1), f"{where}.devices", 1)
    speed = group.get("speed", 1.0)
    speeds = [speed] * devices if not isinstance(speed, list) else speed
    if len(speeds) != devices:
        raise UserError(f"{where}.speed: {len(speeds)} speeds for {devices} devices; give one for each, or one for all")
    speeds = tuple(check_speed(value, f"{where}.speed") for value in speeds)
    name = str(group.get("name", "host"))
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}.name: {name!r}; use small letters, digits and dashes, at most 31")
    if "name" not in group:
        names = [f"host{first + index}" for index in range(count)]
    else:
        names = [name] if count == 1 else [f"{name}{index}" for index in range(count)]
    link = (group["link"], f"{where}.link") if "link" in group else None
    return [(name, speeds, link) for name in names]


def _link(value, where: str, world_size: int) -> Link:
    if value is None:
        return Link()
    if not isinstance(value, dict):
        rate = parse_rate(value, where)
        return Link(rate, rate)
    if "preset" in value:
        rate = _preset_rate(value, where, world_size)
        return Link(rate, rate)
    _keys(value, where, {"up", "down"})
    if value.keys() != {"up", "down"}:
        raise UserError(f"{where}: give both up and down (null is unlimited)")
    up, down = (None if value[key] is None else parse_rate(value[key], f"{where}.{key}") for key in ("up", "down"))
    return Link(up, down)


def _preset_rate(value: dict, where: str, world_size: int) -> float:
    _keys(value, where, {"preset", "gradient_bytes", "compute_seconds"})
    preset = PRESETS.get(value["preset"])
    if preset is None:
        raise UserError(f"{where}.preset: no {value['preset']!r}; there are {', '.join(PRESETS)}")
    figures = []
    for key in ("gradient_bytes", "compute_seconds"):
        if key not in value:
            raise UserError(f"{where}: a preset needs gradient_bytes and compute_seconds of the simulated step")
        figures.append(_number(value[key], f"{where}.{key}"))
        if figures[-1] <= 0:
            raise UserError(f"{where}.{key}: {value[key]!r} is not above 0")
    return parse_rate(preset.rate(*figures, world_size), where)


def _event(value, where: str, spec: ClusterSpec) -> Event:
    _keys(value, where, {"after", "host", "link", "device", "speed", "rank", "signal"})
    kinds = {
        frozenset({"after", "host", "link"}),
        frozenset({"after", "host", "device", "speed"}),
        frozenset({"after", "rank", "signal"}),
    }
    if frozenset(value) not in kinds:
        raise UserError(f"{where}: give after with host + link, host + device + speed, or rank + signal")
    fields = {"after": _number(value["after"], f"{where}.after")}
    if fields["after"] < 0:
        raise UserError(f"{where}.after: {value['after']!r} is below 0")
    if "rank" in value:
        fields["rank"] = check_rank(_whole(value["rank"], f"{where}.rank", 0), spec, f"{where}.rank")
        fields["signal"] = check_signal(value["signal"], f"{where}.signal")
        return Event(**fields)
    try:
        host = spec.host(value["host"])
    except UserError as error:
        raise UserError(f"{where}.host: {error}") from None
    fields["host"] = host.name
    if "link" in value:
        return Event(**fields, link=_link(value["link"], f"{where}.link", spec.world_size))
    fields["device"] = check_device(_whole(value["device"], f"{where}.device", 0), host, f"{where}.device")
    return Event(**fields, speed=check_speed(value["speed"], f"{where}.speed"))


def check_speed(value, where: str = "speed") -> float:
    """`value` as a share of one core. Above 1 is refused: a rank computes with one thread, which no second core speeds up."""
    speed = _number(value, where)
    if not 0.01 <= speed <= 1:
        raise UserError(f"{where}: {value!r}; a device's speed is a share of one CPU core, 0.01 to 1")
    return speed


def check_device(device: int, host: Host, where: str = "device") -> int:
    if not 0 <= device < host.devices:
        raise UserError(f"{where}: {host.name} has devices 0 to {host.devices - 1}, not {device}")
    return device


def check_rank(rank: int, spec: ClusterSpec, where: str = "rank") -> int:
    if not 0 <= rank < spec.world_size:
        raise UserError(f"{where}: there are ranks 0 to {spec.world_size - 1}, not {rank}")
    return rank


def check_signal(name, where: str = "signal") -> str:
    if name not in SIGNALS:
        raise UserError(f"{where}: {name!r}; a rank takes {', '.join(SIGNALS)}")
    return name


def _keys(value, where: str, known: set) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping with {', '.join(sorted(known))}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; there are {', '.join(sorted(known))}")


def _list(value, where: str) -> list:
    if value is None or isinstance(value, list):
        return value or []
    raise UserError(f"{where}: expected a list")


def _number(value, where: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)  # YAML reads 27e6 as a text
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or number in (float("inf"), float("-inf")):
        raise UserError(f"{where}: {value!r} is no number")
    return number


def _whole(value, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {value!r}; expected a whole number, {least} or more")
    return value
