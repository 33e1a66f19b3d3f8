"""A linear layer on a gathered sequence that keeps this rank's positions for its backward, and gathers again there
(Megatron-LM, https://arxiv.org/abs/2205.05198, section 4.2.2).
"""

import torch
from torch import Tensor

from ds_recsys.regions import gather_sequence
from ds_recsys.topology import TensorAxis


class Regather:
    """The gathered sequence of one region in the backward: gathered once for all the weights that want it."""

    def __init__(self, axis: TensorAxis):
        self.axis, self.uses = axis, 0
        self._whole: Tensor | None = None

    def take(self, piece: Tensor) -> Tensor:
        """[B, S / T, H] -> [B, S, H]; forgotten after the last use."""
        whole = gather_sequence(piece, self.axis) if self._whole is None else self._whole
        self.uses -= 1
        self._whole = whole if self.uses > 0 else None
        return whole


def gathered_linear(
    whole: Tensor, piece: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, regather: Regather
) -> Tensor:
    """whole [B, S, H] times weight [O, H] (`transposed`: [H, O]) plus bias [O]; `piece` [B, S / T, H] is what is kept."""
    return _GatheredLinear.apply(whole, piece.detach(), weight, bias, transposed, regather)


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole, piece, weight, bias, transposed, regather):
        ctx.save_for_backward(piece, weight)
        ctx.transposed, ctx.regather = transposed, regather
        regather.uses += int(weight.requires_grad)
        out = whole @ (weight if transposed else weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, gradient):
        piece, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_whole = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_whole = gradient @ (weight.t() if ctx.transposed else weight)
        if ctx.needs_input_grad[2]:
            inputs = ctx.regather.take(piece).flatten(0, -2)
            of_weight = inputs.t() @ rows if ctx.transposed else rows.t() @ inputs
        if ctx.needs_input_grad[3]:
            of_bias = rows.sum(0)
        return of_whole, None, of_weight, of_bias, None, None
