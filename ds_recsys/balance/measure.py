"""What all ranks profiled, put together: the costs of layers, devices and links, the same on every rank."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
import torch.distributed as dist

from ds_recsys.balance.costs import LayerCost, PipelineCosts, StageCost
from ds_recsys.balance.estimate import LayerTimes, estimate, replicas, slowdowns
from ds_recsys.balance.layer_sample import LayerProfile
from ds_recsys.balance.profile import StageProfiler, StepProfile
from ds_recsys.balance.surroundings import layer_facts, timed_links

_SMOOTH = 5  # steps whose median is a stage's time now
_SAMPLES = 8  # of single layers, whose mean is a layer's cost


@dataclass(frozen=True)
class Reading:
    """One step.

    Attributes:
        stage_seconds: forward and backward of one micro-batch, by stage; of its slowest replica.
        step_seconds: of the whole step on the slowest rank.
    """

    stage_seconds: tuple[float, ...]
    step_seconds: float


class Meter:
    """Collects what the ranks' profilers found.

    Args:
        memory_limit: bytes a device may hold; None is no limit.
    """

    def __init__(self, engine, profiler: StageProfiler, memory_limit: int | None = None):
        self._module, self._device, self._profiler = engine.module, engine.device, profiler
        self._memory_limit = memory_limit
        self._facts = layer_facts(engine)
        self._links = timed_links(engine)
        self._stages: list[int] = [0] * dist.get_world_size()  # by rank
        dist.all_gather_object(self._stages, engine.module.stage_id)
        self._recent: deque[Reading] = deque(maxlen=_SMOOTH)
        self._samples: deque[tuple[LayerTimes, ...]] = deque(maxlen=_SAMPLES)
        self._pending: StepProfile | None = None  # the newest of this rank's samples, until all ranks have one
        self._tokens = 0.0
        self._boundaries = [0.0] * len(self._facts)  # bytes per token
        self._activations = [0.0] * len(self._facts)
        self._reduction = self._optimizer = 0.0  # seconds per trainable byte

    def read(self, signal: bool = False) -> tuple[Reading | None, bool]:
        """After a step: its times, None while a device has not finished one, and whether rank 0 gave the signal.

        Collective over the world: one all-gather of eight numbers, and one more of objects when layers were sampled.
        """
        steps = self._profiler.steps
        newest = steps[-1] if steps else None
        if newest is not None and newest.layers:
            self._pending = newest
        rows = _gathered(self._row(newest, signal), self._device)
        if not all(row[0] for row in rows):
            return None, bool(rows[0][1])
        self._tokens = fmean(row[3] for row in rows)
        per_token = [[row[4] for row in self._of(stage, rows)] for stage in range(self._module.num_stages)]
        typical, slowest = zip(*map(replicas, per_token), strict=True)
        reading = Reading(tuple(one * self._tokens for one in slowest), max(row[5] for row in rows))
        self._recent.append(Reading(slowest, reading.step_seconds))
        # of the ranks, the one that came last did not wait
        self._reduction, self._optimizer = (min(row[column] for row in rows) for column in (6, 7))
        if all(row[2] for row in rows):
            self._take_sample(typical)
        return reading, bool(rows[0][1])

    @property
    def ready(self) -> bool:
        """Whether there is enough for `costs`."""
        return bool(self._samples and self._recent)

    @property
    def settled(self) -> bool:
        """Whether the smoothed times are all of the bounds that are in force."""
        return len(self._recent) == _SMOOTH

    @property
    def step_seconds(self) -> float:
        """Of the last steps, median."""
        return median(reading.step_seconds for reading in self._recent)

    def moved(self, afresh: bool = False) -> None:
        """The stages hold other layers now: what whole stages took before says nothing any more.

        Args:
            afresh: forget what single layers took as well, and sample them again at once.
        """
        self._recent.clear()
        self._profiler.clear(afresh)
        self._pending = None
        if afresh:
            self._samples.clear()

    def costs(self) -> PipelineCosts:
        """Of all layers in a micro-batch of usual length, and of the devices as they are now."""
        layers = [
            LayerTimes(fmean(s[n].forward for s in self._samples), fmean(s[n].backward for s in self._samples))
            for n in range(len(self._facts))
        ]
        bounds, stages = self._module.parts, zip(*(reading.stage_seconds for reading in self._recent), strict=True)
        work = [sum(layer.total for layer in layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        slow = slowdowns([median(seconds) for seconds in stages], work)
        fastest = min(slow)
        factor = fastest * self._tokens
        return PipelineCosts(
            [
                LayerCost(
                    forward=layer.forward * factor,
                    backward=layer.backward * factor,
                    weight_bytes=facts.weight_bytes,
                    trainable_bytes=facts.trainable_bytes,
                    optimizer_bytes=facts.optimizer_bytes,
                    activation_bytes=round(kept * self._tokens),
                    boundary_bytes=round(out * self._tokens),
                    needed=facts.needed,
                    joined=facts.joined,
                )
                for layer, facts, kept, out in zip(
                    layers, self._facts, self._activations, self._boundaries, strict=True
                )
            ],
            [
                StageCost(
                    slowdown=one / fastest,
                    memory_limit=self._memory_limit,
                    reduction=self._reduction,
                    optimizer=self._optimizer,
                )
                for one in slow
            ],
            self._links,
        )

    def moving_bytes(self, old: Sequence[int], new: Sequence[int]) -> int:
        """Of weights and optimizer state that change stages between two cuts, tensor ranks counted once."""
        home = [[s for s in range(len(cut) - 1) for _ in range(cut[s], cut[s + 1])] for cut in (old, new)]
        moving = [facts for facts, a, b in zip(self._facts, *home, strict=True) if a != b]
        return sum(facts.weight_bytes + facts.optimizer_bytes for facts in moving)

    def _row(self, step: StepProfile | None, signal: bool) -> list[float]:
        if step is None:
            return [0.0, float(signal), *[0.0] * 6]
        stage, bounds = self._module.stage_id, self._module.parts
        held = self._facts[bounds[stage] : bounds[stage + 1]]
        trainable = max(1, sum(facts.trainable_bytes for facts in held))
        return [
            1.0,
            float(signal),
            float(self._pending is not None),
            step.tokens,
            (step.forward + step.backward) / step.tokens,
            step.seconds,
            step.reduction / trainable,
            step.optimizer / trainable,
        ]

    def _of(self, stage: int, rows: Sequence) -> list:
        return [row for row, held in zip(rows, self._stages, strict=True) if held == stage]

    def _take_sample(self, stage_seconds: Sequence[float]) -> None:
        """All ranks have sampled their layers: exchange what they found."""
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self._pending.layers, self._pending.layer_tokens))
        self._pending = None
        found: dict[int, list[tuple[LayerProfile, float]]] = {}
        for layers, tokens in everyone:
            for layer, profile in layers.items():
                found.setdefault(layer, []).append((profile, tokens))
        times = {}
        for layer, profiles in found.items():
            times[layer] = LayerTimes(
                median(profile.forward / tokens for profile, tokens in profiles),
                median(profile.backward / tokens for profile, tokens in profiles),
            )
            self._boundaries[layer] = median(profile.boundary_bytes / tokens for profile, tokens in profiles)
            self._activations[layer] = median(profile.activation_bytes / tokens for profile, tokens in profiles)
        kinds = [facts.kind for facts in self._facts]
        self._samples.append(estimate(times, kinds, self._module.parts, stage_seconds).layers)


def _gathered(row: list[float], device: torch.device) -> list[list[float]]:
    """Every rank's row."""
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).tolist()
