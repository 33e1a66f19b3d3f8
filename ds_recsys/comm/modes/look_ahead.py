"""`LookAhead`: weights that a step with a replica's own gradient leads to, while the average of all is under way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ds_recsys.comm.kernels.native import library
from ds_recsys.comm.modes.flat import FlatParameters


class LookAhead:
    """Takes the optimizer's next step for a while, and takes it back.

    Of torch's AdamW on the CPU, plain or fused, only the weights are computed, in one pass that leaves its state alone. For
    others the state is copied before the step and put back after it, so `go` works with any optimizer whose state is in
    `state` and `param_groups`. `back` puts the weights back, bit for bit, of which a copy is kept.
    """

    def __init__(self, optimizer, parameters: FlatParameters):
        self._optimizer, self._parameters = optimizer, parameters
        self._spare: dict[tuple, Tensor] = {}  # memory for the next copy of the state
        self.weights: Tensor | None = None  # those that `back` puts back, fp32 [numel]

    @torch.no_grad()
    def go(self, gradients: Sequence[Tensor], clip: Callable[[], None] | None, step: Callable[[], None]) -> None:
        """The parameters <- what `clip()`, which may change the gradients in place, and `step()` make of them.

        Args:
            gradients: of each parameter, as its `grad`.
        """
        parameters = self._parameters.parameters
        before = [parameter.grad for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if clip is not None:
            clip()
        if self.weights is None:
            self.weights = self._parameters.empty()
        if not self._at_once(parameters):
            self._step_and_put_back(step)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient

    def _at_once(self, parameters: list[Parameter]) -> bool:
        """AdamW's step (https://arxiv.org/abs/1711.05101) of the weights alone; False where that is not what it takes."""
        groups = self._optimizer.param_groups
        if type(self._optimizer) is not torch.optim.AdamW or any(map(_unlike, groups)):
            return False
        if not all(_plain(tensor) for parameter in parameters for tensor in (parameter, parameter.grad)):
            return False
        kernels = library()
        if kernels is None:
            return False
        kept = dict(zip(parameters, self._parameters.views(self.weights), strict=True))
        for group in groups:
            beta1, beta2 = group["betas"]
            rate = float(group["lr"])
            for parameter in kept.keys() & set(group["params"]):
                state = self._optimizer.state.get(parameter) or {"step": 0.0}
                count = float(state["step"]) + 1
                kernels.adamw_ahead(
                    parameter,
                    kept[parameter],
                    parameter.grad,
                    state.get("exp_avg"),
                    state.get("exp_avg_sq"),
                    beta1,
                    beta2,
                    1 - rate * group["weight_decay"],
                    rate / (1 - beta1**count),
                    (1 - beta2**count) ** -0.5,
                    group["eps"],
                )
        return True

    def _step_and_put_back(self, step: Callable[[], None]) -> None:
        self._parameters.read(self.weights)
        state, groups = self._optimizer.state, self._optimizer.param_groups
        kept = {
            parameter: {name: self._copy((parameter, name), value) for name, value in values.items()}
            for parameter, values in state.items()
        }
        options = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        step()
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


def _unlike(group: dict) -> bool:
    """Whether this group's AdamW takes more than the two moments."""
    return bool(group["amsgrad"] or group["maximize"])


def _plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_sparse
    )
