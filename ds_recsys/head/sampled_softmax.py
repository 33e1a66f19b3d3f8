"""Losses over the target and a sample of negatives; the gradient of the item table holds the rows that took part.

The hidden states are the same on every rank of the axis; each rank scores its own negatives, and the targets that are
in its rows by a direct dot.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_recsys.head.negatives import Negatives
from ds_recsys.head.reductions import combine
from ds_recsys.head.shard import IGNORE, HeadShard
from ds_recsys.regions import copy_to_region, reduce_from_region
from ds_recsys.topology import TensorAxis


def sampled_cross_entropy(
    hidden: Tensor,
    target: Tensor,
    head: HeadShard,
    negatives: Negatives,
    *,
    reduction: str = "sum",
    sparse: bool = True,
) -> Tensor:
    """Cross-entropy of the target against itself and the negatives, these corrected by how often each is drawn (logQ).

    The target is always there, so it is not corrected (https://arxiv.org/abs/2507.09331), and a negative that is a
    position's own target is left out there. Then the denominator is unbiased for the softmax over items 1..I: padding is
    never drawn, so row 0 is not in it, unlike in the full loss. When every item is drawn the two are equal.

    Forward: one MAX and one SUM all-reduce; backward: one all-reduce of the gradient of `hidden`.

    Args:
        hidden: [N, H], the same on every rank of `head.axis`, as `target` is.
        target: int64 [N], 1..I, or -100 to ignore the position.
        negatives: this rank's, from a sampler of ds_recsys/head/negatives.py.
        reduction: "sum", "mean" over the positions not ignored, or "none" ([N], 0 at ignored positions).
        sparse: gradient of `head.weight` as sparse COO of the rows that took part (not coalesced: one entry per draw),
            else dense. That of `head.bias` is always dense.

    Returns:
        fp32 (fp64 for fp64 inputs) loss, the same on every rank.

    Raises:
        ValueError: a target outside the catalogue.
    """
    positions = len(target)
    kept, target = _supervised(target, head)
    scores, own, mine = _score(hidden[kept], target, head, negatives, sparse)
    losses = _SampledSoftmax.apply(scores, own, mine, negatives.log_expected, _hits(target, head, negatives), head.axis)
    return _reduce(losses, kept, positions, reduction)


def gbce(
    hidden: Tensor,
    target: Tensor,
    head: HeadShard,
    negatives: Negatives,
    *,
    num_items: int,
    calibration: float = 0.75,
    reduction: str = "sum",
    sparse: bool = True,
) -> Tensor:
    """Generalised binary cross-entropy of gSASRec (https://arxiv.org/abs/2308.07192, section 5).

    (-beta * log sigmoid(s+) + sum of log(1 + exp(s-))) / (negatives.total + 1), with beta = alpha * (t * (1 - 1 / alpha) +
    1 / alpha) and alpha = negatives.total / (num_items - 1), at most 1. The paper draws uniformly for each position; here
    all positions share the draw, a negative that is a position's own target left out.

    Forward: one all-reduce; backward: one all-reduce of the gradient of `hidden`.

    Args:
        num_items: I.
        calibration: t, 0 for plain binary cross-entropy to 1 for scores that are calibrated probabilities.
        hidden, target, head, negatives, reduction, sparse: as in `sampled_cross_entropy`.
    """
    positions = len(target)
    kept, target = _supervised(target, head)
    scores, own, mine = _score(hidden[kept], target, head, negatives, sparse)
    alpha = min(1.0, negatives.total / max(1, num_items - 1))
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha) if alpha else 1.0
    against = F.softplus(scores.masked_fill(_mask(scores, _hits(target, head, negatives)), -torch.inf)).sum(1)
    losses = (against - mine * beta * F.logsigmoid(own)) / (negatives.total + 1)
    return _reduce(reduce_from_region(losses, head.axis), kept, positions, reduction)


class _SampledSoftmax(torch.autograd.Function):
    """(scores [N, n], targets' scores [N] where `mine`, ...) -> losses [N]. One buffer [N, 1 + n] serves both ways."""

    @staticmethod
    def forward(
        ctx, scores: Tensor, own: Tensor, mine: Tensor, log_expected: Tensor, hits: tuple, axis: TensorAxis
    ) -> Tensor:
        terms = own.new_empty(len(own), 1 + scores.shape[1])
        terms[:, 0] = own.masked_fill(~mine, -torch.inf)
        torch.sub(scores, log_expected, out=terms[:, 1:])
        terms[:, 1:][hits] = -torch.inf
        local = terms.amax(1)
        terms.sub_(local.clamp(min=torch.finfo(terms.dtype).min)[:, None]).exp_()  # -inf - -inf is no number
        added = torch.where(mine, own, 0)[:, None]
        maximum, total, added = combine(local, terms.sum(1), added, axis)
        ctx.save_for_backward(terms, torch.exp(local - maximum) / total)
        return total.log() + maximum - added[:, 0]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        terms, factor = ctx.saved_tensors
        probability = terms * (factor * gradient)[:, None]
        # Where another rank has the target, own is a constant, whose gradient goes nowhere.
        return probability[:, 1:], probability[:, 0] - gradient, None, None, None, None


def _supervised(target: Tensor, head: HeadShard) -> tuple[Tensor, Tensor]:
    """(positions that are not ignored, their targets)."""
    target = target.to(head.weight.device)
    kept = (target != IGNORE).nonzero()[:, 0]
    target = target[kept]
    if len(target) and not (1 <= int(target.min()) and int(target.max()) < head.num_rows):
        raise ValueError(f"targets must be in 1..{head.num_rows - 1} or {IGNORE}, item 0 being padding")
    return kept, target


def _score(
    hidden: Tensor, target: Tensor, head: HeadShard, negatives: Negatives, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores of the negatives [N, n]; of the targets [N], 0 where another rank has it; whether this rank has it)."""
    hidden = copy_to_region(hidden, head.axis)
    rows, mine = head.local(target)
    where, rows = mine.nonzero()[:, 0], rows[mine]
    # Rows of other ranks' targets are not looked up at all: they would be in the gradient, as zeros.
    taken = torch.cat([rows, negatives.rows])
    sizes = [len(rows), len(negatives.rows)]
    own_rows, drawn_rows = F.embedding(taken, head.weight, sparse=sparse).split(sizes)
    own_bias, drawn_bias = (None, None) if head.bias is None else head.bias[taken].split(sizes)
    scores = replace(head, weight=drawn_rows, bias=drawn_bias).scores(hidden)
    own = _paired(hidden[where], replace(head, weight=own_rows, bias=own_bias))
    scores, own = (value if value.dtype == torch.float64 else value.float() for value in (scores, own))
    return scores, own.new_zeros(len(target)).index_put((where,), own), mine


def _paired(hidden: Tensor, head: HeadShard) -> Tensor:
    """Score of hidden[i] with row i: [N, H] -> [N], summed in fp32 at least."""
    weight = head.weight
    if head.cosine:
        hidden, weight = F.normalize(hidden, dim=-1), F.normalize(weight, dim=-1)
    if hidden.dtype != torch.float64:
        hidden, weight = hidden.float(), weight.float()
    scores = (hidden * weight).sum(-1)
    scores = head.scale * (scores if head.bias is None else scores + head.bias)
    return scores if head.softcap is None else head.softcap * torch.tanh(scores / head.softcap)


def _hits(target: Tensor, head: HeadShard, negatives: Negatives) -> tuple[Tensor, Tensor]:
    """(positions, columns) of negatives that are their position's own target; rows of negatives are in order."""
    items = negatives.rows + head.first_row
    first = torch.searchsorted(items, target)
    counts = torch.searchsorted(items, target, right=True) - first
    positions = torch.arange(len(target), device=target.device).repeat_interleave(counts)
    begin = (counts.cumsum(0) - counts)[positions]
    return positions, first[positions] + torch.arange(len(positions), device=target.device) - begin


def _mask(scores: Tensor, hits: tuple[Tensor, Tensor]) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[hits] = True
    return mask


def _reduce(losses: Tensor, kept: Tensor, positions: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.new_zeros(positions).index_put((kept,), losses)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: sum, mean or none")
    return losses.sum() if reduction == "sum" else losses.mean()
