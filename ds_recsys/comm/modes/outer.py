"""The outer optimizer: SGD with Nesterov momentum on the average change of the replicas' weights. Pure."""

from torch import Tensor


def nesterov(weights: Tensor, change: Tensor, velocity: Tensor | None, lr: float, momentum: float) -> None:
    """One step in place, as torch.optim.SGD(nesterov=True); with lr 1 and no momentum, weights <- weights - change.

    DiLoCo (https://arxiv.org/abs/2311.08105) takes as gradient what the replicas have moved: old weights - new ones.

    Args:
        weights, change: fp32 [n].
        velocity: fp32 [n], zeros before the first step; None without momentum.
    """
    if velocity is None:
        weights.sub_(change, alpha=lr)
        return
    velocity.mul_(momentum).add_(change)
    weights.sub_(change, alpha=lr).sub_(velocity, alpha=lr * momentum)
