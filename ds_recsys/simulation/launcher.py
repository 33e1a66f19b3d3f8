"""Start the deepspeed launcher of one host, inside that host."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ds_recsys.simulation import network, processes

_PRIVATE_FILES = 'mount -t tmpfs tmpfs /dev/shm && mount --bind "$0" /etc/hosts && exec "$@"'
_ENTER_GROUP = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class HostPlace:
    """Where a host's processes run. `namespace` and `group` (a cgroup.procs file) are None in loopback mode."""

    name: str
    namespace: str | None
    group: Path | None
    interface: str


def start(place: HostPlace, node_rank: int, job: Path, environment: dict, master: tuple[str, int], log: Path):
    """`deepspeed --no_ssh --node_rank ...` as a Popen; every rank goes through rank.py with `job`/job.json.

    No --local_rank is appended to the script's arguments: scripts read LOCAL_RANK, as under torchrun.
    """
    wrapper = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rank.py")), str(job / "job.json")]
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(job / "hostfile")),
        *("--no_ssh", "--node_rank", str(node_rank), "--master_addr", master[0], "--master_port", str(master[1])),
        *("--no_python", "--no_local_rank", *wrapper),
    ]
    with open(log, "wb") as output:
        return subprocess.Popen(
            [*_inside(place, job / "hosts"), *command],
            env={**environment, "DS_RECSYS_HOST": place.name, **_interfaces(place.interface)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches the owner alone, which ends the job in order
        )


def base_environment(cluster_id: str, job_name: str, extra: dict) -> dict:
    """What launchers and ranks get: this process's environment without another launcher's ranks, the marks, `extra`."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in dropped}
    marks = {processes.CLUSTER_MARK: cluster_id, processes.JOB_MARK: job_name}
    return {**inherited, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra, **marks}


def _interfaces(interface: str) -> dict:
    return dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), interface)


def _inside(place: HostPlace, names: Path) -> list[str]:
    """Control group, network, host names, and a /dev/shm that vanishes with the job's last process on this host."""
    if place.namespace is None:
        return []
    mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _PRIVATE_FILES, str(names)]
    return ["sh", "-c", _ENTER_GROUP, str(place.group), *network.enter(place.namespace), *mounts]
