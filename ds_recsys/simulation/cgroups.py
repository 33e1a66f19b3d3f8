"""CPU quotas of devices and the lists of their processes: control groups, version 1 or 2.

https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/scheduler/sched-bwc.html
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from ds_recsys.errors import UserError

_PERIOD_US = 10_000
_LEAST_QUOTA_US = 1_000  # the kernel refuses less


@dataclass(frozen=True)
class CpuController:
    """Where the cpu controller is mounted, and its version; every path below is a folder under `root`."""

    root: Path
    version: int

    @classmethod
    def find(cls, mounts: Path = Path("/proc/mounts")) -> "CpuController | None":
        """The one of this machine, None without: version 1 where cpu is mounted so, else version 2."""
        rows = [line.split() for line in Path(mounts).read_text().splitlines()]
        for _, where, kind, options, *_ in rows:
            if kind == "cgroup" and "cpu" in options.split(","):
                return cls(_unescape(where), 1)
        for _, where, kind, *_ in rows:
            controllers = _unescape(where) / "cgroup.controllers"
            if kind == "cgroup2" and controllers.is_file() and "cpu" in controllers.read_text().split():
                return cls(_unescape(where), 2)
        return None

    def create(self, path: Path) -> Path:
        """Make the group, below `root`, and its parents; the cpu controller is then at work in it."""
        made = self.root
        for part in path.relative_to(self.root).parts:
            if self.version == 2:
                self._enable(made)
            made = made / part
            made.mkdir(exist_ok=True)
        return path

    def prefer(self, path: Path) -> None:
        """Let the processes below `path` go before the machine's others: a device has its speed beside other work too."""
        name, most = ("cpu.weight", 10_000) if self.version == 2 else ("cpu.shares", 262_144)
        write(path / name, str(most))

    def set_speed(self, path: Path, cores: float) -> None:
        """Let the processes below `path` use `cores` of CPU time per second, together; at 1 their core alone is the limit."""
        period, quota = quota_us(cores)
        if self.version == 2:
            return write(path / "cpu.max", f"{quota} {period}" if cores < 1 else f"max {period}")
        write(path / "cpu.cfs_quota_us", "-1")  # first, so that no order of the two is refused
        write(path / "cpu.cfs_period_us", str(period))
        if cores < 1:
            write(path / "cpu.cfs_quota_us", str(quota))

    def _enable(self, path: Path) -> None:
        control = path / "cgroup.subtree_control"
        if "cpu" in control.read_text().split():
            return
        try:
            write(control, "+cpu")
        except OSError as error:
            raise UserError(
                f"the cpu controller cannot be switched on in {control} ({error.strerror}): move the processes of that group "
                "into a group below it, or start with --loopback"
            ) from None


def quota_us(cores: float) -> tuple[int, int]:
    """(period, quota) in microseconds: 10 ms, and longer for a speed whose quota would be below the kernel's least."""
    period = max(_PERIOD_US, round(_LEAST_QUOTA_US / cores))
    return period, max(_LEAST_QUOTA_US, round(cores * period))


def write(path: Path, text: str) -> None:
    """In a single call, which is what these files ask for."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def leaf(parent: Path, name: str) -> Path:
    """A group for processes below `parent`, which then must hold none itself (a rule of version 2)."""
    (parent / name).mkdir(exist_ok=True)
    return parent / name


def pids(path: Path) -> set[int]:
    """Processes in `path` and below; empty when it is gone."""
    found = set()
    for folder, _, _ in os.walk(path):
        try:
            found.update(map(int, (Path(folder) / "cgroup.procs").read_text().split()))
        except OSError:
            pass
    return found


def remove(path: Path, seconds: float = 5.0) -> None:
    """Remove `path` and what is below; a group stays busy for a moment after its last process died."""
    deadline = time.monotonic() + seconds
    for folder, _, _ in os.walk(path, topdown=False):
        while True:
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                pass
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
            break


def _unescape(path: str) -> Path:
    return Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path))
