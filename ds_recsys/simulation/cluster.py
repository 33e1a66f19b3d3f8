"""A simulated cluster: built on entering, gone on leaving; jobs, live changes, counters in between."""

import os
import shlex
import socket
import sys
import tempfile
from pathlib import Path

from ds_recsys.errors import UserError
from ds_recsys.simulation import calibration, cgroups, cores, launcher, network, ranks, reaper, state
from ds_recsys.simulation.job import Job
from ds_recsys.simulation.spec import ClusterSpec, check_device, check_rank, check_signal, check_speed, load_spec
from ds_recsys.simulation.teardown import group_name, launch_group_name, remove_abandoned, teardown
from ds_recsys.simulation.units import format_rate

_KEEP = object()
_PORT = 29500


class Cluster:
    """Hosts of `spec` as processes of this machine, torn down on `__exit__`, and when this process is killed.

    With `loopback` the ranks meet on 127.0.0.1, without root, link rates, device speeds, or a /dev/shm of their own.

    Raises (on entering):
        UserError: no root, no iproute2, no cpu controller; the line names what lacks.
    """

    def __init__(self, spec: ClusterSpec, loopback: bool = False):
        self.spec, self.loopback = spec, loopback
        self.id: str | None = None
        self._controller = None
        self._reaper = None
        self._cores: dict[str, list[int]] = {}
        self._jobs: list[Job] = []

    @classmethod
    def attach(cls, cluster_id: str) -> "Cluster":
        """The cluster of another process, for `set_link`, `set_speed`, `signal` and `link_bytes`; not to be entered."""
        found = state.load(cluster_id)
        cluster = cls(load_spec(found["spec"]), found["loopback"])
        cluster.id = cluster_id
        cluster._controller = None if cluster.loopback else cgroups.CpuController.find()
        return cluster

    def __enter__(self) -> "Cluster":
        self._check_machine()
        description = {"loopback": self.loopback, "spec": _as_mapping(self.spec), "command": shlex.join(sys.argv)}
        with state.locked():
            remove_abandoned()
            self._cores = {} if self.loopback else self._assign_cores()
            self.id = state.create({**description, "cores": self._cores})
        try:
            self._reaper = reaper.start(self.id)
            if not self.loopback:
                network.build(self.id, self.spec.hosts)
                self._limit_devices()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            for job in self._jobs:
                job.stop()
        finally:
            self._remove()

    def describe(self) -> str:
        """The cluster in one line."""
        sizes = ", ".join(f"{host.name} x {host.devices}" for host in self.spec.hosts)
        return f"cluster {self.id}: {self.spec.world_size} devices ({sizes})"

    def start(self, command, log_dir=None, env: dict | None = None, stream: bool = True) -> Job:
        """Start the deepspeed launcher on every host with `command`: [script.py, argument, ...].

        Args:
            log_dir: gets rank<r>.log and launcher-<host>.log; a temporary folder when None.
            env: environment variables for launchers and ranks, over this process's own.
            stream: also print what the ranks write, each line with its host and rank.
        """
        script = Path(command[0]).resolve()
        if not script.is_file():
            raise UserError(f"script {command[0]}: no such file")
        log_dir = Path(tempfile.mkdtemp(prefix="ds_recsys-logs-") if log_dir is None else log_dir).resolve()
        number = len(self._jobs) + 1
        folder = state.folder() / self.id / f"job{number}"
        folder.mkdir()
        log_dir.mkdir(parents=True, exist_ok=True)
        names = [host.name for host in self.spec.hosts]
        for stale in [log_dir / f"rank{rank}.log" for rank in range(self.spec.world_size)]:
            stale.unlink(missing_ok=True)
        places, groups, leaves = self._places(f"job{number}")
        run = [sys.executable, "-u", str(script), *map(str, command[1:])]
        description = {"command": run, "log_dir": str(log_dir), "state_dir": str(folder), "groups": groups}
        description["cores"] = self._cores or groups
        state.write_json(folder / "job.json", description)
        slots = "".join(f"{host.name} slots={host.devices}\n" for host in self.spec.hosts)
        (folder / "hostfile").write_text(slots)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + network.names(self.spec.hosts))
        job = Job(f"{self.id}.{number}", folder, log_dir, names, self.spec.world_size)
        environment = launcher.base_environment(self.id, job.name, env or {})
        master = ("127.0.0.1", _free_port()) if self.loopback else (network.address(0), _PORT + number)
        launchers = {
            place.name: launcher.start(place, index, folder, environment, master, job.launcher_log(place.name))
            for index, place in enumerate(places)
        }
        self._jobs.append(job)
        job.run(launchers, leaves, [self._action(event, job) for event in self.spec.events], stream)
        return job

    def check(self) -> list[calibration.Reading]:
        """Measure every link rate and device speed as they are set now; none in loopback mode. Takes seconds."""
        if self.loopback:
            return []
        hosts = state.load(self.id)["spec"]["hosts"]
        return calibration.check(self.id, hosts, self._device_groups(), self._cores)

    def report(self, readings: list[calibration.Reading]) -> str:
        """A table of what `check` returned."""
        if self.loopback:
            return "loopback: all ranks on 127.0.0.1; neither link rates nor device speeds are enforced"
        return calibration.report(readings)

    def set_link(self, host: str, up=_KEEP, down=_KEEP) -> None:
        """Change the rates of that host's link, in bit/s, at once; None is unlimited, a direction left out stays."""
        self.spec.host(host)
        index = [one.name for one in self.spec.hosts].index(host)
        rates = {key: rate for key, rate in (("up", up), ("down", down)) if rate is not _KEEP}
        if not self.loopback:
            if "up" in rates:
                network.set_up(self.id, host, up)
            if "down" in rates:
                network.set_down(self.id, index, down)
        self._note(index, lambda noted: noted["link"].update(rates))

    def set_speed(self, host: str, device: int, speed: float) -> None:
        """Change a device's share of a CPU core at once, for every job on it."""
        check_device(device, self.spec.host(host))
        check_speed(speed)
        index = [one.name for one in self.spec.hosts].index(host)
        if not self.loopback:
            self._controller.set_speed(self._device_groups()[host][device], speed)
        self._note(index, lambda noted: noted["speed"].__setitem__(device, speed))

    def signal(self, rank: int, name: str) -> None:
        """Stop, continue or kill that rank of every job that runs now."""
        check_rank(rank, self.spec)
        number = ranks.SIGNALS[check_signal(name)]
        folders = [path.parent for path in (state.folder() / self.id).glob("job*/job.json")]
        running = [folder for folder in folders if ranks.running(folder, rank)]
        if not running:
            raise UserError(f"cluster {self.id} has no running rank {rank}")
        for folder in running:
            ranks.send(folder, rank, number)

    def link_bytes(self) -> dict[str, tuple[int, int]]:
        """By host: (sent, received) bytes as its own interface counts them; empty in loopback mode."""
        if self.loopback:
            return {}
        return {host.name: network.link_bytes(self.id, host.name) for host in self.spec.hosts}

    def _check_machine(self) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(f"a simulated cluster needs Linux, not {sys.platform}")
        if self.loopback:
            print("loopback: link rates and device speeds are not enforced", file=sys.stderr, flush=True)
            return
        self._controller = cgroups.CpuController.find()
        lacks = network.missing() or (None if self._controller else "a cpu controller of control groups (v1 or v2)")
        if lacks:
            raise UserError(f"a simulated cluster needs {lacks}; --loopback runs without link rates and device speeds")
        asked, available = sum(sum(host.speeds) for host in self.spec.hosts), len(os.sched_getaffinity(0))
        if asked > available:
            words = f"the devices' speeds add up to {asked:g} cores and this machine has {available}"
            print(f"warning: {words}; busy together, they will be slower", file=sys.stderr, flush=True)

    def _remove(self) -> None:
        teardown(self.id)
        if self._reaper:  # until here it watches, should this process be killed on the way
            self._reaper.kill()
            self._reaper.wait()

    def _limit_devices(self) -> None:
        self._controller.prefer(self._controller.create(self._controller.root / group_name(self.id)))
        for host in self.spec.hosts:
            self._controller.create(self._controller.root / launch_group_name(self.id) / host.name)
            for group, speed in zip(self._device_groups()[host.name], host.speeds, strict=True):
                self._controller.create(group)
                self._controller.set_speed(group, speed)

    def _assign_cores(self) -> dict[str, list[int]]:
        """Core of every device, by host."""
        chosen = iter(cores.assign([speed for host in self.spec.hosts for speed in host.speeds], cores.load()))
        return {host.name: [next(chosen) for _ in host.speeds] for host in self.spec.hosts}

    def _device_groups(self) -> dict[str, list[Path]]:
        root = self._controller.root / group_name(self.id)
        return {host.name: [root / f"{host.name}-device{d}" for d in range(host.devices)] for host in self.spec.hosts}

    def _places(self, job: str):
        """(place of each host's launcher, cgroup.procs of each device by host, the job's own cgroups)."""
        if self.loopback:
            places = [launcher.HostPlace(host.name, None, None, "lo") for host in self.spec.hosts]
            return places, {host.name: [None] * host.devices for host in self.spec.hosts}, []
        places, files, leaves = [], {}, []
        launchers = self._controller.root / launch_group_name(self.id)
        for name, devices in self._device_groups().items():
            own, *mine = (cgroups.leaf(group, job) for group in (launchers / name, *devices))
            namespace = network.namespace(self.id, name)
            places.append(launcher.HostPlace(name, namespace, own / "cgroup.procs", network.INTERFACE))
            files[name] = [str(leaf / "cgroup.procs") for leaf in mine]
            leaves += [own, *mine]
        return places, files, leaves

    def _action(self, event, job: Job):
        """(seconds, function, words) of a timed event."""
        if event.link is not None:
            up, down = event.link.up, event.link.down
            words = f"link of {event.host}: up {format_rate(up)}, down {format_rate(down)}"
            return event.after, lambda: self.set_link(event.host, up, down), words
        if event.speed is not None:
            words = f"device {event.device} of {event.host}: speed {event.speed:g}"
            return event.after, lambda: self.set_speed(event.host, event.device, event.speed), words
        number = ranks.SIGNALS[event.signal]
        return event.after, lambda: job.signal(event.rank, number), f"rank {event.rank}: {event.signal}"

    def _note(self, host_index: int, change) -> None:
        with state.locked():
            found = state.load(self.id)
            change(found["spec"]["hosts"][host_index])
            state.save(self.id, found)


def _as_mapping(spec: ClusterSpec) -> dict:
    """`spec` as `load_spec` takes it, without events."""
    return {
        "hosts": [
            {
                "name": host.name,
                "devices": host.devices,
                "speed": list(host.speeds),
                "link": {"up": host.link.up, "down": host.link.down},
            }
            for host in spec.hosts
        ]
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
