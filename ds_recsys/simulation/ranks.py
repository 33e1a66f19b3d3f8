"""The records that ranks leave in their job's folder, and signals to a rank."""

import json
import os
import signal
from pathlib import Path

from ds_recsys.errors import UserError
from ds_recsys.simulation import state

SIGNALS = {"stop": signal.SIGSTOP, "continue": signal.SIGCONT, "kill": signal.SIGKILL}


def records(folder: Path) -> dict[int, dict]:
    """By rank: host, device, pid; with status (negative: a signal) and ended (monotonic seconds) once it has ended."""
    found = {}
    for path in folder.glob("rank*.json"):
        try:
            record = json.loads(path.read_text())
        except OSError:
            continue  # the job ended meanwhile
        found[record["rank"]] = record
    return found


def send(folder: Path, rank: int, number: int) -> None:
    """Signal the process of `rank`, all its threads.

    Raises:
        UserError: it has not started yet, or has ended.
    """
    if rank not in records(folder):
        raise UserError(f"rank {rank} has not started yet")
    if not (record := running(folder, rank)):
        raise UserError(f"rank {rank} has ended")
    os.kill(record["pid"], number)


def running(folder: Path, rank: int) -> dict | None:
    """The record of that rank while its process runs."""
    record = records(folder).get(rank)
    return record if record and "status" not in record and state.alive(record) else None


def ending(record: dict) -> str:
    """How that rank ended, in words."""
    status = record["status"]
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
