"""`Delayed`: the average of a step's gradients is used in the next step, and travels while that one is computed."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys import compat
from ds_recsys.comm.modes.base import Mode
from ds_recsys.comm.modes.look_ahead import LookAhead
from ds_recsys.comm.modes.travel import Courier, Travelling


class Delayed(Mode):
    """One step of staleness: step t computes its gradients, waits for the average of step t - 1's, and applies that one.

    The first step only sends; `flush` applies what is under way as one more optimizer step, so N batches make N steps. The
    correction of a delay (DC-ASGD, https://arxiv.org/abs/1609.08326, equation 5, with the average gradient in place of a
    worker's) is g + correction x g x g x (weights now - weights that g was computed at).

    With `look_ahead` a replica computes its next gradient not at the weights that lack the average under way, but at those
    that the optimizer's step with its own gradient, the part of it that it has, leads to. Then it goes back, so that replicas
    stay equal, and takes the step with the average. As eager updates do in DiLoCo (https://arxiv.org/abs/2502.12996).

    What else DeepSpeed averages over the replicas in a step, the loss and the norm that clips gradients, would queue on the
    links behind the gradients under way, and the step would wait for them after all: the loss is averaged before they leave,
    and the norm is that of the average, the same on all replicas.

    An average with a NaN or an infinity is skipped on all ranks, and what error feedback keeps is as if it had not been.
    """

    def __init__(self, engine, options, compression):
        super().__init__(engine, options, compression)
        self._fp32 = compat.fp32_gradients(engine.optimizer) if hasattr(engine.optimizer, "bf16_groups") else {}
        self._reducer, self._courier = self.make_reducer(), Courier(self.data_size)
        self._travelling: Travelling | None = None
        self._average: Tensor | None = None  # what has been waited for and not been applied
        self._finite = self._first = True
        self._skips = False  # the step that is being taken
        self._weights_then: Tensor | None = None  # that the gradients under way were computed at
        self._spare: Tensor | None = None
        self._loss: Tensor | None = None  # the sum over the replicas, on the last stage
        self._ahead = LookAhead(engine.optimizer, self.parameters) if options.look_ahead else None
        self._own: list[Tensor] = []  # this replica's part of what is under way; clipped, once it was used
        self._own_finite = True
        self._looking = False  # the step that is being taken is taken back
        self.seconds_waited = 0.0

    def reduce_gradients(self, method: Callable, grads=None, **options) -> None:
        if grads is not None:
            return method(grads=grads, **options)
        own, self._spare = self._read(), None
        self._back()
        self._first = not self._wait()
        if self._ahead:  # what the average takes the place of; the engine clips what it leaves there
            self._own = [gradient.clone() if self._first else gradient for gradient in self._gradients()]
            self._own_finite = bool(own.sum().isfinite())
        self._skips = self._first or not self._finite
        self._apply()
        if self.options.delay_correction:
            self._weights_then = self.parameters.read(self._weights_then)
        self._send_loss()
        self._travelling = self._courier.send(self._reducer, own, self.parameters)
        return None

    def _send_loss(self) -> None:
        self._loss = compat.step_loss(self.engine) if self.engine.pipeline_parallelism else None
        if self._loss is not None and self.data_size > 1:
            with self.watched():
                dist.all_reduce(self._loss, group=self.data_group)

    def sum_loss(self, method: Callable):
        if self._loss is None:
            return method()
        return self.answered(method, compat.data_parallel_group(self.engine), lambda loss: loss.copy_(self._loss))

    def _gradients(self) -> list[Tensor]:
        parameters = self.parameters.parameters
        for parameter in parameters:
            if not self._fp32 and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [self._fp32[parameter] if self._fp32 else parameter.grad for parameter in parameters]

    @torch.no_grad()
    def _read(self) -> Tensor:
        flat = self.parameters.empty() if self._spare is None else self._spare
        for view, gradient in zip(self.parameters.views(flat), self._gradients(), strict=True):
            view.copy_(gradient.view_as(view))  # BF16_Optimizer's are flat
        return flat

    def _wait(self) -> bool:
        """Whether there was something under way; its average is in `_average` then."""
        if self._travelling is not None:
            begin = time.perf_counter()
            with self.watched():
                self._average = self._travelling.wait()
            self.seconds_waited += time.perf_counter() - begin
            self._travelling = None
            self._finite = self.agreed(bool(self._average.sum().isfinite()))
            self._reducer.commit() if self._finite else self._reducer.discard()
            if not self._finite:
                self.warn_dropped()
        return self._average is not None

    @torch.no_grad()
    def _apply(self) -> None:
        """The engine's gradients <- the average, corrected."""
        average, self._average = self._average, None
        if average is None:
            return
        if self.options.delay_correction:
            moved = self.parameters.read().sub_(self._weights_then)
            average.addcmul_(moved.mul_(average), average, value=self.options.delay_correction)
        for parameter, view in zip(self.parameters.parameters, self.parameters.views(average), strict=True):
            if self._fp32:
                gradient = self._fp32[parameter]
                gradient.copy_(view.view_as(gradient))
            else:  # until the engine lets go of it behind the step
                parameter.grad = view if parameter.dtype == view.dtype else view.to(parameter.dtype)
        self._spare = average

    def _look_ahead(self, clipped: bool = False) -> None:
        """Collective over the replica; a gradient that is not finite leads nowhere."""
        if not self.agreed(self._own_finite):
            return
        clips = self.engine.gradient_clipping() > 0.0 and not clipped
        self._looking = True
        try:
            self._ahead.go(self._own, self.engine.clip_fp32_gradients if clips else None, self.engine.optimizer.step)
        finally:
            self._looking = False
        self.apart = True

    def _back(self) -> None:
        """To the weights that all replicas have in common."""
        if self.apart:
            self._ahead.back()
            self.apart = False

    def consensus_weights(self) -> Tensor | None:
        return self._ahead.weights if self._ahead else None

    def optimizer_step(self, method: Callable, *args, **kwargs):
        if self._looking:
            return method(*args, **kwargs)
        if self._skips:
            self.skip()
            return None
        if not self.guarded:
            self.engine.optimizer.overflow = False
        return method(*args, **kwargs)

    def after_step(self) -> None:
        if self._first:
            self.engine.skipped_steps -= 1  # nothing was lost: its gradients are under way
        if self._ahead:
            self._look_ahead()

    def flush(self) -> None:
        """Apply what is under way, as an optimizer step that counts as no batch. Collective."""
        self._back()
        if self._wait():
            self._skips = not self._finite
            self._apply()
            if self._fp32:
                compat.mark_gradients(self.engine.optimizer)
            self.take_step()

    def before_evaluation(self) -> None:
        self.flush()

    def state_dict(self) -> dict:
        shared = {"finite": self._finite}
        if self._wait():
            shared |= {"average": self.parameters.as_dict(self._average), "finite": self._finite}
            if self._weights_then is not None:
                shared["weights_then"] = self.parameters.as_dict(self._weights_then)
        own = {"reducer": self._reducer.state_dict()}
        if self.apart:
            gradients = zip(self.parameters.names, self._own, strict=True)
            own |= {"gradient": {name: gradient.clone() for name, gradient in gradients}, "clipped": True}
        return {"shared": shared, "own": own}

    def load_state_dict(self, content: dict) -> None:
        shared, own = content.get("shared", {}), content.get("own", {})
        self._travelling, self.apart = None, False
        self._average, self._weights_then = (
            self.parameters.from_dict(shared[key]) if key in shared else None for key in ("average", "weights_then")
        )
        self._finite = shared.get("finite", True)
        if "reducer" in own:
            self._reducer.load_state_dict(own["reducer"])
        if self._ahead and "gradient" in own:
            self._own = [own["gradient"][name].to(parameter.device) for name, parameter in self.parameters.items()]
            self._own_finite = True  # or it would not have been saved
            self._look_ahead(own.get("clipped", False))

    def as_dict(self) -> dict:
        totals = self._reducer.totals
        return {
            **super().as_dict(),
            "skipped": totals.skipped,
            "sent_bytes": totals.sent_bytes,
            "seconds": totals.seconds,
            "seconds_waited": self.seconds_waited,
        }

    def close(self) -> None:
        self._back()
        super().close()
        self._courier.close()
