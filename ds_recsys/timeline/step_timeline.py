"""`StepTimeline`: the times of an engine's training steps, taken as they run."""

import contextlib
import itertools
import os
import time
from collections import deque
from pathlib import Path

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_recsys import compat
from ds_recsys.method_hook import MethodHook
from ds_recsys.timeline.axes import Axes
from ds_recsys.timeline.clock import clock_of_this_device
from ds_recsys.timeline.collectives import Collectives
from ds_recsys.timeline.links import LinkCounter
from ds_recsys.timeline.recorder import Recorder, self_times, spans
from ds_recsys.timeline.step_times import StepTimes
from ds_recsys.timeline.summary import Summary, summarise
from ds_recsys.timeline.trace import write_trace

_INSTRUCTIONS = {  # of DeepSpeed's pipeline schedule: category and name in the trace
    "LoadMicroBatch": ("other", "load micro-batch"),
    "ForwardPass": ("compute", "forward"),
    "BackwardPass": ("compute", "backward"),
    "SendActivation": ("pipeline", "send activation"),
    "RecvActivation": ("pipeline", "recv activation"),
    "SendGrad": ("pipeline", "send gradient"),
    "RecvGrad": ("pipeline", "recv gradient"),
    "ReduceTiedGrads": ("gradients", "reduce tied gradients"),
    "ReduceGrads": ("gradients", "reduce gradients"),
    "OptimizerStep": ("optimizer", "optimizer step"),
}
_METHODS = {  # of an engine without a pipeline
    "forward": ("compute", "forward"),
    "backward": ("compute", "backward"),
    "allreduce_gradients": ("gradients", "reduce gradients"),
    "step": ("optimizer", "optimizer step"),
}


class StepTimeline:
    """Where the time of each training step of `engine` goes, from now until `close()`.

        timeline = ds_recsys.StepTimeline(engine, trace_step=10, trace_file="trace.json")
        ...  # train as before
        print(timeline.summary(last=20).describe())

    A step of a PipelineEngine is its `train_batch`. On any other engine it runs from the first `forward` to the end of
    the `step` that updates the weights, and gradients must come from `engine.backward(loss)`. Evaluation does not count.
    Nothing in the step waits for the device, and what is computed stays bit-equal.

    Args:
        engine: what `deepspeed.initialize` returns first.
        trace_step: keep the spans of this step (counted as `engine.global_steps`), or of the first one after it.
        trace_file: write them, of all ranks, into this file, which chrome://tracing and https://ui.perfetto.dev open.
            That is collective over the world, at the end of that step.
        keep: how many steps `steps` holds.
    """

    def __init__(self, engine, trace_step: int | None = None, trace_file: str | Path | None = None, keep: int = 1000):
        self.engine, self.trace = engine, None
        self._trace_step, self._trace_file = trace_step, trace_file
        self._axes = Axes(engine)
        self._recorder = Recorder(clock_of_this_device())
        self._collectives = Collectives(self._recorder, self._axes)
        self._links = LinkCounter() if os.environ.get("LOCAL_RANK", "0") == "0" else None
        self._done, self._unread = deque(maxlen=keep), deque()
        self._begun = None
        if isinstance(engine, PipelineEngine):
            self._hooks = [MethodHook(engine, "train_batch", self._train_batch)]
        else:
            self._hooks = [MethodHook(engine, name, self._around(*what)) for name, what in _METHODS.items()]

    @property
    def steps(self) -> list[StepTimes]:
        """This rank's steps, oldest first. On a device the newest ones are missing until it has passed their end."""
        self._read(wait=False)
        return list(self._done)

    @property
    def last(self) -> StepTimes | None:
        """The newest of `steps`."""
        steps = self.steps
        return steps[-1] if steps else None

    def summary(self, last: int | None = None) -> Summary:
        """Figures of all ranks over their `last` steps (None: all that are kept). Collective over the world."""
        self._read(wait=True)
        steps = list(self._done)
        rank = torch.distributed.get_rank()
        return summarise(steps if last is None else steps[-last:], f"rank {rank}: {self._axes.place(rank)}")

    def clear(self) -> None:
        """Forget the steps so far."""
        self._read(wait=True)
        self._done.clear()

    def close(self) -> None:
        """Remove every hook. The steps stay readable."""
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks = []
        self._read(wait=True)
        self._collectives.forget_groups()
        if self._links:
            self._links.close()
            self._links = None

    def on_step(self, step: int) -> None:
        """Called on every rank after each step, outside of its time; for subclasses."""

    def _train_batch(self, method, *args, **kwargs):
        self._begin()
        with self._drop_if_broken(), self._collectives, compat.wrapped_instructions(self.engine, self._instruction):
            result = method(*args, **kwargs)
        self._end()
        return result

    def _instruction(self, name: str, method):
        category, label = _INSTRUCTIONS.get(name, ("other", name))
        recorder, turns, once = self._recorder, itertools.count(), category in ("gradients", "optimizer")

        def run(engine, *args, **kwargs):
            recorder.enter(category, (label,) if once else (label, next(turns)))
            try:
                return method(engine, *args, **kwargs)
            finally:
                recorder.leave()

        return run

    def _around(self, category: str, label: str):
        """What surrounds a method of an engine without a pipeline."""
        recorder = self._recorder

        def around(method, *args, **kwargs):
            if label == "forward" and not (self.engine.module.training and torch.is_grad_enabled()):
                return method(*args, **kwargs)  # evaluation
            if not recorder.running:
                if label != "forward":
                    return method(*args, **kwargs)  # of a step that had begun before this timeline
                self._begin()
            before = self.engine.global_steps
            with self._drop_if_broken(), self._collectives:
                recorder.enter(category, (label, self._turns[label]))
                self._turns[label] += 1
                try:
                    result = method(*args, **kwargs)
                finally:
                    recorder.leave()
            if self.engine.global_steps != before:
                self._end()
            return result

        return around

    @contextlib.contextmanager
    def _drop_if_broken(self):
        try:
            yield
        except BaseException:
            self._recorder.drop()
            raise

    def _begin(self) -> None:
        self._turns = dict.fromkeys((label for _, label in _METHODS.values()), 0)
        self._collectives.begin()
        self._begun = (time.time(), self._links and self._links.read())
        self._recorder.begin()

    def _end(self) -> None:
        marks, payload = self._recorder.end()
        start, links = self._begun
        if links:
            links = tuple(after - before for before, after in zip(links, self._links.read(), strict=True))
        step = self.engine.global_steps
        self._unread.append((step, start, links or None, marks, payload))
        traced = self._trace_step is not None and self.trace is None and step >= self._trace_step
        self._read(wait=traced, keep_spans=traced)
        if traced and self._trace_file:
            write_trace(self._trace_file, self.trace, self._axes.place(torch.distributed.get_rank()))
        self.on_step(step)

    def _read(self, wait: bool, keep_spans: bool = False) -> None:
        """Turn marks into times: all of them when `wait`, else those that the device has passed."""
        clock = self._recorder.clock
        while self._unread:
            step, start, links, marks, payload = self._unread[0]
            if wait:
                clock.wait(marks.moments[-1])
            elif not clock.ready(marks.moments[-1]):
                return
            self._unread.popleft()
            seconds = clock.seconds(marks.moments)
            times = self_times(marks, seconds)
            self._done.append(StepTimes(step, start, seconds[-1], **times, payload=payload, link_bytes=links))
            if keep_spans:
                self.trace = (start, spans(marks, seconds))
