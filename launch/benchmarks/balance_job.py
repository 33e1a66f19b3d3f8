"""A pipeline on hosts of one device each, held by a job that stays up: other cuts and other speeds take no new start."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.mailbox import Mailbox, check
from benchmarks.repeats import interleaved

_SCRIPT = Path(__file__).with_name("balance_rank.py")
_CONFIG = Path(__file__).parents[2] / "ds_configs/baselines.json"
_START_SECONDS, _STEP_SECONDS = 300.0, 60.0
_STARTING_SPEED = 1.0  # imports and building need not take as long as on slow devices


class Pipeline:
    """Use as a context; leaving it ends the job.

    Args:
        cluster: `ds_recsys.simulation.Cluster`, entered.
        folder: for requests, answers and logs; a new one.
        settings: dotted keys over ds_configs/baselines.json.
        speeds: of the devices, as shares of a core.

    Attributes:
        facts: as the ranks' `batch` answers.
        speeds: now.
    """

    def __init__(self, cluster, folder: Path, settings: dict, speeds: Sequence[float]):
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"config": str(_CONFIG), "settings": settings}))
        self.cluster = cluster
        self.speed([_STARTING_SPEED] * len(speeds))
        self._job = cluster.start([str(_SCRIPT), str(folder)], log_dir=folder / "logs", stream=False)
        self._mail = Mailbox(folder, cluster.spec.world_size, self._alive)
        try:
            size = settings["train_micro_batch_size_per_gpu"]
            self.batch(settings["train_batch_size"] // size, size)
            self.steps(2, timeline=False)
        except BaseException:
            self._job.stop()
            raise
        self.speed(speeds)

    def speed(self, speeds: Sequence[float]) -> None:
        """Set the devices' speeds, at once."""
        for host, speed in zip(self.cluster.spec.hosts, speeds, strict=True):
            self.cluster.set_speed(host.name, 0, speed)
        self.speeds = list(speeds)

    def batch(self, micro_batches: int, micro_batch: int) -> None:
        """Micro-batches of a step and windows of each from now on."""
        self.micro_batches = micro_batches
        request = {"do": "batch", "micro_batches": micro_batches, "micro_batch": micro_batch}
        self.facts = self._ask(request, _START_SECONDS)[0]

    def cut(self, bounds: Sequence[int]) -> dict:
        """Migrate; seconds and bytes."""
        return self._ask({"do": "cut", "bounds": list(bounds)}, _STEP_SECONDS)[0]

    def steps(self, steps: int, timeline: bool = True, pattern: Sequence[bool] = (True,)) -> dict:
        """Make steps: "seconds" of each on the slowest rank, CPU seconds of each, a mean of the ranks, "moved"; with `timeline`
        the "split" of each stage and what follows from it, see `idle_share`. `pattern`: in which steps a partition looks."""
        request = {"do": "steps", "steps": steps, "timeline": timeline, "pattern": list(pattern)}
        answers = self._ask(request, _START_SECONDS + steps * _STEP_SECONDS)
        row = {
            "seconds": [max(each) for each in zip(*(answer["seconds"] for answer in answers), strict=True)],
            "moved": answers[0]["moved"],
            "cpu_seconds": [mean(each) for each in zip(*(answer["cpu_seconds"] for answer in answers), strict=True)],
        }
        if timeline:
            row["split"] = [answer["split"] for answer in answers]
            row["stage_seconds"] = [split["compute"] / self.micro_batches for split in row["split"]]
            row["idle"] = idle_share(row["split"], self.speeds, mean(row["seconds"]))
        return row

    def watch(self, method: str = "adaptive") -> None:
        """Let an `AdaptivePartition` look at the steps."""
        self._ask({"do": "watch", "method": method}, _STEP_SECONDS)

    def unwatch(self) -> dict:
        """Its records and moves."""
        return self._ask({"do": "unwatch"}, _STEP_SECONDS)[0]

    def costs(self, within: float = 0.1, most: int = 8) -> dict:
        """What the layers cost by ds_recsys's profile at the present cut, and the cuts near the best."""
        return self._ask({"do": "costs", "within": within, "most": most}, _START_SECONDS)[0]

    def reload(self, bounds: Sequence[int]) -> dict:
        """Seconds of saving, of building and of loading an engine with other bounds, of the slowest rank each."""
        answers = self._ask({"do": "reload", "bounds": list(bounds)}, _START_SECONDS)
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def compare(self, cuts: dict[str, Sequence[int]], repeats: int, steps: int, label: str) -> Iterator[dict]:
        """Steps of each cut in turns: {"cut", "bounds", "repeat", ...} as `steps` returns, "seconds" a median."""

        def arm(bounds: Sequence[int]) -> Callable[[], dict]:
            def run() -> dict:
                self.cut(bounds)
                self.steps(1, timeline=False)  # the first one after a migration allocates
                row = self.steps(steps)
                return {**row, "seconds": median(row["seconds"]), "bounds": list(bounds)}

            return run

        arms = {name: arm(bounds) for name, bounds in cuts.items()}
        for row in interleaved(arms, repeats, warmup=0, progress=label):
            yield {"cut": row.pop("arm"), **row}

    def search(self, within: float, most: int, rounds: int, steps: int, label: str) -> Iterator[dict]:
        """Measure the cuts near the best one at the speeds there are now: rows as of `compare`, with "predicted"."""
        found = {str(cut["bounds"]): cut for cut in self.costs(within, most)["cuts"]}
        for row in self.compare({name: cut["bounds"] for name, cut in found.items()}, rounds, steps, label):
            yield {**row, "predicted": found[row["cut"]]["predicted"]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._job.stop()

    def _ask(self, request: dict, seconds: float) -> list[dict]:
        return self._mail.ask(request, seconds)

    def _alive(self) -> None:
        check(self._job, "the pipeline's job", self.cluster.spec.world_size)


def idle_share(split: Sequence[dict], speeds: Sequence[float], seconds: float) -> float:
    """1 - ideal / measured step. Ideal: the stages' work, shared out over the devices by their speeds, without any waiting."""
    work = sum(stage["compute"] * speed for stage, speed in zip(split, speeds, strict=True))
    return 1 - work / sum(speeds) / seconds


def best_of(rows: Sequence[dict]) -> list[int]:
    """Bounds of the cut with the least median time."""
    seconds: dict[str, list[float]] = {}
    bounds = {}
    for row in rows:
        if "error" not in row:
            seconds.setdefault(row["cut"], []).append(row["seconds"])
            bounds[row["cut"]] = row["bounds"]
    return bounds[min(seconds, key=lambda name: median(seconds[name]))]
