"""Compression in an engine whose gradients DeepSpeed averages in one go: plain data-parallel, pipelines, BF16_Optimizer."""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.sparse_tensor import SparseTensor
from torch import Tensor
from torch.nn import Parameter

from ds_recsys import compat
from ds_recsys.comm.backend import GradientBackend
from ds_recsys.comm.overlap import Bucket, OverlappedBuckets, make_buckets
from ds_recsys.comm.reducer import Reducer, value_bytes
from ds_recsys.head.row_sparse import rows_pay
from ds_recsys.method_hook import MethodHook


class StageZeroGradients:
    """Takes the place of `engine.buffered_allreduce_fallback`, the one call in which stage 0 reduces all gradients.

    Row-sparse gradients, which are small, stay with DeepSpeed; dense ones go in buckets through DeepSpeed's own averaging,
    whose all-reduce the reducer answers. BF16_Optimizer's are taken in fp32, before they would be rounded.

    A module with a `tied_table`, the gradient of whose largest weight is whole as the last of all, has it in two parts if it
    looks few of its rows up: a dense part, which is compressed and leaves first, and rows, which are sent as they are.
    """

    def __init__(
        self,
        engine,
        reducer: Reducer,
        backend: GradientBackend,
        waited: Callable[[float], None],
    ):
        options = reducer.options
        overlap = options.overlap
        self._engine, self._reducer, self._backend = engine, reducer, backend
        self._fp32 = compat.fp32_gradients(engine.optimizer) if hasattr(engine.optimizer, "bf16_groups") else {}
        if self._fp32:  # accumulated in hooks, or only after the backward pass
            overlap = overlap and engine.optimizer.immediate_grad_update
        engine.communication_data_type = torch.float32
        self._waited = waited
        self._group = compat.data_parallel_group(engine)
        self._names = {parameter: name for name, parameter in engine.module.named_parameters()}
        self._overlap = overlap
        self._table = None
        # the rows would miss what a momentum of the compressed gradients keeps
        if options.early_head and overlap and not self._fp32 and not options.momentum:
            self._table = engine.module.tied_table(self._begin) if hasattr(engine.module, "tied_table") else None
        self._make_buckets()
        self._hook = MethodHook(engine, "buffered_allreduce_fallback", self._reduce_all)

    def _make_buckets(self) -> None:
        module = self._engine.module
        parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
        if self._splits:  # in the order of a forward pass the head is last
            parameters = [p for p in parameters if p is not self._table.weight] + [self._table.head]
        buckets = make_buckets(parameters, self._tied(module), self._reducer.options.bucket_elements)
        micro_batches = self._engine.gradient_accumulation_steps
        self._buckets = OverlappedBuckets(buckets, self._reduce, micro_batches, self._overlap)

    @staticmethod
    def _tied(module) -> set[Parameter]:
        """What other stages contribute to, after the backward pass."""
        if not isinstance(module, PipelineModule):
            return set()
        return {weight for weight, _ in module.get_tied_weights_and_groups()}

    def _gradient(self, parameter: Parameter) -> Tensor:
        if self._fp32:
            return self._fp32[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _reduce(self, bucket: Bucket) -> None:
        dense = [(p, gradient) for p in bucket.parameters if not (gradient := self._gradient(p)).is_sparse]
        tensors = tuple((self._names[p], tuple(p.shape)) for p, _ in dense)
        if dense:
            with self._backend.gradient_scope(self._group, partial(self._reducer.all_reduce, tensors=tensors)):
                averages = compat.average_gradients(self._engine, [gradient for _, gradient in dense])
            for (parameter, gradient), average in zip(dense, averages, strict=True):
                # an accumulator lasts, and a gradient on a GPU may still be read by another stream
                if self._fp32 or gradient.device.type != "cpu":
                    gradient.copy_(average)
                else:
                    parameter.grad = average

    def _reduce_all(self, method, grads=None, **options):
        if grads is not None:
            return method(grads=grads, **options)
        begin = time.perf_counter()
        self._buckets.finish()
        parameters = [p for bucket in self._buckets.buckets for p in bucket.parameters]
        parameters += [self._table.weight] if self._splits else []
        sparse = [parameter.grad for parameter in parameters if _is_row_sparse(parameter)]
        if sparse:
            method(grads=[SparseTensor(gradient) for gradient in sparse], **options)
            self._reducer.finite &= all(bool(g.coalesce().values().isfinite().all()) for g in sparse)
        if self._splits:
            self._table.join()
        self._waited(time.perf_counter() - begin)

    @property
    def _splits(self) -> bool:
        return self._table is not None and self._table.head is not None

    def _begin(self, items: int) -> None:
        """Split the table, if that pays with so many items in a micro-batch. Collective over the replicas."""
        table, weight = self._table, self._table.weight
        looked_up = torch.tensor(float(items), device=weight.device)
        dist.all_reduce(looked_up, op=dist.ReduceOp.MAX, group=self._group)
        values = float(looked_up) * self._engine.gradient_accumulation_steps() * weight.shape[1]
        sent = value_bytes(self._reducer.options, self._names[weight], tuple(weight.shape))
        if rows_pay(weight.numel(), values, dist.get_world_size(self._group), sent):
            self._names[table.split()] = self._names[weight]
            self._buckets.close()
            self._make_buckets()

    def close(self) -> None:
        """Leave the engine to DeepSpeed again."""
        self._hook.remove()
        self._buckets.close()
        if self._table:
            self._table.close()


def _is_row_sparse(parameter: Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse
