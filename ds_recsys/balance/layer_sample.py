"""Seconds of each layer of a stage, micro-batch by micro-batch, and the bytes that it sends on and keeps."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerProfile:
    """One layer in one micro-batch: seconds, bytes of what leaves it and of what it keeps for its backward pass.

    With recomputation a layer is taken to keep as much as leaves it.
    """

    forward: float
    backward: float
    boundary_bytes: int
    activation_bytes: int


class LayerSamples:
    """The layers of a stage in the micro-batches of one step, but the first where there are others: it allocates.

    Args:
        mark: takes a moment of the clock and returns its number.
    """

    def __init__(self, module, micro_batches: int, mark: Callable[[], int]):
        self._module, self._mark = module, mark
        self._skip = min(1, micro_batches - 1)
        self._running: dict[int, _Sample] = {}  # by buffer
        self._done: list[_Sample] = []
        self._tokens: list[int] = []

    @property
    def tokens(self) -> float:
        """Of a sampled micro-batch, mean."""
        return fmean(self._tokens) if self._tokens else 0.0

    @contextlib.contextmanager
    def forward(self, buffer_id: int, inputs, tokens: Callable[[], int]):
        """The forward pass of a micro-batch runs inside; after it `tokens()` is how many it had."""
        if self._skip:
            self._skip -= 1
            yield
            return
        sample = _Sample(self._module, self._mark, count_bytes=not self._tokens)
        begin = self._mark()
        with sample.watched(inputs):
            yield
        sample.forward = begin, self._mark()
        self._tokens.append(tokens())
        self._running[buffer_id] = sample

    @contextlib.contextmanager
    def backward(self, buffer_id: int):
        """Its backward pass runs inside."""
        begin = self._mark()
        yield
        sample = self._running.pop(buffer_id, None)
        if sample is not None:
            sample.backward = begin, self._mark()
            self._done.append(sample)

    def profiles(self, seconds: list[float]) -> dict[int, LayerProfile]:
        """By pipeline layer, mean over the sampled micro-batches; `seconds` are those of the moments."""
        found = [sample.profiles(seconds) for sample in self._done]
        if not found:
            return {}
        first = found[0]  # the one that counted bytes
        return {
            layer: LayerProfile(
                fmean(one[layer].forward for one in found),
                fmean(one[layer].backward for one in found),
                first[layer].boundary_bytes,
                first[layer].activation_bytes,
            )
            for layer in first
        }


class _Sample:
    """One micro-batch: when each layer was called, and when the gradient of its output arrived."""

    def __init__(self, module, mark: Callable[[], int], count_bytes: bool):
        self._module, self._mark, self._count_bytes = module, mark, count_bytes
        self._start = module.parts[module.stage_id]
        self._called: dict[int, tuple[int, int]] = {}
        self._bytes: dict[int, tuple[int, int]] = {}
        self._arrived: dict[int, int] = {}  # by layer; -1 for the input of the first one
        self.forward: tuple[int, int] = (0, 0)  # moments between which the whole pass ran
        self.backward: tuple[int, int] = (0, 0)

    @contextlib.contextmanager
    def watched(self, inputs):
        """The module's layers are timed inside."""
        self._watch(inputs, -1)
        functions = self._module.forward_funcs
        self._module.forward_funcs = [self._timed(n, function) for n, function in enumerate(functions)]
        try:
            yield
        finally:
            self._module.forward_funcs = functions

    def _timed(self, number: int, layer: Callable) -> Callable:
        # hooks inside a recomputed region would keep what it is to recompute
        recomputed = self._module.activation_checkpoint_interval > 0
        counted = self._count_bytes and not recomputed

        def call(value):
            kept = _Kept(self._module) if counted else None
            start = self._mark()
            with kept.hooks() if kept else contextlib.nullcontext():
                value = layer(value)
            if number not in self._called:  # a recomputation calls it again
                self._called[number] = start, self._mark()
                out = _nbytes(value)
                self._bytes[number] = out, kept.nbytes if kept else out
                self._watch(value, number)
            return value

        return call

    def _watch(self, value, number: int) -> None:
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        tensor = next((t for t in tensors if isinstance(t, Tensor) and t.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda _: self._arrived.setdefault(number, self._mark()) and None)

    def profiles(self, seconds: list[float]) -> dict[int, LayerProfile]:
        first, last = min(self._called), max(self._called)
        found, after = {}, self.backward[0]
        for number in sorted(self._called, reverse=True):
            begin, end = self._called[number]
            forward = seconds[end] - seconds[begin]
            if number == last:  # the loss counts as the last layer's, forward and backward
                forward += seconds[self.forward[1]] - seconds[end]
            # what no gradient passes on its way back counts as the layer's before it
            before = self._arrived.get(number - 1, self.backward[1] if number == first else after)
            backward = max(0.0, seconds[before] - seconds[after])
            found[self._start + number], after = LayerProfile(forward, backward, *self._bytes[number]), before
        return dict(sorted(found.items()))


class _Kept:
    """Counts the bytes that a forward pass keeps for its backward pass, weights and what is kept twice left out."""

    def __init__(self, module):
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self.nbytes = 0

    def hooks(self):
        """A context in which they are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._add, lambda tensor: tensor)

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.nbytes += storage.nbytes()
        return tensor


def _nbytes(value) -> int:
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
