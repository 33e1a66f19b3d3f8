"""The communication part of bench.py compression: all-reduces of the same values over simulated links, in turns."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.compression_methods import AUTO, HIERARCHY, OURS, rounds
from benchmarks.mailbox import Mailbox
from benchmarks.repeats import interleaved
from ds_recsys.errors import UserError

LINKS = {"100mbit": 1e8, "1gbit": 1e9, "10gbit": 1e10, "loopback": None}  # bit/s; 127.0.0.1 has no limit
FAST = ("10gbit", "loopback")
TOPOLOGIES = {"4x1": (4, 1), "2x2": (2, 2)}  # hosts, devices on each
_SCRIPT = Path(__file__).with_name("compression_rank.py")
_SECONDS = 900.0  # for an answer; PowerSGD's first backwards are dense
_FAST_REPEATS = 3  # times as many where a run takes a fraction of a second


def kernels(values: int, repeats: int) -> Iterator[dict]:
    """Rows of kind "kernel": encoding with error feedback on one core of this machine, nothing beside it."""
    from ds_recsys.comm.compressors import compressor
    from ds_recsys.comm.kernels import throughput

    for repeat in range(repeats):
        for method in ("int8", "int4", "int4_rotated", "sign", "topk", "topk_int8"):
            speed = throughput(compressor(**OURS[method]), values, 3)
            yield {"kind": "kernel", "method": method, "values": values, "repeat": repeat, "gb_per_s": speed}


def communication(options) -> Iterator[dict]:
    """Rows of kind "calibration", "check" (is the sum right?) and "run" (one all-reduce)."""
    links = [link for link in options.links if link != "loopback"]
    if links:
        yield from _topology("4x1", links, options)
    if "loopback" in options.links:
        yield from _topology("4x1", ["loopback"], options)
    if "2x2" in options.topologies:
        yield from _topology("2x2", ["1gbit"], options)


def _topology(topology: str, links: list[str], options) -> Iterator[dict]:
    from ds_recsys.simulation import Cluster, load_spec

    hosts, devices = TOPOLOGIES[topology]
    spec = load_spec({"hosts": [{"count": hosts, "devices": devices, "speed": options.speed}]})
    methods = rounds(list(HIERARCHY) if topology == "2x2" else options.methods)
    with (
        Cluster(spec, loopback=links == ["loopback"]) as cluster,
        tempfile.TemporaryDirectory() as folder,
    ):
        job = _Job(cluster, Path(folder), {"values": options.values})
        for link in links:
            yield from _calibration(cluster, topology, link, options)
            for number, names in enumerate(methods):
                label = f"{topology} {link}, group {number + 1} of {len(methods)}"
                for row in _group(cluster, job, LINKS[link], names, _repeats(link, options), label):
                    yield {"topology": topology, "link": link, "group": number, "speed": options.speed, **row}


def _repeats(link: str, options) -> int:
    return options.repeats * (_FAST_REPEATS if link in FAST and not options.quick else 1)


def _calibration(cluster, topology: str, link: str, options) -> Iterator[dict]:
    if link == "loopback" or options.quick:
        return
    _set_links(cluster, LINKS[link])
    readings = cluster.check()
    print(f"\n{topology} at {link}\n{cluster.report(readings)}", flush=True)
    for reading in readings:
        place = {"kind": "calibration", "topology": topology, "link": link, "what": reading.what}
        yield {**place, "expected": reading.expected, "measured": reading.measured}


def _group(cluster, job: "_Job", rate: float | None, names: list[str], repeats: int, label: str) -> Iterator[dict]:
    """Make and check the arms over unlimited links (but "auto", which shall see the link), then time them in turns."""
    made = []
    for name in sorted(names, key=lambda name: name == AUTO):
        _set_links(cluster, rate if name == AUTO else None)
        try:
            yield {"kind": "check", "method": name, **job.make(name)}
            made.append(name)
        except WrongResult as error:
            yield {"kind": "check", "method": name, "error": str(error)}
    _set_links(cluster, rate)
    turns = {name: lambda name=name: job.run(name, rate) for name in names if name in made}
    for row in interleaved(turns, repeats, progress=label):
        yield {"kind": "run", "method": row.pop("arm"), **row}
    job.drop()


def _set_links(cluster, rate: float | None) -> None:
    for host in cluster.spec.hosts:
        cluster.set_link(host.name, up=rate, down=rate)


class WrongResult(RuntimeError):
    """An all-reduce that is not what it should be."""


class _Job:
    """compression_rank.py on every device of a cluster."""

    def __init__(self, cluster, folder: Path, job: dict):
        (folder / "job.json").write_text(json.dumps(job))
        self._cluster = cluster
        self._job = cluster.start([str(_SCRIPT), str(folder)], log_dir=folder / "logs", stream=False)
        self._mail = Mailbox(folder, cluster.spec.world_size, self._alive)

    def make(self, method: str) -> dict:
        """The arm's error, what is expected of it, and what "auto" chose.

        Raises:
            WrongResult: too large an error, or a result that is not the same on all ranks.
        """
        options = {**OURS, **HIERARCHY}.get(method, {})
        answers = self._ask({"do": "make", "method": method, "options": options})
        wrong = [f"rank {rank}: {answer['wrong']}" for rank, answer in enumerate(answers) if "wrong" in answer]
        if wrong:
            raise WrongResult(wrong[0])
        if len({answer["bits"] for answer in answers}) > 1:
            raise WrongResult(f"{method}: the ranks' results differ")
        return {key: answers[0][key] for key in ("relative_error", "expected_error", "limit", "choice")}

    def run(self, method: str, rate: float | None) -> dict:
        """One all-reduce: seconds of the slowest rank; bytes, of the busiest host, and what they take on the wire alone.

        The bytes are those of the payload where ranks have a link each and know it, else what the interface counted.
        """
        before = self._cluster.link_bytes()
        answers = self._ask({"do": "run", "method": method})
        after = self._cluster.link_bytes()
        seconds = max(answer["seconds"] for answer in answers)
        counted = max((after[host][0] - before[host][0] for host in after), default=None)
        payload = max(answer["bytes"] for answer in answers) or None
        shared = any(host.devices > 1 for host in self._cluster.spec.hosts)
        sent = counted if shared and counted else payload or counted
        wire = sent * 8 / rate if sent and rate else None
        return {
            "seconds": seconds,
            "bytes": sent,
            "interface_bytes": counted,
            "wire_seconds": wire,
            "wire_fraction": wire and wire / seconds,
        }

    def drop(self) -> None:
        """Let go of all arms."""
        self._ask({"do": "drop"})

    def _ask(self, request: dict) -> list[dict]:
        return self._mail.ask(request, _SECONDS)

    def _alive(self) -> None:
        if (status := self._job.poll()) is not None:
            logs = [self._job.log(rank) for rank in range(self._cluster.spec.world_size)]
            ends = [log.read_text(errors="replace").strip().splitlines()[-1:] for log in logs if log.exists()]
            raise UserError(f"the ranks ended with status {status}: {ends}")
