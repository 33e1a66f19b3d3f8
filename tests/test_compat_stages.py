"""The private names of DeepSpeed that ds_recsys/compat_stages.py leans on are still there and still mean the same."""

import inspect

import deepspeed
import pytest
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.mixed_precision_linkage import link_hp_params
from deepspeed.utils.tensor_fragment import tensor_fragment

import ds_recsys.compat_stages


@pytest.mark.parametrize(
    "owner, needles",
    [
        (
            PipelineModule._build,
            [
                "specs[self._local_start:self._local_stop]",
                "elif isinstance(layer, nn.Module):",
                "if layer.key not in self.tied_modules:",
                "self.tied_weight_attrs[layer.key] = layer.tied_weight_attr",
                "self.forward_funcs.append(layer)",
                "self.fwd_map.update(",
                "p.ds_pipe_replicated = False",
            ],
        ),
        (
            PipelineModule._index_tied_modules,
            [
                "self.stage_owner(idx)",
                "'group': group",
                "dist.new_group(ranks=tied_ranks)",
                "p.ds_pipe_replicated = True",
            ],
        ),
        (
            PipelineModule._precompute_checkpointable_values,
            ["self.is_checkpointable_results_interval", "self.is_checkpointable_results = []"],
        ),
        (PipelineModule.forward, ["self.is_checkpointable_results", "self.micro_offset + 1"]),
        (PipelineModule._set_bounds, ["self._local_start = start", "self._local_stop = stop"]),
        (PipelineModule.__init__, ["self._layer_specs = list(layers)", "self.tied_comms = self._index_tied_modules()"]),
        (PipelineParallelGrid.stage_to_global, ["me._replace(pipe=stage_id"]),
        (PipelineEngine.__init__, ["self.num_pipe_buffers = 0", "self.pipe_buffers = {"]),
        (PipelineEngine.reset_activation_shape, ["self.first_output_send = True", "self.pipe_recv_buf = None"]),
        (
            DeepSpeedEngine._configure_optimizer,
            [
                "isinstance(client_optimizer, tuple(self._supported_optims()))",
                "self.basic_optimizer = basic_optimizer",
                "self.optimizer = basic_optimizer",
            ],
        ),
        (DeepSpeedEngine.__init__, ["self.param_names = {param: name", "self.optimizer.register_grad_acc_post_hook("]),
        (BF16_Optimizer, ["self.bf16_groups", "self.fp32_groups_flat_partition", "lp._hp_grad = hp_grad"]),
        (BF16_Optimizer.step, ["get_global_norm_of_tensors(input_tensors=non_expert_grads_for_norm"]),
        (BF16_Optimizer.destroy, ["p._hp_mapping = None", "hook.remove()"]),
        (BF16_Optimizer._lazy_init_hp_params_optimizer_state, ["self._hp_optimizer_states_linked"]),
        (DeepSpeedZeroOptimizer, ["self.bit16_groups", "self.single_partition_of_fp32_groups", "self.loss_scaler ="]),
        (DeepSpeedZeroOptimizer.destroy, ["p._hp_mapping = None", "hook.remove()"]),
        (DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state, ["self._hp_optimizer_states_linked"]),
        (FP16_UnfusedOptimizer, ["self.fp16_groups", "self.fp32_groups", "self.loss_scale_config ="]),
        (FP16_Optimizer, ["self.fp16_groups", "self.fp32_groups_flat", "self.loss_scale_config ="]),
        (link_hp_params, ["lp_param._hp_mapping = get_hp_fragment_mapping("]),
        (
            tensor_fragment,
            ["lp_fragment_address: fragment_address", "hp_fragment_address: fragment_address"],
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_private_name_has_not_moved(owner, needles):
    source = inspect.getsource(owner)
    for needle in needles:
        assert needle in source, (
            f"DeepSpeed {deepspeed.__version__} changed {owner.__qualname__} ({needle!r} is gone): adapt "
            f"{ds_recsys.compat_stages.__file__}"
        )
