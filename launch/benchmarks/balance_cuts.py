"""The cuts that are worth measuring when the best one is looked for: those that the cost model puts near its best. Pure."""

import heapq
from collections.abc import Iterator
from itertools import combinations

from ds_recsys.balance.costs import PipelineCosts, predict


def near_best(
    costs: PipelineCosts, micro_batches: int, within: float = 0.1, most: int = 8
) -> list[tuple[tuple[int, ...], float]]:
    """[(bounds, predicted seconds of a step)] of the `most` best cuts that are at most `within` over the least, in order.

    Every cut is predicted: 28 blocks, an embedding, a norm and a head have 4060 of them in four stages.
    """
    seconds = ((predict(costs, bounds, micro_batches).step_seconds, bounds) for bounds in _cuts(costs))
    best = heapq.nsmallest(most, seconds)
    return [(bounds, one) for one, bounds in best if one <= (1 + within) * best[0][0]]


def _cuts(costs: PipelineCosts) -> Iterator[tuple[int, ...]]:
    """All bounds that give every stage what it needs and tear no joined layers apart."""
    layers = costs.layers
    needed = frozenset().union(*(layer.needed for layer in layers))
    starts = [number for number, layer in enumerate(layers) if number and not layer.joined]
    trainable = [layer.trainable_bytes > 0 for layer in layers]
    for inner in combinations(starts, costs.num_stages - 1):
        bounds = (0, *inner, costs.num_layers)
        spans = list(zip(bounds, bounds[1:], strict=False))
        if not all(any(trainable[a:b]) for a, b in spans):
            continue
        if needed and not all(needed <= frozenset().union(*(one.needed for one in layers[a:b])) for a, b in spans):
            continue
        yield bounds
