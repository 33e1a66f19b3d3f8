"""The seconds of a training step under a plan, by part. Pure.

A step is (M - 1) max t + sum t over the stages (`ds_recsys.balance.costs.predict`), the gradients' part that compute does
not cover, the sum of a tied table, and the optimizer. Compute covers what a sum's wire takes: nothing under DeepSpeed's own
reduction, which begins when all gradients are there; in mode "delayed" a whole step. Compressed gradients leave in buckets
while the last backward pass goes on, each when it is ready and the link is free: what reaches beyond the pass counts, and
that is at least the first layers' bucket. Beside compute a sum may take longer than by itself. A tied table whose head's
gradient is summed apart leaves first, and the rows that were looked up last, with nothing to cover them. What a sum takes of
the device itself, to encode, is never covered.

Where devices are not equally fast, replicas take such parts of the micro-batch that all are done at once, with what does not
depend on them (the optimizer, to encode), unless the facts give the parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ds_recsys.balance.costs import LayerCost, Link, PipelineCosts, StageCost
from ds_recsys.balance.costs import predict as predict_pipeline
from ds_recsys.balance.partition import partition
from ds_recsys.comm.layout import bucket_lengths
from ds_recsys.data.batches import apportion
from ds_recsys.head.row_sparse import rows_pay
from ds_recsys.planner.facts import Facts, SumFacts
from ds_recsys.planner.plan import Plan

_FP32 = 4
_STATE = 2 * _FP32  # of Adam, of error feedback, and of what mode "delayed" keeps: bytes per parameter
_COPIES = 2  # of the gradients, that a late average takes


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step; `plan` with the bounds, shares and owners that they hold for.

    Attributes:
        compute: of the micro-batches, on the stage that has most to do, without waiting.
        pipeline: waiting for other stages, and transfers.
        gradients: what sums on the data axis add to the step.
        communication: what those sums would take by themselves.
    """

    plan: Plan
    compute: float
    pipeline: float
    gradients: float
    optimizer: float
    communication: float

    @property
    def seconds(self) -> float:
        return self.compute + self.pipeline + self.gradients + self.optimizer


def predict(facts: Facts, plan: Plan, zero_stage: int = 0) -> Forecast:
    """The best cut of the layers and owners of the sums for the plan, and what a step of it takes.

    Raises:
        UserError: no cut fits in memory, or there are fewer layers than stages.
        KeyError: the facts do not cover the plan.
    """
    plan = replace(plan, shares=_shares(facts, plan, zero_stage))
    if plan.data == 1:
        return _predict(facts, plan, zero_stage)
    grid, cost = (plan.data, plan.tensor), facts.sums[plan.data, plan.tensor][plan.method]
    found = []
    for one in filter(None, (cost, cost.unlike)):
        known = replace(facts, sums={**facts.sums, grid: {**facts.sums[grid], plan.method: one}})
        found.append(_predict(known, replace(plan, owners=one.owners), zero_stage))
    return min(found, key=lambda forecast: forecast.seconds)


def _predict(facts: Facts, plan: Plan, zero_stage: int) -> Forecast:
    costs = _costs(facts, plan, zero_stage)
    bounds = partition(costs, plan.micro_batches)
    alone = replace(costs, stages=tuple(replace(stage, reduction=0.0, optimizer=0.0) for stage in costs.stages))
    whole = predict_pipeline(alone, bounds, plan.micro_batches).step_seconds
    held = [costs.layers[start:stop] for start, stop in pairwise(bounds)]
    stages = list(zip(costs.stages, held, strict=True))
    compute = max(stage.slowdown * sum(layer.forward + layer.backward for layer in mine) for stage, mine in stages)
    optimizer = max(
        stage.slowdown * stage.optimizer * sum(layer.trainable_bytes for layer in mine) for stage, mine in stages
    )
    sums, waits = [0.0], [0.0]
    if plan.data > 1:
        for stage in _summed(facts, plan, costs, bounds, zero_stage):
            sums.append(_sum(facts, plan, zero_stage).seconds * stage.total)
            waits.append(_exposed(facts, plan, zero_stage, stage, whole))
    tied = 0.0
    if plan.pipe > 1 and facts.tied:
        tied = facts.transfers[plan.data * plan.tensor](_FP32 * facts.tied / plan.tensor)
    return Forecast(
        replace(plan, bounds=tuple(bounds) if plan.pipe > 1 else ()),
        plan.micro_batches * compute,
        whole - plan.micro_batches * compute,
        max(waits) + tied,
        optimizer,
        max(sums) + tied,
    )


def _shares(facts: Facts, plan: Plan, zero_stage: int) -> tuple[int, ...]:
    """Windows of each replica in a micro-batch of all; empty for equal parts."""
    total, slow = plan.micro_batch * plan.data, _replica_slowdowns(facts, plan)
    if facts.shares:
        return tuple(apportion(facts.shares, total)) if len(facts.shares) == plan.data else ()
    paces = [max(stage[replica] for stage in slow) for replica in range(plan.data)]
    if plan.mode not in ("sync", "delayed") or len(set(paces)) == 1:
        return ()
    window, fixed = _device_seconds(facts, plan, zero_stage)
    parts = [1] * plan.data
    for _ in range(total - plan.data):  # the next one goes where it is done soonest
        ends = [pace * (window * (part + 1) + fixed) for pace, part in zip(paces, parts, strict=True)]
        parts[ends.index(min(ends))] += 1
    return tuple(parts) if len(set(parts)) > 1 else ()


def _device_seconds(facts: Facts, plan: Plan, zero_stage: int) -> tuple[float, float]:
    """Of the fastest device in a step, mean over the stages: for each window of a micro-batch, and besides."""
    layers, share = facts.layers[plan.tensor], 1 / (plan.tensor * plan.pipe)
    passes = sum(layer.forward(plan.micro_batch) + layer.backward(plan.micro_batch) for layer in layers)
    parameters = sum(layer.parameters for layer in layers) - (facts.tied if plan.pipe == 1 else 0)
    each = _optimizer(facts, plan, zero_stage) + (_sum(facts, plan, zero_stage).processor if plan.data > 1 else 0.0)
    return plan.micro_batches * passes / plan.micro_batch / plan.pipe, each * parameters * share


def _optimizer(facts: Facts, plan: Plan, zero_stage: int) -> float:
    """Seconds per parameter of the fastest device, with what a late average takes beside."""
    late = _COPIES * facts.copy if plan.mode == "delayed" else 0.0
    return (facts.optimizer + late + plan.look_ahead * facts.ahead) / (plan.data if zero_stage else 1)


def _last_replicas(facts: Facts, plan: Plan, zero_stage: int) -> list[tuple[float, float]]:
    """(slowdown, slowdown x its part of the mean micro-batch) of the replica that is done last, by stage."""
    shares = plan.shares or (plan.micro_batch,) * plan.data
    window, fixed = _device_seconds(facts, plan, zero_stage)
    found = []
    for paces in _replica_slowdowns(facts, plan):
        pace, share = max(zip(paces, shares, strict=True), key=lambda one: one[0] * (window * one[1] + fixed))
        found.append((pace, pace * share / plan.micro_batch))
    return found


def _replica_slowdowns(facts: Facts, plan: Plan) -> list[list[float]]:
    """By stage and replica, that of the slowest tensor rank."""
    ranks = plan.data * plan.tensor
    starts = [[stage * ranks + replica * plan.tensor for replica in range(plan.data)] for stage in range(plan.pipe)]
    return [[max(facts.slowdowns[start : start + plan.tensor]) for start in stage] for stage in starts]


def _costs(facts: Facts, plan: Plan, zero_stage: int) -> PipelineCosts:
    """The plan's pipeline in the terms of `ds_recsys.balance`."""
    layers = facts.layers[plan.tensor]
    if plan.pipe == 1:  # which holds the tied table once
        layers = (*layers[:-1], replace(layers[-1], parameters=layers[-1].parameters - facts.tied))
    extra = _STATE * (1 + (plan.method != "none") + (plan.mode == "delayed") + 2 * plan.look_ahead)
    shards = plan.data if zero_stage else 1
    seconds = _sum(facts, plan, zero_stage).seconds if plan.data > 1 else 0.0
    optimizer = _optimizer(facts, plan, zero_stage)
    ranks = plan.data * plan.tensor
    of_stage = [range(stage * ranks, (stage + 1) * ranks) for stage in range(plan.pipe)]
    shares = plan.shares or (plan.micro_batch,) * plan.data
    first = len(layers) - facts.tail + 1
    return PipelineCosts(
        layers=[
            LayerCost(
                forward=layer.forward(plan.micro_batch),
                backward=layer.backward(plan.micro_batch),
                weight_bytes=_FP32 * layer.parameters // plan.tensor,
                trainable_bytes=_FP32 * layer.parameters // plan.tensor,
                optimizer_bytes=round(extra * layer.parameters) // plan.tensor // shards,
                activation_bytes=round(layer.activation_bytes * max(shares)),
                boundary_bytes=round(layer.boundary_bytes * max(shares)),
                joined=index >= first,
            )
            for index, layer in enumerate(layers)
        ],
        stages=[
            StageCost(
                slowdown=load,
                memory_limit=facts.memory_limit,
                reduction=seconds / _FP32,
                optimizer=pace / load * optimizer / _FP32,
            )
            for pace, load in _last_replicas(facts, plan, zero_stage)
        ],
        links=[_link(facts, ranks, inside[-1], inside[-1] + 1) for inside in of_stage[:-1]],
    )


def _link(facts: Facts, stride: int, one: int, other: int) -> Link:
    line = facts.transfers[stride]
    return Link(line.each, line.fixed, crosses_hosts=facts.hosts[one] != facts.hosts[other])


def _sum(facts: Facts, plan: Plan, zero_stage: int) -> SumFacts:
    """Of a value of a plan's sum; ZeRO sums to the owners and gathers fp32 weights."""
    costs = facts.sums[plan.data, plan.tensor]
    cost, dense = costs[plan.method], costs["none"]
    if not zero_stage:
        return cost
    return SumFacts((cost.seconds + dense.seconds) / 2, (cost.processor + dense.processor) / 2)


@dataclass(frozen=True)
class _Stage:
    """What a stage's sums are made of.

    Attributes:
        values, passes: of each of its layers, what is summed and the seconds of a backward pass.
        late: values that wait for the other end's gradient of a tied table.
        later: seconds that stages before this one go on with the last micro-batch when this one has ended.
        pace: slowdown of the device that is done last.
        rows: values that each replica sends to all others at the end.
    """

    values: Sequence[float]
    passes: Sequence[float]
    late: float
    later: float
    pace: float
    rows: float

    @property
    def total(self) -> float:
        return sum(self.values) + self.late


def _summed(facts: Facts, plan: Plan, costs: PipelineCosts, bounds: Sequence[int], zero_stage: int) -> list[_Stage]:
    """What the data axis sums on each stage; rows of a sampled loss are few and count as none."""
    stages: list[_Stage] = []
    rows = facts.sparse / plan.tensor if plan.mode == "sync" else 0.0
    tied = facts.tied / plan.tensor if plan.pipe > 1 else 0.0
    later = 0.0
    last = _last_replicas(facts, plan, zero_stage)
    for number, (start, stop) in enumerate(pairwise(bounds)):
        mine = costs.layers[start:stop]
        values = [layer.trainable_bytes / _FP32 for layer in mine]
        ends = {plan.pipe - 1: len(mine) - 1, 0: 0}
        late = 0.0
        if number in ends:  # with a table
            table = ends[number]
            values[table] = max(0.0, values[table] - rows)
            late = min(values[table], max(0.0, tied - rows))
            values[table] -= late
        looked_up = _looked_up(facts, plan, zero_stage)
        if looked_up:  # one stage, whose first layer is the table
            values[-1] += facts.tied / plan.tensor
            values[0] -= facts.tied / plan.tensor
        passes = [costs.stages[number].slowdown * layer.backward for layer in mine]
        stages.append(_Stage(values, passes, late, later, last[number][0], looked_up))
        later += sum(passes)
    return stages


def _looked_up(facts: Facts, plan: Plan, zero_stage: int) -> float:
    """Values of the rows that a replica looks up, where the gradient of a tied table is summed in two parts; else 0."""
    early = plan.mode == "sync" and plan.method != "none" and not zero_stage and facts.bucket is not None
    if plan.pipe > 1 or not early or not facts.tied or facts.sparse or not facts.looked_up:
        return 0.0
    looked_up = facts.looked_up * plan.micro_batch * plan.micro_batches
    return looked_up if rows_pay(facts.tied / plan.tensor, looked_up, plan.data, facts.sent[plan.method]) else 0.0


def _exposed(facts: Facts, plan: Plan, zero_stage: int, stage: _Stage, step: float) -> float:
    """Seconds that a stage's sums add to a step, in which the whole pipeline takes `step`."""
    cost = _sum(facts, plan, zero_stage)
    processor = min(stage.pace * cost.processor, cost.seconds)
    passing = (cost.beside or cost.seconds) - processor  # of compute, while a value is summed

    def covered(values: float, room: float) -> float:
        """Those of them that are summed in `room` seconds of compute."""
        return min(values, room / passing) if passing else values

    if plan.mode != "sync":
        beside = covered(stage.total, step)
        return processor * beside + cost.seconds * (stage.total - beside)
    if plan.method == "none" or zero_stage or facts.bucket is None:
        return cost.seconds * stage.total
    end = sum(stage.passes) + stage.later  # of the backward pass of all stages
    now = free = beside = 0.0
    stop = len(stage.values)
    for length in reversed(bucket_lengths(stage.values, facts.bucket)):
        start = stop - length
        now += sum(stage.passes[start:stop])
        free = max(free, now)
        values = covered(sum(stage.values[start:stop]), max(0.0, end - free))
        beside, free, stop = beside + values, free + passing * values, start
    # a ring's sum of N ranks sends 2 (N - 1) / N of a value, rows N - 1
    rows = facts.sums[plan.data, plan.tensor]["none"].seconds * stage.rows * plan.data / 2
    return processor * beside + cost.seconds * (stage.total - beside) + rows
