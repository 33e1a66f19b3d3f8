"""The private names of DeepSpeed that ds_recsys/compat.py leans on are still there and still mean the same."""

import inspect
import re

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import TorchBackend
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

import ds_recsys.compat


@pytest.mark.parametrize(
    "owner, method, needles",
    [
        (
            PipelineModule.__init__,
            "PipelineModule.__init__",
            ["self._partition_layers(method=", "self.micro_offset = 0"],
        ),
        (PipelineModule._partition_layers, "PipelineModule._partition_layers", ["self._set_bounds(", "self.parts"]),
        (
            DeepSpeedEngine._reduce_non_expert_gradients,
            "DeepSpeedEngine._reduce_non_expert_gradients",
            [
                "self.mpu.get_data_parallel_group()",
                "_get_sequence_data_parallel_group()",
                "/ float(self.sequence_parallel_size)",
            ],
        ),
        (
            DeepSpeedEngine.allreduce_and_copy,
            "DeepSpeedEngine.allreduce_and_copy",
            [
                "self.allreduce_bucket(small_bucket, dp_group, dp_world_size)",
                "self.unflatten(allreduced, small_bucket)",
            ],
        ),
        (
            DeepSpeedEngine.allreduce_bucket,
            "DeepSpeedEngine.allreduce_bucket",
            [
                "bucket, dp_group, dp_world_size=None",
                "self.flatten(bucket)",
                "self.communication_data_type",
                "dist.all_reduce(",
            ],
        ),
        (
            DeepSpeedEngine,
            "DeepSpeedEngine.allreduce_gradients",
            ["self.buffered_allreduce_fallback("],
        ),
        (
            DeepSpeedEngine._take_model_step,
            "DeepSpeedEngine._take_model_step",
            ["self.lr_scheduler.step(", "self.global_steps += 1", "self.global_samples += self.train_batch_size()"],
        ),
        (
            PipelineEngine._aggregate_total_loss,
            "PipelineEngine._aggregate_total_loss",
            ["dist.all_reduce(agg_loss, group=self.mpu.get_data_parallel_group())", "agg_loss /= self.dp_world_size"],
        ),
        (
            BF16_Optimizer.get_grads_for_norm,
            "BF16_Optimizer.get_grads_for_norm",
            ["self.fp32_groups_has_gradients[i][j]"],
        ),
        (PipelineEngine._exec_reduce_grads, "PipelineEngine._exec_reduce_grads", ["self.allreduce_gradients("]),
        (PipelineEngine._bf16_reduce_grads, "PipelineEngine._bf16_reduce_grads", ["self.buffered_allreduce_fallback("]),
        (
            DeepSpeedEngine._take_model_step,
            "DeepSpeedEngine._take_model_step",
            ["self.optimizer.step()", 'hasattr(self.optimizer, "overflow")', "self.skipped_steps += 1"],
        ),
        (
            BF16_Optimizer.accumulate_hp_grads_and_remove_lp,
            "BF16_Optimizer.accumulate_hp_grads_and_remove_lp",
            ["self.immediate_grad_update"],
        ),
        (BF16_Optimizer._update_hp_grad, "BF16_Optimizer._update_hp_grad", ["self.fp32_groups_gradients[group_idx]"]),
        (
            DeepSpeedZeroOptimizer.average_tensor,
            "DeepSpeedZeroOptimizer.average_tensor",
            ["for i, param_idx_in_group, param_id in bucket.params", "self.bit16_groups[i][param_idx_in_group]"],
        ),
        (
            DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks,
            "DeepSpeedZeroOptimizer.allreduce_and_copy_with_multiple_ranks",
            ["self.allreduce_bucket(small_bucket", "in bucket_rank if isinstance(bucket_rank"],
        ),
        (TorchBackend, "TorchBackend.all_reduce", ["self._reduce_op(op)"]),
        (PipelineModule.forward, "PipelineModule.forward", ["self.micro_offset += 1", "self.seed_fn(new_seed)"]),
        (
            PipelineEngine._exec_forward_pass,
            "PipelineEngine._exec_forward_pass",
            ["self.total_loss", "self.fwd_outputs"],
        ),
        (PipelineEngine._exec_send_activations, "PipelineEngine._exec_send_activations", ["self.dynamic_shape"]),
        (PipelineEngine.eval_batch, "PipelineEngine.eval_batch", ["reduce_output", "self.monitor.enabled"]),
        (
            PipelineEngine._exec_schedule,
            "PipelineEngine._exec_schedule",
            ["self._INSTRUCTION_MAP[type(cmd)]", "self._exec_instr = MethodType(", "self._exec_instr(**cmd.kwargs)"],
        ),
        (
            PipelineEngine._exec_reduce_tied_grads,
            "PipelineEngine._exec_reduce_tied_grads",
            ["self.module.get_tied_weights_and_groups()"],
        ),
        (PipelineEngine._exec_recv_activations, "PipelineEngine._exec_recv_activations", ["self.is_pipe_partitioned"]),
        (PipelineModule.__init__, "PipelineModule.__init__", ["self._grid = PipelineParallelGrid(", "self._build()"]),
        (clip_grad_norm_, "deepspeed.runtime.utils.clip_grad_norm_", ["is_model_parallel_parameter(p)"]),
        (PipelineEngine.reset_activation_shape, "PipelineEngine.reset_activation_shape", ["self.first_output_send"]),
    ],
)
def test_private_name_has_not_moved(owner, method, needles):
    source = inspect.getsource(owner)
    for needle in needles:
        assert needle in source, (
            f"DeepSpeed {deepspeed.__version__} changed {method} ({needle!r} is gone): adapt {ds_recsys.compat.__file__}"
        )


def test_every_instruction_has_a_place_in_the_timeline():
    from ds_recsys.timeline.step_timeline import _INSTRUCTIONS

    assert {kind.__name__ for kind in PipelineEngine._INSTRUCTION_MAP} == _INSTRUCTIONS.keys(), (
        f"DeepSpeed {deepspeed.__version__} has other instructions: adapt ds_recsys/timeline/step_timeline.py"
    )


def test_a_backward_pass_is_recognised_in_its_thread():
    seen = []
    value = torch.ones(1, requires_grad=True)
    value.register_hook(lambda _: seen.append(ds_recsys.compat.inside_backward()))
    value.sum().backward()
    assert seen == [True] and not ds_recsys.compat.inside_backward()


@pytest.mark.parametrize(
    "function",
    "all_reduce broadcast reduce all_gather all_gather_single gather scatter reduce_scatter reduce_scatter_single "
    "all_to_all all_to_all_single isend irecv barrier all_reduce_coalesced".split(),
)
def test_torch_hands_collectives_to_the_methods_that_the_timeline_wraps(function):
    from ds_recsys.timeline.collectives import _METHODS

    source = inspect.getsource(getattr(torch.distributed, function))
    used = set(re.findall(r"(?:group|pg)\.(\w+)\(", source)) - {"rank", "size"}
    assert used and used <= _METHODS.keys() & vars(torch.distributed.ProcessGroup).keys(), torch.__version__
    assert "wait" in vars(torch.distributed.Work)


def test_compiled_collectives_can_be_skipped():
    ds_recsys.compat.skip_compiled_collectives()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None, (
        f"DeepSpeed {deepspeed.__version__} builds shm_comm all the same: adapt ds_recsys/compat.py"
    )
