"""`LookAhead`: weights that a step with a replica's own gradient leads to, while the average of all is under way."""

import torch
from torch import Tensor

from ds_recsys.comm.modes.flat import FlatParameters


class LookAhead:
    """Takes the optimizer's next step for a while, and takes it back.

    The optimizer's state is copied before the step and put back after it, so `go` works with any optimizer whose state is in
    `state` and `param_groups`; `back` puts the weights back, bit for bit. It keeps a copy of both, and of the gradient.
    """

    def __init__(self, optimizer, parameters: FlatParameters):
        self._optimizer, self._parameters = optimizer, parameters
        self._spare: dict[tuple, Tensor] = {}  # memory for the next copy of the state, and of a gradient under ""
        self.weights: Tensor | None = None  # those that `back` puts back, fp32 [numel]

    @torch.no_grad()
    def go(self, gradient: Tensor, step) -> None:
        """The parameters <- what `step()`, which may clip, makes of them with `gradient`, fp32 [numel]."""
        self.weights = self._parameters.read(self.weights)
        state, groups = self._optimizer.state, self._optimizer.param_groups
        kept = {
            parameter: {name: self._copy((parameter, name), value) for name, value in values.items()}
            for parameter, values in state.items()
        }
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        parameters = self._parameters.parameters
        before = [parameter.grad for parameter in parameters]
        for parameter, view in zip(parameters, self._parameters.views(gradient), strict=True):
            parameter.grad = self._copy((parameter, ""), view)
        step()
        for parameter, grad in zip(parameters, before, strict=True):
            self._spare[parameter, ""] = parameter.grad
            parameter.grad = grad
        for group, values in zip(groups, options, strict=True):
            group.update(values)
        for parameter in list(state):
            if parameter not in kept:  # its first step is still to come
                del state[parameter]
                continue
            for name, value in kept[parameter].items():
                if isinstance(value, Tensor):
                    self._spare[parameter, name] = state[parameter][name]
                state[parameter][name] = value

    def back(self) -> None:
        """The parameters <- what they were before `go`."""
        self._parameters.write(self.weights)

    def _copy(self, key: tuple, value):
        if not isinstance(value, Tensor):
            return value
        spare = self._spare.pop(key, None)
        return value.clone() if spare is None else spare.copy_(value)
