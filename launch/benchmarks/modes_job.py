"""The replicas of each arm on a simulated cluster: jobs that stay up and take turns, a window of time each."""

import contextlib
import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.mailbox import Mailbox, check

BEGAN = ".began"  # of the file that shows that a window has begun
SLOWED = 1  # the replica that is slowed down or stopped; rank 0 says when a window ends
_SCRIPT = Path(__file__).with_name("modes_rank.py")
_WARMUP = 2  # steps before each window: what an idle process has lost of its caches
_START_SECONDS, _WINDOW_SECONDS = 600.0, 300.0
_POLL_SECONDS = 0.02


class Replicas:
    """Use as a context; leaving it ends the jobs.

    Args:
        cluster: `ds_recsys.simulation.Cluster` with one device on each host, entered.
        folder: for requests, answers and logs.
        config: ds_config that the arms' settings change.
    """

    def __init__(self, cluster, folder: Path, config: Path):
        self.cluster, self._folder, self._config = cluster, folder, config
        self._jobs, self._mail, self._windows = {}, {}, 0

    def start(self, name: str, settings: dict, margin: int | None) -> None:
        """Begin to start an arm: `settings` are dotted keys over the config, `margin` as `modes_arms.margin` has it."""
        folder = self._folder / f"arm{len(self._jobs)}"
        folder.mkdir(parents=True)
        spec = {"config": str(self._config), "settings": settings, "margin": margin}
        (folder / "job.json").write_text(json.dumps(spec))
        self._jobs[name] = self.cluster.start([str(_SCRIPT), str(folder)], log_dir=folder / "logs", stream=False)
        self._mail[name] = Mailbox(folder, self.cluster.spec.world_size, self._watch(name))

    def ready(self) -> None:
        """Wait until every arm has made its engine and taken a few steps."""
        for name in self._mail:
            self._ask(name, 0.0, _START_SECONDS)

    def window(
        self, name: str, seconds: float, speeds: Sequence[float], samples_per_step: int, stopped: float = 0.0
    ) -> dict:
        """Train for a while: see `summarise`.

        Args:
            seconds: of the window.
            speeds: of the devices now.
            samples_per_step: of one replica's step.
            stopped: in the middle of it one replica is stopped for these seconds, which the window is longer for.

        Raises:
            UserError: the arm's job has ended; with the last line of each rank's log.
        """
        before = self._sent()
        with self._stop(self._mail[name].folder, seconds / 2, stopped) as interruption:
            answers = self._ask(name, seconds + stopped, _WINDOW_SECONDS + 10 * (seconds + stopped))
        sent = self._sent() - before
        row = summarise(answers, seconds + stopped, speeds, samples_per_step, sent)
        return {**row, **interruption}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for job in self._jobs.values():
            job.stop()

    def _ask(self, name: str, seconds: float, patience: float) -> list[dict]:
        self._windows += 1
        return self._mail[name].ask({"window": self._windows, "seconds": seconds, "warmup": _WARMUP}, patience)

    def _sent(self) -> int:
        """Bytes that all hosts have sent so far."""
        return sum(sent for sent, _ in self.cluster.link_bytes().values())

    @contextlib.contextmanager
    def _stop(self, folder: Path, after: float, seconds: float) -> Iterator[dict]:
        """Inside, once the next window has lasted `after` seconds, one replica is stopped for `seconds`; no time: none is.

        It is a device that stops: the idle jobs' processes on it do too.
        """
        found, over, file = {}, threading.Event(), folder / f"window{self._windows + 1}{BEGAN}"

        def run() -> None:
            while not file.exists():
                if over.wait(_POLL_SECONDS):
                    return
            if over.wait(after):
                return
            begin = time.monotonic()
            self.cluster.signal(SLOWED, "stop")
            try:
                over.wait(seconds)
            finally:
                self.cluster.signal(SLOWED, "continue")
            found["stopped_seconds"] = time.monotonic() - begin

        thread = threading.Thread(target=run)
        if seconds:
            thread.start()
        try:
            yield found
        finally:
            over.set()
            if seconds:
                thread.join()

    def _watch(self, name: str) -> Callable[[], None]:
        return lambda: check(self._jobs[name], f"the arm {name}", self.cluster.spec.world_size)


def summarise(answers: list[dict], seconds: float, speeds: Sequence[float], samples_per_step: int, sent: int) -> dict:
    """The replicas' answers to one request as the figures of a window.

    A step that ends behind the window counts by the share of it that lies before; those whose changes a replica dropped do
    not count.

    Returns:
        samples_per_s: of all replicas together; step_seconds: what a step of all of them together takes at that speed;
        steps: of each; dropped: of all; staleness: mean age in steps of the others' weights; busy: share of the steps' time in
        which a device computed, waits of the process itself included; cpu_share: of what the devices could have computed;
        compute_seconds: of a step; bytes_per_sample: sent by all hosts.
    """
    steps = [_done(answer, answer["begin"] + seconds) for answer in answers]
    dropped = sum(answer["dropped"] for answer in answers)
    samples = samples_per_step * max(sum(steps) - dropped, 0)
    sent_for = samples_per_step * sum(_WARMUP + len(answer["ends"]) for answer in answers)
    replicas = [answer for answer in answers if answer["ends"]]
    return {
        "samples_per_s": samples / seconds,
        "step_seconds": samples_per_step * len(answers) * seconds / samples if samples else None,
        "steps": [round(count, 2) for count in steps],
        "dropped": dropped,
        "staleness": mean(answer["staleness"] for answer in answers),
        "busy": mean(answer["compute_seconds"] / answer["wall_seconds"] for answer in replicas),
        "cpu_share": mean(
            answer["cpu_seconds"] / (answer["ends"][-1] - answer["begin"]) / speed
            for answer, speed in zip(answers, speeds, strict=True)
            if answer["ends"]
        ),
        "compute_seconds": mean(answer["compute_seconds"] / len(answer["ends"]) for answer in replicas),
        "bytes_per_sample": sent / sent_for,
        "parameters": answers[0]["parameters"],
    }


def _done(answer: dict, moment: float) -> float:
    """Steps that a replica had taken at a moment, with the share of the one that it was in."""
    done = bisect_right(answer["ends"], moment)
    if done == len(answer["ends"]):
        return float(done)
    start, end = [answer["begin"], *answer["ends"]][done : done + 2]
    return done + (moment - start) / (end - start)
