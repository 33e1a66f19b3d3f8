"""What the parallel modules of one decoder layer share while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ds_recsys.models.tensor.gathered import Regather, gathered_linear
from ds_recsys.models.tensor.rng import RegionRandom
from ds_recsys.regions import copy_to_region, gather_sequence, reduce_from_region, reduce_to_sequence
from ds_recsys.topology import TensorAxis


class Scope:
    """One per decoder layer: its axis, the tensors that entered the region, the region's random numbers.

    `sequence`: outside the regions a rank holds its own positions only (see `sequence.py`).
    """

    def __init__(self, axis: TensorAxis, sequence: bool = False):
        self.axis, self.sequence = axis, sequence
        self.random = RegionRandom(axis.rank)
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        self._pieces: dict[int, tuple[Tensor, Regather]] = {}  # of gathered sequences, which `_entered` holds

    def enter(self, value: Tensor) -> Tensor:
        """`copy_to_region`, once for all modules that read the same tensor: q, k and v share one all-reduce."""
        if self.sequence:
            return value  # the region's module gathered it, and sums its gradient
        return self._once(value, copy_to_region)

    def gather(self, value: Tensor) -> Tensor:
        """`gather_sequence`, once for all regions that read the same tensor (attention beside the feed-forward)."""
        whole = self._once(value, gather_sequence)
        self._pieces.setdefault(id(whole), (value, Regather(self.axis)))
        return whole

    def outputs(self, module: nn.Module, inner: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """What the linear layer `module`, whose forward is `inner`, makes of a tensor that enters the region."""
        if id(value) not in self._pieces or torch.is_autocast_enabled(value.device.type):
            return inner(self.enter(value))
        piece, regather = self._pieces[id(value)]
        return gathered_linear(value, piece, module.weight, module.bias, isinstance(module, Conv1D), regather)

    def _once(self, value: Tensor, function: Callable[[Tensor, TensorAxis], Tensor]) -> Tensor:
        known = self._entered.get(id(value))
        if known is None:
            known = self._entered[id(value)] = (value, function(value, self.axis))  # held, so its id stays its own
        return known[1]

    def leave(self, partial: Tensor) -> Tensor:
        """The end of a region: the sum of the ranks' partial results, here or wherever each position lives."""
        if self.sequence:
            return reduce_to_sequence(partial, self.axis)
        self.random.leave()
        return reduce_from_region(partial, self.axis)

    def start_random(self, device: torch.device) -> None:
        """From here on this rank draws its own numbers; with a split sequence it does so in the whole layer."""
        if not self.sequence:
            self.random.enter(device)

    def close(self) -> None:
        """Forget the tensors of one forward."""
        self._entered.clear()
        self._pieces.clear()
        self.random.leave()

    def around(self, block: nn.Module, drops: bool) -> None:
        """Start and end with every forward of `block`, also one that recomputation breaks off in the middle."""

        def forward(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            self.close()
            if self.sequence and drops and block.training:
                self.random.enter(next(block.parameters()).device)
            try:
                return inner(*args, **kwargs)
            finally:
                self.close()

        wrap(block, forward)


def wrap(module: nn.Module, around: Callable) -> None:
    """Make `module.forward(...)` call `around(what it was, ...)`; wrappers nest, the last one outermost."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    module.forward = forward
