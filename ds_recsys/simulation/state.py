"""What is known of the clusters on this machine: a folder each, read by other processes and by the clean-up after a crash.

`<folder>/<id>/cluster.json` holds the owner and the hosts, `<folder>/<id>/job<n>/` what a job's launchers and ranks leave.
"""

import fcntl
import json
import os
import secrets
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

from ds_recsys.errors import UserError

_FILE = "cluster.json"


def folder() -> Path:
    """Of this user; made when it is not there."""
    path = Path("/run/ds_recsys") if os.geteuid() == 0 else Path(tempfile.gettempdir()) / f"ds_recsys-{os.geteuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} belongs to someone else; set TMPDIR to a folder of your own")
    return path


@contextmanager
def locked():
    """One process at a time makes a cluster, changes a state file, or removes the clusters of dead owners."""
    descriptor = os.open(folder() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def create(description: dict) -> str:
    """Write the state of a new cluster that this process owns; its id. Call it `locked`."""
    while (folder() / (cluster_id := secrets.token_hex(3))).exists():
        pass
    path = folder() / cluster_id
    path.mkdir(mode=0o700)
    save(cluster_id, {"id": cluster_id, "owner": identity(os.getpid()), **description})
    return cluster_id


def save(cluster_id: str, description: dict) -> None:
    write_json(folder() / cluster_id / _FILE, description)


def load(cluster_id: str) -> dict:
    """The state of a cluster.

    Raises:
        UserError: there is no such cluster.
    """
    try:
        return json.loads((folder() / cluster_id / _FILE).read_text())
    except (OSError, ValueError):
        there = ", ".join(sorted(ids())) or "none"
        raise UserError(f"no cluster {cluster_id!r} is running here for this user; there are: {there}") from None


def ids() -> list[str]:
    return sorted(path.name for path in folder().iterdir() if path.is_dir())


def remove(cluster_id: str) -> None:
    shutil.rmtree(folder() / cluster_id, ignore_errors=True)


def owner_alive(cluster_id: str) -> bool:
    """False also for a folder whose maker died before it had written the state."""
    try:
        return alive(json.loads((folder() / cluster_id / _FILE).read_text())["owner"])
    except (OSError, ValueError, KeyError):
        return False


def identity(pid: int) -> dict:
    """A process that no later one with the same number is mistaken for."""
    return {"pid": pid, "started": _stat(pid)[19]}


def alive(identity: dict) -> bool:
    """Whether that process runs (a zombie does not)."""
    try:
        fields = _stat(identity["pid"])
    except OSError:
        return False
    return fields[19] == identity["started"] and fields[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the state on; number 19 of them is the start time (man 5 proc)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def write_json(path: Path, value) -> None:
    """In one step for whoever reads it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value))
    draft.rename(path)
