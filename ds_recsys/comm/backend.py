"""DeepSpeed's communication backend, which hands the gradients' all-reduce to whoever opened a gradient scope."""

import contextlib
import threading
from collections.abc import Callable

import torch
from deepspeed.comm.torch import TorchBackend
from torch import Tensor

from ds_recsys import compat


class GradientBackend(TorchBackend):
    """The backend as it was, but for sums of floating-point tensors over the group of an open `gradient_scope`.

    Norms, overflow flags and losses go over the same groups, outside of a scope; they and all else are left alone.
    """

    @classmethod
    def install(cls) -> "GradientBackend":
        """Put it in the place of DeepSpeed's own, once; several engines share it."""
        backend = compat.install_backend(cls)
        if not hasattr(backend, "gradient_scopes"):
            backend.gradient_scopes = threading.local()  # a thread that communicates in the background has its own
            backend.survivors = None  # the group in place of the world, when ranks of it are lost
        return backend

    @contextlib.contextmanager
    def gradient_scope(self, group, reduce: Callable[[Tensor], None]):
        """In this thread and context, `reduce(tensor)` is called in place of the all-reduce of `tensor` over `group`.

        It leaves the sum in `tensor`. Of two scopes, one inside the other, the inner one counts.
        """
        before = getattr(self.gradient_scopes, "now", None)
        self.gradient_scopes.now = (group, reduce)
        try:
            yield
        finally:
            self.gradient_scopes.now = before

    def _left_of(self, group):
        return self.survivors if group in (None, torch.distributed.GroupMember.WORLD) and self.survivors else group

    def barrier(self, group=None, async_op=False, device_ids=None):
        return super().barrier(self._left_of(group), async_op, device_ids)

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        scope = getattr(self.gradient_scopes, "now", None)
        summed = self._reduce_op(op) == torch.distributed.ReduceOp.SUM and tensor.is_floating_point()
        if scope is None or not summed or async_op or group is not scope[0]:
            return super().all_reduce(tensor, op=op, group=self._left_of(group), async_op=async_op)
        return scope[1](tensor)
