"""Momentum correction of sparse gradients (Deep Gradient Compression, https://arxiv.org/abs/1712.01887)."""

import torch
from torch import Tensor

from ds_recsys.comm.error_feedback import WORKER, ErrorFeedback


class MomentumCorrection:
    """u <- momentum u + gradient is what is compressed in place of the gradient; u is reset where something was sent.

    So a value that waits for its turn gathers the momentum it would have had. It takes the place of the momentum of an
    SGD, which is to have none of its own; like residuals, velocities are staged until `commit`.
    """

    def __init__(self, momentum: float, feedback: ErrorFeedback):
        self.momentum, self._feedback = momentum, feedback
        self._kept: dict[str, Tensor] = {}  # by tensor, in units of the gradients times _scale
        self._staged: dict[str, Tensor] = {}
        self._scale = 1.0

    def apply(self, flat: Tensor, segments) -> None:
        """flat <- u in the segments, each of them a whole tensor."""
        for segment in segments:
            values = flat[segment.offset : segment.offset + segment.numel]
            if segment.name in self._staged:
                raise ValueError(f"momentum correction: {segment.name} is reduced more than once in a step")
            if segment.name in self._kept:
                values.add_(self._kept[segment.name], alpha=self.momentum * self._feedback.scale / self._scale)
            self._staged[segment.name] = values.clone()

    def commit(self) -> None:
        """Forget the momentum of what was sent; before the residuals of the step are committed."""
        multiplier = self._feedback.multiplier
        for (side, name, start, stop), (residual, error) in self._feedback.errors().items():
            if side != WORKER or name not in self._staged:
                continue
            velocity = self._staged[name][start:stop]
            compressed = velocity if residual is None else torch.add(velocity, residual, alpha=multiplier)
            velocity[compressed != error] = 0
        self._kept, self._staged, self._scale = self._staged, {}, self._feedback.scale

    def discard(self) -> None:
        """The step was skipped."""
        self._staged = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Velocities in unscaled units, by tensor."""
        return {name: value / self._scale for name, value in self._kept.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace all velocities."""
        self._scale, self._staged = 1.0, {}
        self._kept = {name: value.clone() for name, value in state.items()}
