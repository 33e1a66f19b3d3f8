"""One replica of bench.py modes: trains for a stretch of time when it is asked, at its own speed where its mode has one.

The deepspeed launcher starts it on every device: modes_rank.py FOLDER, where FOLDER/job.json is {"config": file, "settings":
dotted keys over it, "margin": as `modes_arms.margin` has it}. A request is {"window": its number, "seconds": s, "warmup": steps
before it}.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.arm import DeepSpeedArm
from benchmarks.mailbox import serve
from benchmarks.modes_job import BEGAN
from ds_recsys.config import load_config

_POLL_SECONDS = 0.01


class Replica:
    """Answers requests with what happened in a window, moments in seconds of the machine's monotonic clock."""

    def __init__(self, config, folder: Path, margin: int | None):
        self.arm, self._folder, self._margin = DeepSpeedArm(config, folder), folder, margin
        self.arm.cut(dist.get_world_size(), alone=False)
        self.mode = getattr(self.arm.engine, "data_parallel", None)

    def __call__(self, request: dict) -> dict:
        for _ in range(request["warmup"]):
            self.arm.step()
        timeline, before = self.arm.timeline(None), self._figures()
        window, rank, loss = self._folder / f"window{request['window']}", dist.get_rank(), None
        begin = start_together(window, rank, dist.get_world_size())
        cpu, ends = time.process_time(), []
        last = LastStep(window.with_suffix(".last"), rank, self._margin, begin + request["seconds"])
        while not last.taken(len(ends)):
            loss = self.arm.step()
            ends.append(time.monotonic())
        answer = {"begin": begin, "ends": ends, "cpu_seconds": time.process_time() - cpu, "loss": loss}
        if self.mode:
            self.mode.meet(self.mode.progress(self.mode.steps))  # what is under way would disturb the next arm
        steps = timeline.steps
        timeline.close()
        answer |= {"wall_seconds": sum(s.wall for s in steps), "compute_seconds": sum(s.compute for s in steps)}
        return {**answer, "parameters": self.arm.parameters, **_since(before, self._figures())}

    def _figures(self) -> dict:
        figures = self.mode.as_dict() if self.mode else {}
        steps, mean = figures.get("steps", 0), figures.get("staleness_mean", 0.0)
        return {"steps": steps, "dropped": figures.get("dropped_steps", 0), "stale_steps": mean * steps}


def start_together(window: Path, rank: int, ranks: int) -> float:
    """Wait for all ranks, by files: a barrier would wait behind what a mode still sends. The moment, which is now."""
    window.with_suffix(f".rank{rank}").touch()
    began = window.with_suffix(BEGAN)
    if rank == 0:
        while not all(window.with_suffix(f".rank{other}").exists() for other in range(ranks)):
            time.sleep(_POLL_SECONDS)
        _write(began, str(time.monotonic() + 5 * _POLL_SECONDS))
    while not began.exists():
        time.sleep(_POLL_SECONDS)
    begin = float(began.read_text())
    time.sleep(max(0.0, begin - time.monotonic()))
    return begin


class LastStep:
    """Which step is the last one of a window.

    Replicas that wait for each other must take equally many, or one would wait forever: rank 0 names a step, so far ahead
    (`margin`) that none has begun it. Without a margin a replica's last step is its first one that ends after `end`.
    """

    def __init__(self, file: Path, rank: int, margin: int | None, end: float):
        self._file, self._rank, self._margin, self._end = file, rank, margin, end
        self._last: int | None = None

    def taken(self, steps: int) -> bool:
        """Whether none follows the `steps` that this replica has taken."""
        over = time.monotonic() >= self._end
        if self._margin is None:
            return over
        if over and self._rank == 0 and self._last is None:
            _write(self._file, str(steps + self._margin))
        if self._last is None and self._file.exists():
            self._last = int(self._file.read_text())
        return self._last is not None and steps >= self._last


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)  # whoever sees the name sees the whole file


def _since(before: dict, after: dict) -> dict:
    """Steps dropped in between, and how old the others' weights were on average."""
    steps = after["steps"] - before["steps"]
    staleness = (after["stale_steps"] - before["stale_steps"]) / steps if steps else 0.0
    return {"dropped": after["dropped"] - before["dropped"], "staleness": staleness}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    folder = parser.parse_args().folder
    job = json.loads((folder / "job.json").read_text())
    replica = Replica(load_config(job["config"], overrides=job["settings"]), folder, job["margin"])
    serve(folder, int(os.environ["RANK"]), replica)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
