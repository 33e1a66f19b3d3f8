"""The arms of a comparison on a simulated cluster: jobs that stay up and take turns.

Each is a world of its own under the deepspeed launcher on the same devices; the idle ones wait without computing.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from benchmarks.mailbox import Mailbox, check

_SCRIPT = Path(__file__).with_name("arm.py")
_START_SECONDS, _STEP_SECONDS = 600.0, 600.0  # the ranks of all arms start at once


class Arms:
    """Use as a context; leaving it ends the jobs.

    Args:
        cluster: `ds_recsys.simulation.Cluster`, entered.
        folder: for requests, answers and logs.
        config: ds_config that the arms' settings change.
        label: names the comparison in files.
    """

    def __init__(self, cluster, folder: Path, config: Path, label: str):
        self.cluster, self.label, self._folder, self._config = cluster, label, folder, config
        self._jobs, self._mail, self._started = {}, {}, 0

    @property
    def names(self) -> list[str]:
        return list(self._jobs)

    def start(self, name: str, engine: str, settings: dict) -> None:
        """Begin to start an arm; `engine` as arm.py has it, `settings` are dotted keys over the config."""
        self._started += 1
        folder = self._folder / f"arm{self._started}"
        folder.mkdir(parents=True)
        spec = {"engine": engine, "config": str(self._config), "settings": settings}
        (folder / "arm.json").write_text(json.dumps(spec))
        job = self.cluster.start([str(_SCRIPT), str(folder)], log_dir=folder / "logs", stream=False)
        self._jobs[name] = job
        self._mail[name] = Mailbox(folder, self.cluster.spec.world_size, self._watch(name))

    def measure(
        self,
        name: str,
        micro_batches: int,
        steps: int = 1,
        alone: bool = False,
        timeline: bool = True,
        trace: str | None = None,
        warmup: int = 0,
    ) -> dict:
        """Training steps: mean seconds and CPU seconds of one, its split averaged over the ranks, busy share, bytes sent.

        Alone, also the seconds of each rank.

        Raises:
            UserError: the arm's job has ended; with the last line of each rank's log.
        """
        request = {"micro_batches": micro_batches, "warmup": warmup, "steps": steps, "alone": alone}
        before = self.cluster.link_bytes()
        answers = self._mail[name].ask({**request, "timeline": timeline, "trace": trace}, steps * _STEP_SECONDS)
        after = self.cluster.link_bytes()
        result = {
            "seconds": (mean if alone else max)(mean(answer["seconds"]) for answer in answers),
            "cpu_seconds": mean(answer["cpu_seconds"] for answer in answers) / steps,
            "loss": answers[-1]["losses"][-1],
            "parameters": max(answer["parameters"] for answer in answers),
            "sent_bytes": {host: after[host][0] - before[host][0] for host in after},
        }
        if alone:
            result["rank_seconds"] = [mean(answer["seconds"]) for answer in answers]
        splits = [split for answer in answers for split in answer.get("split", ())]
        if splits:
            result["split"] = {kind: mean(split[kind] for split in splits) for kind in splits[0]}
            result["busy"] = mean(split["compute"] / sum(split.values()) for split in splits)
        return result

    def ready(self, micro_batches: list[int], names: list[str] | None = None, steps: int = 1) -> None:
        """Wait until every arm, or those named, has made its engine, and warm each up with steps of each kind."""
        for name in names or self.names:
            for m in micro_batches:
                self._mail[name].ask({"micro_batches": m, "warmup": steps, "steps": 0, "alone": False}, _START_SECONDS)

    @contextlib.contextmanager
    def in_haste(self):
        """Inside, every device has a whole core: what only starts need not take as long as on slow ones."""
        hosts = self.cluster.spec.hosts
        devices = [(host.name, device, speed) for host in hosts for device, speed in enumerate(host.speeds)]
        for host, device, _ in devices:
            self.cluster.set_speed(host, device, 1.0)
        try:
            yield
        finally:
            for host, device, speed in devices:
                self.cluster.set_speed(host, device, speed)

    def plan(self, name: str) -> dict:
        """What "parallel": "auto" came to in an arm: {"values": dotted keys, "reason": text}; waits until it is ready."""
        return self._mail[name].ask({"plan": True}, _START_SECONDS)[0]

    def stop(self, names: list[str]) -> None:
        """End these arms' jobs."""
        for name in names:
            self._jobs.pop(name).stop()
            del self._mail[name]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for job in self._jobs.values():
            job.stop()

    def _watch(self, name: str) -> Callable[[], None]:
        return lambda: check(self._jobs[name], f"the arm {name}", self.cluster.spec.world_size)
