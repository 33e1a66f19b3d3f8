"""Find and kill every process of a cluster or of a job, whatever it did to its parents and sessions."""

import os
import signal
import time
from pathlib import Path

from ds_recsys.simulation import cgroups

CLUSTER_MARK = "DS_RECSYS_CLUSTER"  # environment variables that everything a cluster starts inherits
JOB_MARK = "DS_RECSYS_JOB"


def find(mark: str, value: str, groups: list[Path]) -> set[int]:
    """Processes in the control groups, and those of this user with `mark=value` in their environment."""
    found = set()
    for group in groups:
        found |= cgroups.pids(group)
    needle = f"{mark}={value}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if needle in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
            except OSError:
                pass  # ended meanwhile, or of another user
    return found - {os.getpid()}


def kill(mark: str, value: str, groups: list[Path], seconds: float = 10.0) -> None:
    """SIGKILL until none is found: a process may start another while it is being killed."""
    deadline = time.monotonic() + seconds
    while (found := find(mark, value, groups)) and time.monotonic() < deadline:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.02)
