"""Where to cut a pipeline: the exact minimum of the predicted step, and DeepSpeed's own rules beside it. Pure."""

import numpy as np
from deepspeed.runtime import utils

from ds_recsys.balance import search
from ds_recsys.balance.costs import PipelineCosts, check_micro_batches
from ds_recsys.balance.spans import Spans, all_spans, shortfall
from ds_recsys.errors import UserError


def partition(costs: PipelineCosts, micro_batches: int) -> list[int]:
    """Bounds of the cut with the least `predict(costs, bounds, micro_batches).step_seconds`: stage s holds [b[s], b[s + 1]).

    Every stage gets a trainable layer (ZeRO breaks without) and what else is `needed`, and stays within its memory limit.
    Of the cuts within 1e-9 of the least, the one with the fewest bytes across hosts, and of those the lexicographically
    smallest: ranks that have the same costs find the same cut.

    Raises:
        UserError: no cut has that; the message names the stage whose memory is short and by how much.
    """
    check_micro_batches(micro_batches)
    spans = all_spans(costs, micro_batches)
    short = shortfall(costs, micro_batches, spans)
    spans = spans.where(short <= 0)
    cut = spans.best_cut(spans.pace, np.maximum)
    if cut is None:
        raise UserError(_why_none(costs, micro_batches))
    quantum = search.quantum(spans.step(cut))
    spans = all_spans(costs, micro_batches, quantum).where(short <= 0)
    return search.search(spans, spans.step(cut))


def uniform(num_layers: int, num_stages: int) -> list[int]:
    """Bounds with about as many layers in every stage, DeepSpeed's `partition_method="uniform"`."""
    return [int(bound) for bound in utils.partition_uniform(num_layers, num_stages)]


def parameters(trainable: list[int], num_stages: int) -> list[int]:
    """Bounds with about as many trainable parameters in every stage, DeepSpeed's `partition_method="parameters"`.

    Args:
        trainable: numbers of trainable parameters by layer.
    """
    return [int(bound) for bound in utils.partition_balanced(trainable, num_stages)]


def _why_none(costs: PipelineCosts, micro_batches: int) -> str:
    trainable = sum(layer.trainable_bytes > 0 for layer in costs.layers)
    if trainable < costs.num_stages:
        return (
            f"{trainable} of {costs.num_layers} layers have trainable parameters, too few for {costs.num_stages} stages "
            "with one each: use fewer stages, or freeze less"
        )
    spans = all_spans(costs, micro_batches)
    short = shortfall(costs, micro_batches, spans)
    cut = spans.best_cut(np.maximum(short, 0), np.maximum)
    if cut is None:
        needed = ", ".join(sorted(frozenset().union(*(layer.needed for layer in costs.layers))))
        return (
            f"no cut of {costs.num_layers} layers gives each of {costs.num_stages} stages a layer with what it needs "
            f"({needed}): use fewer stages, or one parameter group"
        )
    stage = int(short[cut].argmax())
    missing, limit = short[cut][stage], costs.stages[stage].memory_limit
    return (
        f"no cut of {costs.num_layers} layers into {costs.num_stages} stages fits in memory: at best (bounds "
        f"{_bounds(spans, cut)}) stage {stage} needs {_gib(limit + missing)}, {_gib(missing)} more than its limit of "
        f"{_gib(limit)}: use more stages, smaller micro-batches or recomputation"
    )


def _bounds(spans: Spans, cut: np.ndarray) -> list[int]:
    return [0, *(int(stop) for stop in spans.stop[cut])]


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3g} GiB"
