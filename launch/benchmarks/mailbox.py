"""Requests and answers between a benchmark and the ranks of a job, as JSON files in a folder.

A job that stays up between measurements takes them in any order, so that the arms of a comparison alternate and none
pays its start again. The hosts of a simulated cluster share the machine's files.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_recsys.errors import UserError

_POLL_SECONDS, _IDLE_POLL_SECONDS = 0.05, 0.5


class Mailbox:
    """The benchmark's side: `ask` puts one request to all `ranks` ranks and collects their answers.

    Args:
        alive: called while waiting; raises when the job has ended.
    """

    def __init__(self, folder: Path, ranks: int, alive: Callable[[], None]):
        self.folder, self.ranks, self._alive, self._number = folder, ranks, alive, 0
        folder.mkdir(parents=True, exist_ok=True)

    def ask(self, request: dict, seconds: float) -> list[dict]:
        """The ranks' answers, in rank order.

        Raises:
            TimeoutError: naming the ranks that have not answered after `seconds`.
        """
        number, self._number = self._number, self._number + 1
        _write(self.folder / f"{number}.json", request)
        waiting, answers, deadline = set(range(self.ranks)), {}, time.monotonic() + seconds
        while waiting:
            for rank in sorted(waiting):
                if (path := _answer(self.folder, number, rank)).exists():
                    answers[rank] = json.loads(path.read_text())
                    waiting.discard(rank)
            if waiting:
                self._alive()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks {sorted(waiting)} have not answered {request} after {seconds:.0f} s")
                time.sleep(_POLL_SECONDS)
        return [answers[rank] for rank in range(self.ranks)]


_KILLED = 128 + 9


def check(job, name: str, ranks: int) -> None:
    """That a job of a simulated cluster is still up.

    Raises:
        UserError: it has ended; with the last line of each rank's log.
    """
    if (status := job.poll()) is None:
        return
    logs = [path.read_text(errors="replace").strip() for path in map(job.log, range(ranks)) if path.exists()]
    ends = "; ".join(f"rank {rank}: {log.splitlines()[-1]}" for rank, log in enumerate(logs) if log)
    memory = ", killed, most often for want of memory: free some, or measure fewer modes at once"
    raise UserError(f"{name} ended with status {status}{memory if status == _KILLED else ''} ({ends or 'no logs'})")


def serve(folder: Path, rank: int, answer: Callable[[dict], dict]) -> None:
    """The rank's side: `answer(request)` for each request in turn, until `{"stop": true}`."""
    for number, request in enumerate(_requests(folder)):
        if request.get("stop"):
            _write(_answer(folder, number, rank), {})
            return
        _write(_answer(folder, number, rank), answer(request))


def _requests(folder: Path) -> Iterator[dict]:
    number = 0
    while True:
        path = folder / f"{number}.json"
        pause = _POLL_SECONDS
        while not path.exists():
            time.sleep(pause)
            pause = min(1.1 * pause, _IDLE_POLL_SECONDS)  # many jobs that wait share a device with the one that runs
        yield json.loads(path.read_text())
        number += 1


def _answer(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-rank{rank}.json"


def _write(path: Path, value: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, path)  # whoever sees the name sees the whole file
