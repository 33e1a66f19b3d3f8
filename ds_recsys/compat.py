"""The private names of DeepSpeed's engine that the package leans on, in one place.

tests/test_compat.py names the one that a DeepSpeed version moved. The methods of PipelineModule that `RecommenderPipe`
overrides are in models/pipeline.py, watched by tests/test_models_private.py.
"""

import contextlib
import types
import warnings
from collections.abc import Callable

import torch
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups

from ds_recsys.method_hook import MethodHook

MODEL_STEP = "_take_model_step"  # of an engine: clip, optimizer, zero the gradients, scheduler, counters
AGGREGATE_LOSS = "_aggregate_total_loss"  # of a PipelineEngine: the mean loss over the data axis, told to all stages


def skip_compiled_collectives() -> None:
    """Keep `init_distributed` on CPU from compiling `deepspeed_shm_comm`.

    The build takes about 40 s at the first start and needs a C++ compiler, which slim images lack; gloo serves without it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def silence_deepspeed() -> None:
    """Two warnings of torch about what DeepSpeed 0.19 does on a tensor axis and with row-sparse gradients, at every rank."""
    for message in (".*all_gather_into_tensor. is deprecated", "Sparse invariant checks are implicitly disabled"):
        warnings.filterwarnings("ignore", message=message)


def clip_tied_weights_once(engine) -> None:
    """Clip fp32 gradients by their true norm, also when a weight is held by several stages or tensor ranks.

    DeepSpeed 0.19 clips by default (at 1.0). Its ZeRO and bf16 optimizers skip the copies of a tied weight that it marks
    as `ds_pipe_replicated`, and count what is not marked `tensor_model_parallel` on tensor rank 0 alone; the plain path
    of stage 0 counts each copy, so the norm would grow with the number of stages and of tensor ranks.
    """

    def clip_fp32_gradients(self):
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        for parameter in parameters:
            if parameter.grad.is_sparse:  # a row that is named twice has the norm of the sum
                parameter.grad = parameter.grad.coalesce()
        first = self.mpu.get_tensor_model_parallel_rank() == 0
        owned = [
            _dense(parameter.grad)
            for parameter in parameters
            if not parameter.ds_pipe_replicated and (first or is_model_parallel_parameter(parameter))
        ]
        # added up in fp64, so that its fp32 value does not depend on which stage holds which layer
        squares = (torch.linalg.vector_norm(gradient).double().square() for gradient in owned)
        square = sum(squares, torch.zeros((), dtype=torch.float64, device=self.device))
        torch.distributed.all_reduce(square, group=self.mpu.get_model_parallel_group())
        factor = (self.gradient_clipping() / (square.sqrt().float() + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            _dense(parameter.grad).mul_(factor)

    engine.clip_fp32_gradients = types.MethodType(clip_fp32_gradients, engine)


def reduce_tied_gradients_by(engine, reduce: Callable) -> None:
    """Replace the all-reduce of tied weights' gradients between their stages by `reduce(gradient, group) -> sum`."""

    def reduce_tied_gradients(self):
        for weight, group in self.module.get_tied_weights_and_groups():
            weight.grad = reduce(weight.grad, group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceTiedGrads: reduce_tied_gradients}


@contextlib.contextmanager
def wrapped_instructions(engine, wrap: Callable):
    """For the time of a `train_batch`, run `wrap(name, method)` in place of each instruction's method of the schedule.

    What else replaces an instruction, before or after, is wrapped too, for the map is read when the context is entered.
    """
    own = vars(engine).get("_INSTRUCTION_MAP")
    engine._INSTRUCTION_MAP = {kind: wrap(kind.__name__, method) for kind, method in engine._INSTRUCTION_MAP.items()}
    try:
        yield
    finally:
        if own is None:
            del engine._INSTRUCTION_MAP
        else:
            engine._INSTRUCTION_MAP = own


def install_backend(kind: type) -> object:
    """Make DeepSpeed's communication backend a `kind`, a subclass of its own, and return it; again, the one in place."""
    from deepspeed.comm import comm

    if not isinstance(comm.cdb, kind):
        backend = kind.__new__(kind)  # the process groups exist: nothing may be initialised again
        vars(backend).update(vars(comm.cdb))
        comm.cdb = backend
    return comm.cdb


def data_parallel_group(engine):
    """The group over which the engine averages gradients at stage 0."""
    if engine.pipeline_parallelism:
        return engine.mpu.get_data_parallel_group()
    return groups._get_sequence_data_parallel_group()


def clipping_group():
    """The group over which DeepSpeed's own clipping of fp32 gradients averages their norm."""
    return groups._get_data_parallel_group()


def step_loss(engine) -> torch.Tensor | None:
    """Of a PipelineEngine inside a step, the mean loss of this replica's micro-batches so far, as a copy.

    None on other stages than the last, and where the model reports more losses than one.
    """
    if not engine.is_last_stage() or engine.total_loss is None or engine.total_additional_losses is not None:
        return None
    return engine.total_loss.detach().clone() / engine.gradient_accumulation_steps()


def casts_gradients(engine) -> bool:
    """Whether the config's `communication_data_type` says what gradients are sent as."""
    return engine._config.communication_data_type is not None


def average_gradients(engine, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their averages over the data axis, all in one bucket, as the engine makes them at stage 0: views of one buffer.

    Args:
        gradients: of one dtype. A lone one is averaged in place, if it is contiguous.
    """
    group = data_parallel_group(engine)
    cuts = 1 if engine.pipeline_parallelism else engine.sequence_parallel_size
    replicas = torch.distributed.get_world_size(group) / cuts
    return engine.unflatten(engine.allreduce_bucket(gradients, group, replicas), gradients)


def gradients_for_reduction(engine) -> list:
    """What the engine would reduce at stage 0; parameters without a gradient get one of zeros, sparse ones are wrapped."""
    return engine._get_gradients_for_reduction()[0]


def fp32_gradients(optimizer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The gradient accumulator of each parameter of a BF16_Optimizer; views of flat buffers that last."""
    pairs = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    return {weight: value for weights, values in pairs for weight, value in zip(weights, values, strict=True)}


def mark_gradients(optimizer) -> None:
    """Tell a BF16_Optimizer that each of its accumulators holds a gradient: those without count in no norm."""
    optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.fp32_groups_has_gradients]


def says_peer_is_gone(error: RuntimeError) -> bool:
    """Whether a collective or a message failed because a process it needs has ended, or was silent for too long."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timeout")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def bucket_parameters(optimizer, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The parameters in the bucket that a ZeRO-1 or ZeRO-2 optimizer is about to reduce, in the order of its buffer."""
    return [optimizer.bit16_groups[group][index] for group, index, _ in optimizer.ipg_buckets[dtype].params]


def inside_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, which on a GPU is not the thread that asked for it."""
    return torch._C._current_graph_task_id() != -1


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient's memory: of a row-sparse one its rows, coalesced before."""
    return gradient.values() if gradient.is_sparse else gradient


def keep_buffer_dtypes(engine) -> None:
    """Let a stage receive activations of one dtype and send others: its buffers serve all, whatever their dtype is."""

    def allocate_or_extend_buffers(method, index, shape, dtype):
        buffers = engine._grad_layer_buf
        if index < len(buffers) and buffers[index].dtype != dtype:
            buffers[index] = buffers[index].new_empty(0, dtype=dtype)
        return method(index, shape, dtype)

    MethodHook(engine, "_allocate_or_extend_buffers", allocate_or_extend_buffers)


def seed_dropout(engine, step: int) -> None:
    """Make the dropout of the coming `train_batch` a function of (base seed, step), whatever ran before it.

    PipelineModule with `seed_layers` derives each layer's seed from the number of forward passes so far.
    """
    engine.module.micro_offset = step * engine.micro_batches


def forward_only(engine, batches, micro_batches: int) -> list | None:
    """Run `micro_batches` forward passes; the last stage gets the list of its outputs, the other stages None.

    `eval_batch` writes the mean of its output to the monitor and adds the outputs up. Neither suits outputs that are
    hidden states of different lengths, so the monitor is off, the sum is dropped, and shapes travel with each tensor.
    """
    engine.reset_activation_shape()
    with _forward_only(engine):
        outputs = engine.eval_batch(
            iter(batches), compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=micro_batches
        )
    engine.reset_activation_shape()
    return outputs


class _DropSum:
    """A running total that forgets what is added to it."""

    def __iadd__(self, other):
        return self


@contextlib.contextmanager
def _forward_only(engine):
    # Tensor ranks send whole outputs, for what they know of each other's shares is kept from the first micro-batch on.
    changed = {
        "dynamic_shape": True,
        "total_loss": _DropSum(),
        "is_pipe_partitioned": False,
        "is_grad_partitioned": False,
    }
    before = {name: getattr(engine, name) for name in changed}
    monitor = engine.monitor.enabled
    try:
        vars(engine).update(changed)
        engine.monitor.enabled = False
        yield
    finally:
        vars(engine).update(before)
        engine.monitor.enabled = monitor
