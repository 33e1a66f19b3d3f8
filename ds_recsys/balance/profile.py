"""Seconds of a stage's compute, step by step, and of each of its layers in sampled steps; waits are left out."""

import contextlib
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ds_recsys import compat
from ds_recsys.balance.layer_sample import LayerProfile, LayerSamples
from ds_recsys.method_hook import MethodHook
from ds_recsys.timeline.clock import clock_of_this_device

_FIRST_SAMPLES = (1, 2, 3)  # steps; the very first one allocates and compiles
_REDUCTIONS = ("ReduceGrads", "ReduceTiedGrads")
_TIMED = ("ForwardPass", "BackwardPass", "OptimizerStep", *_REDUCTIONS)


@dataclass(frozen=True)
class StepProfile:
    """What one `train_batch` cost this stage.

    Attributes:
        forward, backward: seconds of a micro-batch, mean over the step; sending, receiving and reducing left out.
        tokens: of a micro-batch, mean over the step.
        seconds: of the whole step on this rank, waits and all.
        reduction, optimizer: seconds of the step, waits for other ranks among them.
        layers: what each pipeline layer, by its index, cost in a micro-batch of `layer_tokens` tokens, mean over the step's
            samples; empty in steps without. The last layer's hold the loss.
    """

    forward: float
    backward: float
    tokens: float
    seconds: float
    reduction: float = 0.0
    optimizer: float = 0.0
    layers: dict[int, LayerProfile] = field(default_factory=dict)
    layer_tokens: float = 0.0


class StageProfiler:
    """Profiles every `train_batch` of a PipelineEngine from now on: two readings of the clock per instruction.

    On a device the moments are events on its stream, and read when they have passed: nothing waits for them.

    Args:
        sample_every: steps between two that time single layers.
        keep: how many steps `steps` holds.
        clock: as those of `ds_recsys.timeline.clock`; None is the device's.
    """

    def __init__(self, engine, sample_every: int = 20, keep: int = 200, clock=None):
        self.engine, self._sample_every = engine, sample_every
        self._clock = clock or clock_of_this_device()
        self._done: deque[StepProfile] = deque(maxlen=keep)
        self._unread: deque[_Step] = deque()
        self._count = 0
        self._hook = MethodHook(engine, "train_batch", self._train_batch)

    @property
    def steps(self) -> list[StepProfile]:
        """This stage's steps, oldest first; on a device the newest are missing until it has passed their end."""
        self._read()
        return list(self._done)

    def clear(self, afresh: bool = False) -> None:
        """Forget the steps so far, as after a migration; `afresh`: sample single layers as often as in the first steps."""
        self._done.clear()
        self._unread.clear()
        if afresh:
            self._count = 0

    def close(self) -> None:
        """Take the hook off."""
        self._hook.remove()

    def _train_batch(self, method, *args, **kwargs):
        sampled = self._count in _FIRST_SAMPLES or self._count % self._sample_every == self._sample_every - 1
        step = _Step(self.engine, self._clock, sampled)
        self._count += 1
        self._clock.begin()
        step.mark()
        with compat.wrapped_instructions(self.engine, step.around):
            result = method(*args, **kwargs)
        step.mark()
        self._unread.append(step)
        self._read()
        return result

    def _read(self) -> None:
        while self._unread and self._clock.ready(self._unread[0].moments[-1]):
            self._done.append(self._unread.popleft().profile())


class _Step:
    """The moments of one step."""

    def __init__(self, engine, clock, sampled: bool):
        self._clock = clock
        self._samples = LayerSamples(engine.module, engine.micro_batches, self.mark) if sampled else None
        self.moments: list = []
        self._spans: dict[str, list[tuple[int, int]]] = {name: [] for name in _TIMED}
        self._tokens: list[int] = []

    def around(self, name: str, method: Callable):
        """The method of an instruction, timed where it computes."""
        if name not in _TIMED:
            return method

        def run(engine, *args, **kwargs):
            context, tokens = contextlib.nullcontext(), None
            if name in ("ForwardPass", "BackwardPass"):
                buffer_id = kwargs["buffer_id"] if "buffer_id" in kwargs else args[0]
                inputs = engine.pipe_buffers["inputs"]
                if name == "ForwardPass":  # ranks of a tensor axis receive shares, which the pass puts together
                    tokens = functools.partial(_tokens_in, inputs, buffer_id)
                if self._samples and tokens:
                    context = self._samples.forward(buffer_id, inputs[buffer_id], tokens)
                elif self._samples:
                    context = self._samples.backward(buffer_id)
            begin = self.mark()
            with context:
                result = method(engine, *args, **kwargs)
            self._spans[name].append((begin, self.mark()))
            if tokens:
                self._tokens.append(tokens())
            return result

        return run

    def mark(self) -> int:
        self.moments.append(self._clock.now())
        return len(self.moments) - 1

    def profile(self) -> StepProfile:
        seconds = self._clock.seconds(self.moments)
        totals = {
            name: sum(seconds[end] - seconds[begin] for begin, end in spans) for name, spans in self._spans.items()
        }
        count = len(self._tokens)
        return StepProfile(
            totals["ForwardPass"] / count,
            totals["BackwardPass"] / count,
            sum(self._tokens) / count,
            seconds[-1],
            sum(totals[name] for name in _REDUCTIONS),
            totals["OptimizerStep"],
            self._samples.profiles(seconds) if self._samples else {},
            self._samples.tokens if self._samples else 0.0,
        )


def _tokens_in(buffers, buffer_id: int) -> int:
    """Tokens of a stage's input: values of whole numbers, or vectors of a floating-point tensor."""
    inputs = buffers[buffer_id]
    tensor = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
    if torch.is_floating_point(tensor) and tensor.dim() > 1:
        return tensor.numel() // tensor.shape[-1]
    return tensor.numel()
