"""`LocalMode`: replicas that take optimizer steps of their own, and so hold different weights for a while."""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist

from ds_recsys import compat
from ds_recsys.comm.modes.base import Mode

logger = logging.getLogger("ds_recsys")


class LocalMode(Mode):
    """Nothing waits for another replica: neither the gradients nor the loss are averaged over the data axis.

    `train_batch` returns the loss of this replica. A replica whose gradients are not finite skips its step. What each has
    of its own (weights, optimizer, learning rate) is in each rank's file of a checkpoint.
    """

    @property
    def dense(self) -> bool:
        """Whether this step still averages gradients."""
        return self.steps < self.options.dense_until

    def begin_step(self) -> None:
        """This replica is about to take a step of its own, from weights that are the same everywhere unless `apart`."""

    def reduce_gradients(self, method: Callable, grads=None, **options) -> None:
        if grads is not None or self.dense:
            return method(grads=grads, **options)
        compat.gradients_for_reduction(
            self.engine
        )  # as DeepSpeed: a parameter that was not used has a gradient of zeros
        self.begin_step()
        self.apart = True
        return None

    def optimizer_step(self, method: Callable, *args, **kwargs):
        if self.extra_step or self.agreed(self._finite()):
            self.engine.optimizer.overflow = False
            return method(*args, **kwargs)
        self.skip()
        if dist.get_rank(self.replica_group) == 0:
            logger.warning(f"a gradient of replica {self.data_rank} is infinite or NaN: it skips step {self.steps + 1}")
        return None

    def _finite(self) -> bool:
        gradients = [p.grad for p in self.parameters.parameters if p.grad is not None]
        return not gradients or bool(torch.stack([gradient.sum() for gradient in gradients]).isfinite().all())

    def sum_loss(self, method: Callable):
        """This replica's own; the engine divides the sum over the replicas by their number."""
        return self.answered(method, compat.data_parallel_group(self.engine), lambda loss: loss.mul_(self.data_size))

    def state_dict(self) -> dict:
        engine = self.engine
        own = {"weights": self.parameters.as_dict(self.parameters.read()) if self.apart else {}}
        if self.data_rank:  # DeepSpeed's own file holds those of the first replica
            own["optimizer"] = engine.optimizer.state_dict()
            own["scheduler"] = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else {}
            own["skipped_steps"] = engine.skipped_steps
        return {"shared": {}, "own": own}

    def load_state_dict(self, content: dict) -> None:
        engine, own = self.engine, content.get("own", {})
        if own.get("weights"):
            self.parameters.write(self.parameters.from_dict(own["weights"]))
        if "optimizer" in own:
            engine.optimizer.load_state_dict(own["optimizer"])
            engine.skipped_steps = own["skipped_steps"]
            if engine.lr_scheduler is not None:
                engine.lr_scheduler.load_state_dict(own["scheduler"])
