"""Compression under ZeRO-1 and ZeRO-2, where each rank needs the sums of its own partition only."""

from functools import partial

import torch
from torch import Tensor

from ds_recsys import compat
from ds_recsys.comm.backend import GradientBackend
from ds_recsys.comm.reducer import Reducer
from ds_recsys.method_hook import MethodHook


class ZeroGradients:
    """Opens a gradient scope around the two methods of DeepSpeedZeroOptimizer that reduce a bucket.

    `average_tensor` knows which parameters are in it, `allreduce_and_copy_with_multiple_ranks` which rank keeps what.
    """

    def __init__(self, engine, reducer: Reducer, backend: GradientBackend):
        self._optimizer, self._reducer, self._backend = engine.optimizer, reducer, backend
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._group = engine.optimizer.dp_process_group
        self._places: list[tuple[int, int, str, tuple]] = []  # of the bucket's parameters: from, to, name, shape
        self._bucket_address = 0
        self._hooks = [
            MethodHook(engine.optimizer, "average_tensor", self._average_tensor),
            MethodHook(engine.optimizer, "allreduce_and_copy_with_multiple_ranks", self._reduce_slices),
        ]

    def _average_tensor(self, method, tensor: Tensor, dtype: torch.dtype):
        self._places, offset = [], 0
        for parameter in compat.bucket_parameters(self._optimizer, dtype):
            end = offset + parameter.numel()
            self._places.append((offset, end, self._names[parameter], tuple(parameter.shape)))
            offset = end
        self._bucket_address = tensor.data_ptr()
        tensors = tuple((name, shape) for _, _, name, shape in self._places)
        with self._backend.gradient_scope(self._group, partial(self._reducer.all_reduce, tensors=tensors)):
            return method(tensor, dtype)

    def _reduce_slices(self, method, small_bucket: list[Tensor], *args, bucket_ranks=None, **options):
        """`small_bucket` is sent as one tensor: in order, slices of the bucket; rank bucket_ranks[i] keeps slice i."""
        ranges, offset = [], 0
        for piece, ranks in zip(small_bucket, bucket_ranks, strict=True):
            owners = ranks if isinstance(ranks, frozenset) else (ranks,)
            ranges.append((offset, offset + piece.numel(), tuple(owners)))
            offset += piece.numel()
        first = (small_bucket[0].data_ptr() - self._bucket_address) // small_bucket[0].element_size()
        whole = [(start - first, end - first, name, shape) for start, end, name, shape in self._places]
        inside = [place for place in whole if place[0] >= 0 and place[1] <= offset]
        assert inside and inside[0][0] == 0 and inside[-1][1] == offset, "DeepSpeed cut a parameter between two buckets"
        reduce = partial(
            self._reducer.reduce_to_owners,
            tensors=tuple((name, shape) for _, _, name, shape in inside),
            ranges=tuple(ranges),
        )
        with self._backend.gradient_scope(self._group, reduce):
            return method(small_bucket, *args, bucket_ranks=bucket_ranks, **options)

    def close(self) -> None:
        """Leave the optimizer to DeepSpeed again."""
        for hook in self._hooks:
            hook.remove()
