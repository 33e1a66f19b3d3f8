"""How the ranks of one tensor group put their parts of a softmax together: one MAX and one SUM, whatever the catalogue."""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys.topology import TensorAxis


def combine(
    maximum: Tensor, total: Tensor, added: Tensor | None, axis: TensorAxis, power=torch.exp
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merge softmax statistics of disjoint sets of items; the result is the same on every rank.

    Maximum and sum stay apart: log-sum-exp, their combination, rounds away what a few small terms add to a large one
    (online softmax, https://arxiv.org/abs/1805.02867; over ranks as in https://arxiv.org/abs/1909.08053, section 3).

    Args:
        maximum: [N] floating point, largest score of this rank's items; -inf where it has none.
        total: [N] sum of exp(score - maximum); not looked at where maximum is -inf.
        added: [N, K] or None: anything else to be summed over the ranks, such as the target's score.
        axis: the ranks; with one of them nothing is sent.
        power: `torch.exp2` for scores in units of log 2; every "exp" above is then that.

    Returns:
        (maximum [N] over all ranks, sum [N] of exp(score - that maximum), sum [N, K] of `added`); the dtypes are
        those of `maximum`. Where no rank has an item the maximum is -inf and the sum 0.
    """
    if axis.size == 1:
        return maximum, total.masked_fill(maximum == -torch.inf, 0), added
    largest = maximum.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=axis.group)
    total = torch.where(maximum == -torch.inf, 0, total * power(maximum - largest))  # -inf - -inf is no number
    sums = total[None] if added is None else torch.cat([total[None], added.T.to(total.dtype)])
    sums = sums.contiguous()
    dist.all_reduce(sums, group=axis.group)
    return largest, sums[0], None if added is None else sums[1:].T
