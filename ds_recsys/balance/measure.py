"""What all ranks profiled, put together: the costs of layers, devices and links, the same on every rank."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.balance.costs import LayerCost, PipelineCosts, StageCost
from ds_recsys.balance.estimate import LayerTimes, estimate, replicas, slowdowns
from ds_recsys.balance.layer_sample import LayerProfile
from ds_recsys.balance.profile import StageProfiler, StepProfile
from ds_recsys.balance.surroundings import layer_facts, timed_links

WINDOW = 5  # steps after which the ranks tell each other what they took; the median of as many is a stage's time now
_SAMPLES = 8  # of single layers, whose mean is a layer's cost
_OF_A_STEP = 5  # numbers that a rank says of one step


@dataclass(frozen=True)
class Reading:
    """One step.

    Attributes:
        stage_seconds: forward and backward of one micro-batch, by stage; of its slowest replica.
        step_seconds: of the whole step on the slowest rank.
        tokens: of a micro-batch, mean over the ranks.
        reduction, optimizer: seconds per trainable byte on the rank that came last, which did not wait.
    """

    stage_seconds: tuple[float, ...]
    step_seconds: float
    tokens: float
    reduction: float
    optimizer: float


class Meter:
    """Collects what the ranks' profilers found: `read` after each step, and `take` what it returns, one after another.

    What a rank has to say leaves after each WINDOW of steps and is read a step later: no rank waits for another.

    Args:
        memory_limit: bytes a device may hold; None is no limit.

    Attributes:
        under_way: what was said and has not been read.
    """

    def __init__(self, engine, profiler: StageProfiler, memory_limit: int | None = None):
        self._module, self._device, self._profiler = engine.module, engine.device, profiler
        self._memory_limit = memory_limit
        self._facts = layer_facts(engine)
        self._links = timed_links(engine)
        self._stages: list[int] = [0] * dist.get_world_size()  # by rank
        dist.all_gather_object(self._stages, engine.module.stage_id)
        self._recent: deque[Reading] = deque(maxlen=WINDOW)
        self._samples: deque[tuple[LayerTimes, ...]] = deque(maxlen=_SAMPLES)
        self._unread = 0  # steps since the last exchange
        self.under_way: Gathering | None = None
        self._pending: list[StepProfile] = []  # this rank's samples, until all ranks have as many
        self._sampled: StepProfile | None = None  # the last of them
        self._boundaries = [0.0] * len(self._facts)  # bytes per token
        self._activations = [0.0] * len(self._facts)

    def read(self) -> list[Reading]:
        """After a step: what those of the last WINDOW took, a step after its end; nothing otherwise.

        Collective over the world, once for each WINDOW: an all-gather of some numbers, and one of objects when layers were
        sampled.
        """
        steps = self._profiler.steps
        if steps and steps[-1].layers and steps[-1] is not self._sampled:
            self._sampled = steps[-1]
            self._pending.append(self._sampled)
        readings = []
        if self.under_way is not None:
            readings = self._arrived(self.under_way.wait().tolist())
            self.under_way = None
            if not readings:
                self._unread = WINDOW
        self._unread += 1
        if self._unread >= WINDOW:
            self._unread = 0
            self.under_way = Gathering(
                torch.tensor(self._row(steps[-WINDOW:]), dtype=torch.float64, device=self._device)
            )
        return readings

    def _arrived(self, of_ranks: list[list[float]]) -> list[Reading]:
        samples = min(int(row[0]) for row in of_ranks)
        of_steps = [
            [row[begin : begin + _OF_A_STEP] for row in of_ranks] for begin in range(1, len(of_ranks[0]), _OF_A_STEP)
        ]
        if not all(row[0] for rows in of_steps for row in rows):  # a device had yet to finish them
            return []
        if samples:
            self._take_samples(samples, [typical for typical, _ in self._per_token(of_steps[-1])])
        return [self._reading(rows) for rows in of_steps]

    def take(self, reading: Reading) -> None:
        """The newest that `costs` and the others go by."""
        self._recent.append(reading)

    @property
    def ready(self) -> bool:
        """Whether there is enough for `costs`."""
        return bool(self._samples and self._recent)

    @property
    def settled(self) -> bool:
        """Whether the smoothed times are all of the bounds that are in force."""
        return len(self._recent) == WINDOW

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
        self._pending.clear()
        self._unread, self.under_way = 0, None
        if afresh:
            self._samples.clear()

    def costs(self) -> PipelineCosts:
        """Of all layers in a micro-batch of usual length, and of the devices as they are now."""
        layers = [
            LayerTimes(fmean(s[n].forward for s in self._samples), fmean(s[n].backward for s in self._samples))
            for n in range(len(self._facts))
        ]
        bounds = self._module.parts
        per_token = ([seconds / reading.tokens for seconds in reading.stage_seconds] for reading in self._recent)
        work = [sum(layer.total for layer in layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        newest = self._recent[-1]
        slow = slowdowns([median(stage) for stage in zip(*per_token, strict=True)], work)
        fastest = min(slow)
        factor = fastest * newest.tokens
        return PipelineCosts(
            [
                LayerCost(
                    forward=layer.forward * factor,
                    backward=layer.backward * factor,
                    weight_bytes=facts.weight_bytes,
                    trainable_bytes=facts.trainable_bytes,
                    optimizer_bytes=facts.optimizer_bytes,
                    activation_bytes=round(kept * newest.tokens),
                    boundary_bytes=round(out * newest.tokens),
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
                    reduction=newest.reduction,
                    optimizer=newest.optimizer,
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

    def _row(self, steps: Sequence[StepProfile]) -> list[float]:
        """How many samples this rank has, and of each step of a WINDOW what `_reading` takes; zeros for missing ones."""
        stage, bounds = self._module.stage_id, self._module.parts
        trainable = max(1, sum(facts.trainable_bytes for facts in self._facts[bounds[stage] : bounds[stage + 1]]))
        row = [float(len(self._pending)), *[0.0] * _OF_A_STEP * (WINDOW - len(steps))]
        for step in steps:
            per_token = (step.forward + step.backward) / step.tokens
            row += [step.tokens, per_token, step.seconds, step.reduction / trainable, step.optimizer / trainable]
        return row

    def _reading(self, rows: Sequence[Sequence[float]]) -> Reading:
        """Of one step, from what every rank says of it."""
        tokens, _, seconds, reduction, optimizer = zip(*rows, strict=True)
        mean = fmean(tokens)
        slowest = tuple(slowest * mean for _, slowest in self._per_token(rows))
        return Reading(slowest, max(seconds), mean, min(reduction), min(optimizer))

    def _per_token(self, rows: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
        """By stage, seconds per token in one step of its typical replica and of its slowest one."""
        stages = range(self._module.num_stages)
        of_stages = (
            [row[1] for row, held in zip(rows, self._stages, strict=True) if held == stage] for stage in stages
        )
        return [replicas(found) for found in of_stages]

    def _take_samples(self, count: int, stage_seconds: Sequence[float]) -> None:
        """All ranks have sampled their layers so often: exchange what they found."""
        mine = [(step.layers, step.layer_tokens) for step in self._pending[:count]]
        del self._pending[:count]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        for of_ranks in zip(*everyone, strict=True):
            self._take_sample(of_ranks, stage_seconds)

    def _take_sample(self, of_ranks: Sequence[tuple], stage_seconds: Sequence[float]) -> None:
        found: dict[int, list[tuple[LayerProfile, float]]] = {}
        for layers, tokens in of_ranks:
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


class Gathering:
    """Every rank's tensor on its way to every rank. Collective over the world; on a device, in the order of its stream."""

    def __init__(self, mine: Tensor):
        self._rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        self._mine = mine
        self._work = dist.all_gather(self._rows, mine, async_op=True)
        if mine.device.type != "cpu":
            self._work.wait()  # the stream does, and not this process

    def wait(self) -> Tensor:
        """[ranks, ...]."""
        self._work.wait()
        return torch.stack(self._rows)
