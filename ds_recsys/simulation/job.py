"""One job on a cluster: its launchers, the log of each rank, timed events, and an end that leaves no process."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from ds_recsys.errors import UserError
from ds_recsys.simulation import cgroups, logs, processes, ranks

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0  # for the other hosts to notice that a rank is gone
_STOP_SECONDS = 5.0


class Job:
    """Made by `Cluster.start`. A thread of this process watches it; the methods may be called from any thread.

    Attributes:
        failure: what failed first, in words; None while nothing has.
    """

    def __init__(self, name: str, folder: Path, log_dir: Path, hosts: list[str], world_size: int):
        self.name, self.folder, self.log_dir = name, folder, log_dir
        self.failure: str | None = None
        self._hosts, self._world_size = hosts, world_size
        self._launchers, self._groups, self._events, self._followers = {}, [], [], []
        self._status = self._thread = self._failed_at = None
        self._stopping = threading.Event()

    def run(self, launchers: dict, groups: list[Path], events: list, stream: bool) -> None:
        """Watch `launchers` (Popen by host). `events`: (seconds, function, words); `groups`: the job's own cgroups."""
        self._launchers, self._groups, self._events, self._stream = launchers, groups, list(events), stream
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name=self.name, daemon=True)
        self._thread.start()

    def poll(self) -> int | None:
        """Exit status, None while the job runs."""
        return None if self._thread.is_alive() else self._status

    def wait(self, timeout: float | None = None) -> int:
        """Exit status: 0, that of the rank that failed first (128 + the signal that ended it), or 143 after `stop`.

        Raises:
            TimeoutError: the job still runs after `timeout` seconds.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"job {self.name} still runs after {timeout} s")
        return self._status

    def stop(self) -> None:
        """End it: SIGTERM, and after 5 seconds SIGKILL. Returns when no process of it is left."""
        self._stopping.set()
        self._thread.join()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to the process of that rank, such as signal.SIGSTOP.

        Raises:
            UserError: no such rank, or it has not started, or has ended.
        """
        if not 0 <= rank < self._world_size:
            raise UserError(f"there are ranks 0 to {self._world_size - 1}, not {rank}")
        ranks.send(self.folder, rank, number)

    def log(self, rank: int) -> Path:
        """What that rank wrote to stdout and stderr."""
        return self.log_dir / f"rank{rank}.log"

    def launcher_log(self, host: str) -> Path:
        """What the deepspeed launcher of that host wrote."""
        return self.log_dir / f"launcher-{host}.log"

    def started(self) -> bool:
        """Whether every rank's process has started."""
        return len(ranks.records(self.folder)) == self._world_size

    def _watch(self) -> None:
        try:
            while any(launcher.poll() is None for launcher in self._launchers.values()):
                self._step()
                if self._stopping.is_set():
                    break
                if self._failed_at is not None and time.monotonic() - self._failed_at > _GRACE_SECONDS:
                    break
                self._stopping.wait(_POLL_SECONDS)
        finally:
            self._end()

    def _step(self) -> None:
        records = ranks.records(self.folder)
        if self._stream:
            self._follow(records)
        self._find_failure(records)
        elapsed = time.monotonic() - self._started
        while self._events and self._events[0][0] <= elapsed:
            if not self._fire(*self._events[0], records):
                break
            self._events.pop(0)

    def _fire(self, _, action, words: str, records: dict) -> bool:
        try:
            action()
        except (UserError, OSError) as error:
            if len(records) < self._world_size:
                return False  # the ranks are still starting: again in a moment
            words = f"{words}: {error}"
        print(f"[event] {time.monotonic() - self._started:.1f} s: {words}", flush=True)
        return True

    def _follow(self, records: dict, last: bool = False) -> None:
        followed = {follower.path for follower in self._followers}
        for rank, record in sorted(records.items()):
            if self.log(rank) not in followed:
                self._followers.append(logs.Follower(self.log(rank), f"[{record['host']} rank {rank}] "))
        try:
            for follower in self._followers:
                follower.step(last)
        except (OSError, ValueError):
            self._stream = False  # nobody reads the output any more; the files go on

    def _find_failure(self, records: dict) -> None:
        if self.failure is not None or self._stopping.is_set():
            return
        failed = [record for record in records.values() if record.get("status")]
        if failed:
            first = min(failed, key=lambda record: record["ended"])
            status, path = first["status"], self.log(first["rank"])
            what = f"rank {first['rank']} (device {first['device']} of {first['host']}) {ranks.ending(first)}"
            return self._fail(what, status if status > 0 else 128 - status, path)
        for host, launcher in self._launchers.items():
            if launcher.poll():
                status = launcher.returncode if launcher.returncode > 0 else 128 - launcher.returncode
                what = f"the launcher of {host} ended with exit status {launcher.returncode}"
                return self._fail(what, status, self.launcher_log(host))

    def _fail(self, what: str, status: int, path: Path) -> None:
        self._failed_at, self._status = time.monotonic(), status
        self.failure = f"{what} {self._failed_at - self._started:.1f} s after the start of the job; its log is {path}"
        lines = [f"error: {self.failure}", *(f"  | {line}" for line in logs.last_lines(path))]
        print("\n".join(lines), file=sys.stderr, flush=True)

    def _end(self) -> None:
        if self._stopping.is_set():
            self._terminate()
        processes.kill(processes.JOB_MARK, self.name, self._groups)
        for launcher in self._launchers.values():
            launcher.wait()
        records = ranks.records(self.folder)
        if self._stream:
            self._follow(records, last=True)
        self._find_failure(records)
        unfinished = [rank for rank in range(self._world_size) if "status" not in records.get(rank, {})]
        if self.failure is None and unfinished and not self._stopping.is_set():
            path = self.launcher_log(self._hosts[0])
            self._fail(f"rank {unfinished[0]} left no exit status: it was not started, or was killed", 1, path)
        if self._status is None:
            self._status = 143 if self._stopping.is_set() else 0
        for group in self._groups:
            cgroups.remove(group)

    def _terminate(self) -> None:
        for launcher in self._launchers.values():
            try:
                os.killpg(launcher.pid, signal.SIGTERM)
            except OSError:
                pass
        deadline = time.monotonic() + _STOP_SECONDS
        while processes.find(processes.JOB_MARK, self.name, self._groups) and time.monotonic() < deadline:
            for launcher in self._launchers.values():
                launcher.poll()  # so that none stays as a zombie
            time.sleep(_POLL_SECONDS)
