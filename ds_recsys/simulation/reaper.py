"""A process beside a cluster's owner that tears the cluster down when the owner is killed.

It polls instead of waiting on a pipe: a pipe's end that the owner's forked children also hold would outlive the owner.
"""

import subprocess
import sys
import time
from pathlib import Path

from ds_recsys.simulation import state
from ds_recsys.simulation.teardown import teardown

_POLL_SECONDS = 0.3


def start(cluster_id: str) -> subprocess.Popen:
    """In a session of its own, which no Ctrl-C reaches; it ends by itself soon after the cluster is gone."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[0] = {str(root)!r}; from {__name__} import watch; watch({cluster_id!r})",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def watch(cluster_id: str) -> None:
    while state.owner_alive(cluster_id):
        time.sleep(_POLL_SECONDS)
    if (state.folder() / cluster_id).exists():
        teardown(cluster_id)
