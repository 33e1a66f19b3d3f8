"""The private names of DeepSpeed that moving layers between the stages of a running PipelineEngine leans on.

tests/test_compat_stages.py names the one that a DeepSpeed version moved. Written against DeepSpeed 0.19.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.pipe import TiedLayerSpec
from torch import Tensor, nn
from torch.nn import Parameter

# what an optimizer's wrapper carries from step to step, beside the state of the parameters
_CARRIED = (
    "loss_scaler loss_scale_config overflow custom_loss_scaler external_loss_scale torch_autocast_gradscaler clip_grad "
    "has_executed_step _global_grad_norm _backward_hook_state _is_gradient_accumulation_boundary"
).split()


def layer_list(module) -> list:
    """What a PipelineModule was made of: modules, LayerSpecs, TiedLayerSpecs and functions, of all stages."""
    return module._layer_specs


def rank_of_stage(module, stage: int) -> int:
    """The global rank with this process's data and tensor rank on another stage."""
    return module._grid.stage_to_global(stage)


def tensor_rank(module) -> int:
    """Of this process on the tensor axis."""
    return module._grid.get_slice_parallel_rank()


def set_stage(module, bounds: Sequence[int], layers: dict[str, nn.Module]) -> None:
    """Make a PipelineModule's stage of this rank out of `layers` (by name: "3", "tied_modules.key"). Collective.

    Nothing is built. The process groups of tied modules are made anew where the stages that hold one change.
    """
    specs, tied_before = module._layer_specs, _tied_stages(module)
    candidates = [*module.parameters(), *(p for layer in layers.values() for p in layer.parameters())]
    replicated = {p for p in candidates if getattr(p, "ds_pipe_replicated", False)}  # `_build` unmarks all
    for name in {str(place) for place in range(len(specs))} & module._modules.keys():
        delattr(module, name)
    start, stop = bounds[module.stage_id], bounds[module.stage_id + 1]
    keys = {spec.key: spec.tied_weight_attr for spec in specs[start:stop] if isinstance(spec, TiedLayerSpec)}
    module.tied_modules = nn.ModuleDict({key: layers[f"tied_modules.{key}"] for key in keys})
    module.tied_weight_attrs = keys
    module.forward_funcs, module.fwd_map = [], {}
    module.parts = list(bounds)
    module._set_bounds(start=start, stop=stop)
    module._layer_specs = [layers.get(str(place), spec) for place, spec in enumerate(specs)]
    try:
        module._build()
    finally:
        module._layer_specs = specs
    if _tied_stages(module) != tied_before:
        replicated -= set(module.tied_modules.parameters())
        for tied in module.tied_comms.values():
            deepspeed.comm.destroy_process_group(tied["group"])
        module.tied_comms = module._index_tied_modules()
    for parameter in replicated:
        parameter.ds_pipe_replicated = True
    # forward pairs the layers with this cache and would leave out those that it lacks
    module.is_checkpointable_results, module.is_checkpointable_results_interval = [], None
    module._precompute_checkpointable_values()


def _tied_stages(module) -> dict[str, set[int]]:
    tied: dict[str, set[int]] = {}
    for place, spec in enumerate(module._layer_specs):
        if isinstance(spec, TiedLayerSpec):
            tied.setdefault(spec.key, set()).add(module.stage_owner(place))
    return tied


def forget_activations(engine) -> None:
    """Drop what a PipelineEngine keeps of the shapes and the memory of what crosses the stages' boundaries."""
    engine.reset_activation_shape()
    engine.num_pipe_buffers, engine.pipe_buffers = 0, {key: [] for key in engine.pipe_buffers}


def name_parameters(engine) -> None:
    """Tell the engine the names of the parameters that its module has now."""
    engine.param_names = {parameter: name for name, parameter in engine.module.named_parameters()}


def torch_optimizer(engine) -> torch.optim.Optimizer:
    """The optimizer that steps, inside DeepSpeed's wrapper or without one."""
    return engine.optimizer if is_unwrapped(engine) else engine.optimizer.optimizer


def is_unwrapped(engine) -> bool:
    """Whether a torch optimizer updates the model's parameters themselves (fp32, ZeRO 0)."""
    return engine.optimizer is engine.basic_optimizer


def fails_without_norm(engine) -> bool:
    """Whether the optimizer breaks where no gradient of a stage counts in the norm."""
    return hasattr(engine.optimizer, "bf16_groups")


@dataclass(frozen=True)
class Fragment:
    """Where an optimizer keeps what this rank has of a parameter.

    Attributes:
        holder: what the torch optimizer updates: the parameter, its fp32 master copy, or a flat buffer of many.
        begin: where the values begin in the flattened holder.
        start: where they begin in the flattened parameter.
        numel: how many; 0 where other data-parallel ranks have all of them.
    """

    group: int
    holder: Tensor
    begin: int
    start: int
    numel: int


def fragments(engine) -> dict[Parameter, Fragment]:
    """Of every parameter that this rank's optimizer updates, by group, in the optimizer's order."""
    optimizer, found = engine.optimizer, {}
    if is_unwrapped(engine):
        for group, options in enumerate(optimizer.param_groups):
            found |= {p: Fragment(group, p, 0, 0, p.numel()) for p in options["params"]}
    elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, pairs in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)):
            found |= {p: Fragment(group, q, 0, 0, p.numel()) for p, q in zip(*pairs, strict=True)}
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        for group, (parameters, flat) in enumerate(zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)):
            begin = 0
            for p in parameters:
                found[p] = Fragment(group, flat, begin, 0, p.numel())
                begin += p.numel()
    else:
        bf16 = hasattr(optimizer, "bf16_groups")
        groups = optimizer.bf16_groups if bf16 else optimizer.bit16_groups
        flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
        for group, (parameters, flat) in enumerate(zip(groups, flats, strict=True)):
            found |= {p: _partitioned(group, flat, p._hp_mapping) for p in parameters}
    return found


def _partitioned(group: int, flat: Tensor, mapping) -> Fragment:
    if mapping is None:
        return Fragment(group, flat, 0, 0, 0)
    held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(group, flat, held.start, own.start, own.numel)


def release_parameters(engine) -> None:
    """Take the hooks and the links of DeepSpeed's wrapper off the parameters; its buffers stay as they are."""
    wrapped = list(fragments(engine))
    if hasattr(engine.optimizer, "destroy"):
        engine.optimizer.destroy()
    for parameter in wrapped:
        for link in ("_hp_mapping", "_hp_grad", "grad_accum", "_dp_group", "_zero_optimizer"):
            vars(parameter).pop(link, None)
        for link in ("get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad"):
            vars(parameter).pop(link, None)


def wrap_again(engine, optimizer: torch.optim.Optimizer) -> None:
    """Wrap `optimizer`, whose groups hold the model's parameters, as the config says. Collective on the data axis.

    The wrapper that `deepspeed.initialize` returned goes on: a user's reference to it must neither be stale nor keep the
    old buffers alive.
    """
    wrapper, carried = engine.optimizer, {}
    unwrapped = is_unwrapped(engine)
    if not unwrapped:
        carried = {name: value for name, value in vars(wrapper).items() if name in _CARRIED}
        vars(wrapper).clear()
    with contextlib.redirect_stdout(io.StringIO()):
        engine._configure_optimizer(optimizer, None)
    if not unwrapped:
        vars(engine.optimizer).update(carried)
        wrapper.__dict__ = vars(engine.optimizer)  # one state for both: the new one's hooks are bound to the new one
        engine.optimizer = wrapper


def link_optimizer_state(engine) -> None:
    """Tell DeepSpeed's partitioning wrappers where the optimizer's state is now."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def unmovable(engine) -> str | None:
    """Why the layers of this engine cannot be moved, or None."""
    config, optimizer = engine._config, engine.optimizer
    kinds = ("fp32_groups", "fp32_groups_flat", "bf16_groups", "bit16_groups")
    reasons = {
        "it has no optimizer": optimizer is None or engine.basic_optimizer is None,
        f"where {type(optimizer).__name__} keeps the weights is not known": not is_unwrapped(engine)
        and not any(hasattr(optimizer, kind) for kind in kinds),
        "its optimizer is offloaded": config.zero_config.offload_optimizer is not None
        or config.zero_config.offload_param is not None,
        "a mixture of experts has process groups of its own": engine.has_moe_layers,
        "engine.compile() has compiled its layers": getattr(engine, "_is_compiled", False),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
