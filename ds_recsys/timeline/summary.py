"""`Summary`: what the steps of all ranks say together."""

import statistics
from dataclasses import asdict, dataclass

import torch

from ds_recsys.timeline.step_times import CATEGORIES, StepTimes

_MOST_ROWS = 8


@dataclass(frozen=True)
class RankTimes:
    """Medians over the steps of one rank: seconds, the busy share, and bytes as in `StepTimes`."""

    name: str
    steps: int
    wall: float
    times: dict[str, float]
    busy: float
    payload: dict[str, float]
    link_bytes: tuple[float, float] | None


@dataclass(frozen=True)
class Summary:
    """Medians over steps, means over ranks.

    Attributes:
        step: seconds of a step, of the slowest rank.
        busy: share of the step that a device computed, mean over the ranks.
        times: seconds of each category, mean over the ranks.
        payload: bytes that a rank handed to collectives, by category, mean over the ranks.
        link_bytes: (sent, received) by the network interfaces of each host, in order of its local rank 0.
        ranks: each rank's own figures.
    """

    step: float
    busy: float
    times: dict[str, float]
    payload: dict[str, float]
    link_bytes: list[tuple[float, float]]
    ranks: list[RankTimes]

    def describe(self) -> str:
        """A few aligned lines: the mean, then each rank, or of many ranks those that computed most and least."""
        title, mean = f"seconds, median of {self.ranks[0].steps} steps", f"mean of {len(self.ranks)} ranks"
        width = max(map(len, (title, mean, *(rank.name for rank in self.ranks))))
        header = "".join(f"{name:>11}" for name in ("step", *CATEGORIES, "busy"))
        lines = [f"{title:<{width}}{header}", _row(mean, width, self.step, self.times, self.busy)]
        lines += [_row(rank.name, width, rank.wall, rank.times, rank.busy) for rank in self._shown()]
        lines += [
            f"host {host}: {sent / 1e6:.3f} MB sent, {received / 1e6:.3f} MB received a step"
            for host, (sent, received) in enumerate(self.link_bytes)
        ]
        return "\n".join(lines)

    def line(self) -> str:
        """One line, with each category as a share of the mean step."""
        whole = sum(self.times.values()) or 1.0
        shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in self.times.items())
        return f"{self.step:.3f} s a step: {shares}"

    def as_dict(self) -> dict:
        """For a JSON file."""
        return asdict(self)

    def _shown(self) -> list[RankTimes]:
        if len(self.ranks) <= _MOST_ROWS:
            return self.ranks
        return sorted(self.ranks, key=lambda rank: rank.times["compute"])[:: len(self.ranks) - 1]


def summarise(steps: list[StepTimes], name: str) -> Summary:
    """Gather this rank's `steps`, under its `name`, with those of the others. Collective over the world."""
    ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, _medians(steps, name))
    return Summary(
        step=max(rank.wall for rank in ranks),
        busy=statistics.fmean(rank.busy for rank in ranks),
        times={key: statistics.fmean(rank.times[key] for rank in ranks) for key in CATEGORIES},
        payload={
            key: statistics.fmean(rank.payload.get(key, 0) for rank in ranks)
            for key in ("pipeline", "gradients", "tensor")
        },
        link_bytes=[rank.link_bytes for rank in ranks if rank.link_bytes],
        ranks=ranks,
    )


def _medians(steps: list[StepTimes], name: str) -> RankTimes:
    links = [step.link_bytes for step in steps if step.link_bytes]
    return RankTimes(
        name=name,
        steps=len(steps),
        wall=_median(step.wall for step in steps),
        times={key: _median(getattr(step, key) for step in steps) for key in CATEGORIES},
        busy=_median(step.busy for step in steps),
        payload={
            key: _median(step.payload.get(key, 0) for step in steps) for key in ("pipeline", "gradients", "tensor")
        },
        link_bytes=tuple(_median(column) for column in zip(*links, strict=True)) if links else None,
    )


def _median(values) -> float:
    values = list(values)
    return statistics.median(values) if values else 0.0


def _row(name: str, width: int, wall: float, times: dict[str, float], busy: float) -> str:
    return f"{name:<{width}}" + "".join(f"{seconds:>11.4f}" for seconds in (wall, *times.values())) + f"{busy:>11.0%}"
