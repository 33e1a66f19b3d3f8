"""The seconds of a training step under a plan, by part. Pure.

A step is (M - 1) max t + sum t over the stages (`ds_recsys.balance.costs.predict`), the gradients' part that compute does
not cover, the sum of a tied table, and the optimizer. Compute covers what a sum's wire takes: nothing under DeepSpeed's own
reduction, which begins when all gradients are there; the last backward pass when gradients are compressed, for they leave
as they are ready; a whole step in mode "delayed". What a sum takes of the device itself, to encode, is never covered.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from ds_recsys.balance.costs import LayerCost, Link, PipelineCosts, StageCost
from ds_recsys.balance.costs import predict as predict_pipeline
from ds_recsys.balance.partition import partition
from ds_recsys.planner.facts import Facts
from ds_recsys.planner.plan import Plan

_FP32 = 4
_STATE = 2 * _FP32  # of Adam, of error feedback, and of what mode "delayed" keeps: bytes per parameter
_AHEAD = 1.5  # optimizer steps that looking ahead takes: one, and copies of what it takes back


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step; `plan` with the bounds that they hold for.

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
    """The best cut of the layers for the plan, and what a step of it takes.

    Raises:
        UserError: no cut fits in memory, or there are fewer layers than stages.
        KeyError: the facts do not cover the plan.
    """
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
        for stage, mine in stages:
            values = sum(layer.trainable_bytes for layer in mine) / _FP32
            if plan.mode == "sync" and facts.sparse:
                values = max(0.0, values - facts.sparse / plan.tensor)
            last_backward = stage.slowdown * sum(layer.backward for layer in mine)
            sums.append(_sum(facts, plan, zero_stage)[0] * values)
            waits.append(_exposed(facts, plan, zero_stage, values, last_backward, whole))
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


def _costs(facts: Facts, plan: Plan, zero_stage: int) -> PipelineCosts:
    """The plan's pipeline in the terms of `ds_recsys.balance`."""
    layers = facts.layers[plan.tensor]
    if plan.pipe == 1:  # which holds the tied table once
        layers = (*layers[:-1], replace(layers[-1], parameters=layers[-1].parameters - facts.tied))
    extra = _STATE * (1 + (plan.method != "none") + (plan.mode == "delayed") + 2 * plan.look_ahead)
    shards = plan.data if zero_stage else 1
    seconds = _sum(facts, plan, zero_stage)[0] if plan.data > 1 else 0.0
    ranks = plan.data * plan.tensor
    of_stage = [range(stage * ranks, (stage + 1) * ranks) for stage in range(plan.pipe)]
    first = len(layers) - facts.tail + 1
    return PipelineCosts(
        layers=[
            LayerCost(
                forward=layer.forward(plan.micro_batch),
                backward=layer.backward(plan.micro_batch),
                weight_bytes=_FP32 * layer.parameters // plan.tensor,
                trainable_bytes=_FP32 * layer.parameters // plan.tensor,
                optimizer_bytes=extra * layer.parameters // plan.tensor // shards,
                activation_bytes=round(layer.activation_bytes * plan.micro_batch),
                boundary_bytes=round(layer.boundary_bytes * plan.micro_batch),
                joined=index >= first,
            )
            for index, layer in enumerate(layers)
        ],
        stages=[
            StageCost(
                slowdown=max(facts.slowdowns[rank] for rank in inside),
                memory_limit=facts.memory_limit,
                reduction=seconds / _FP32,
                optimizer=(1 + _AHEAD * plan.look_ahead) * facts.optimizer / _FP32 / shards,
            )
            for inside in of_stage
        ],
        links=[_link(facts, ranks, inside[-1], inside[-1] + 1) for inside in of_stage[:-1]],
    )


def _link(facts: Facts, stride: int, one: int, other: int) -> Link:
    line = facts.transfers[stride]
    return Link(line.each, line.fixed, crosses_hosts=facts.hosts[one] != facts.hosts[other])


def _sum(facts: Facts, plan: Plan, zero_stage: int) -> tuple[float, float]:
    """(seconds, those of the device) per value of a plan's sum; ZeRO sums to the owners and gathers fp32 weights."""
    costs = facts.sums[plan.data, plan.tensor]
    cost, dense = costs[plan.method], costs["none"]
    if not zero_stage:
        return cost.seconds, cost.processor
    return (cost.seconds + dense.seconds) / 2, (cost.processor + dense.processor) / 2


def _exposed(facts: Facts, plan: Plan, zero_stage: int, values: float, last_backward: float, step: float) -> float:
    """Seconds that the sum of `values` values adds to a step."""
    seconds, processor = (cost * values for cost in _sum(facts, plan, zero_stage))
    processor = min(processor, seconds)
    covered = step if plan.mode != "sync" else last_backward if plan.method != "none" and not zero_stage else 0.0
    return processor + max(0.0, seconds - processor - covered)
