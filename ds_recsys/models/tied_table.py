"""`TiedTable`: the gradient of a table that items are looked up in and scored with, in the two parts that it is made of."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ds_recsys.method_hook import MethodHook

if TYPE_CHECKING:
    from ds_recsys.models.layers import ItemTable
    from ds_recsys.models.pipeline import RecommenderPipe


class TiedTable:
    """The item table of a pipe of one stage, whose head is tied to it.

    Autograd adds up what the head and the look-ups contribute, so that the gradient is there when the backward pass ends, as
    the last of all: most of the values of a model with many items, with nothing left to cover their sum over replicas. After
    `split` the head's part, a dense one, is there as soon as the head's backward pass is, as the gradient of a leaf of its
    own; the look-ups leave rows in the table's own gradient, as a sparse tensor. `join` adds these to that.

    Args:
        begin: called once with the number of items in the first micro-batch that is differentiated, before it is computed.

    Attributes:
        weight: the parameter, [R, H].
        head: that leaf, in the same memory; None before `split`.
    """

    def __init__(self, pipe: "RecommenderPipe", layer: "ItemTable", begin: Callable[[int], None]):
        self._pipe, self._layer, self._begin = pipe, layer, begin
        self.weight: nn.Parameter = layer.embedding.weight
        self.head: nn.Parameter | None = None
        self._first = layer.register_forward_pre_hook(self._first_pass)
        self._hook: MethodHook | None = None

    def _first_pass(self, layer: nn.Module, inputs: tuple) -> None:
        if torch.is_grad_enabled():
            self._first.remove()
            self._begin(inputs[0].numel())

    def split(self) -> nn.Parameter:
        """From here on the gradient comes in two parts; the head's leaf."""
        self.head = nn.Parameter(self.weight.detach())
        self._layer.embedding.sparse = True
        self._hook = MethodHook(self._pipe, "head", self._through_the_leaf)
        return self.head

    def _through_the_leaf(self, head):
        shard = head()
        if not torch.is_grad_enabled():
            return shard
        self.head.data = self.weight.data  # which a checkpoint may have replaced
        return replace(shard, weight=self.head)

    @torch.no_grad()
    def join(self) -> None:
        """The table's gradient <- the sum of both parts; the leaf's is gone."""
        rows, whole = self.weight.grad, self.head.grad
        self.weight.grad, self.head.grad = whole, None
        if isinstance(rows, Tensor):
            rows = rows.coalesce()
            whole.index_add_(0, rows.indices()[0], rows.values())

    def close(self) -> None:
        """The gradient is autograd's again."""
        self._first.remove()
        if self._hook:
            self._hook.remove()
            self._layer.embedding.sparse = False
