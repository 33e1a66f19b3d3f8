"""DeepSpeed's own keys: which exist, which were removed, and which spelling a user meant.

DeepSpeed (0.19) takes any top-level key silently, so a typo such as `zero_optimisation` turns ZeRO off without a word.
The lists are those of deepspeed/runtime/config.py (https://github.com/deepspeedai/DeepSpeed); tests/test_config.py
compares them with the installed version.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from ds_recsys.errors import UserError

TOP_LEVEL = frozenset(
    """activation_checkpointing aio allgather_size autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel flops_profiler fp16
    gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine
    log_level managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization recsys""".split()
)

REMOVED = {
    "amp": 'use "bf16", "fp16" or "torch_autocast"',
    "compression_training": "remove the block",
    "curriculum_learning": 'use "data_efficiency"',
    "eigenvalue": "remove the block",
    "elasticity": "set the batch sizes directly",
    "graph_harvesting": "remove the key",
    "nebula": "remove the block",
    "progressive_layer_drop": "remove the block",
    "quantize_training": "remove the block",
    "sparse_attention": "remove the block",
    "sparse_gradients": "remove the key",
}
REMOVED_ZERO = frozenset({"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"})

# Blocks in which DeepSpeed refuses an unknown key itself, but only after the process group exists.
ZERO = frozenset(
    """stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint
    offload_param offload_optimizer zenflow sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload
    prefetch_bucket_size stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold
    model_persistence_threshold stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters
    max_reuse_distance stage3_max_reuse_distance gather_16bit_weights_on_model_save
    stage3_gather_16bit_weights_on_model_save module_granularity_threshold stage3_module_granularity_threshold
    use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params allgather_sequential
    stage3_allgather_sequential stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1
    round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory
    leaf_module""".split()
)
BF16 = frozenset(
    "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states".split()
)
FP16 = frozenset(
    """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
    min_loss_scale fp16_master_weights_and_grads""".split()
)
BLOCKS = {
    "zero_optimization": ZERO,
    "bf16": BF16,
    "bfloat16": BF16,
    "fp16": FP16,
    "optimizer": frozenset({"type", "params", "legacy_fusion"}),
    "scheduler": frozenset({"type", "params"}),
}
_WARMUP = {"warmup_num_steps", "warmup_type", "last_batch_iteration"}
SCHEDULER_PARAMS = {
    "WarmupLR": frozenset(_WARMUP | {"warmup_min_lr", "warmup_max_lr"}),
    "WarmupDecayLR": frozenset(_WARMUP | {"warmup_min_lr", "warmup_max_lr", "total_num_steps"}),
    "WarmupCosineLR": frozenset(_WARMUP | {"warmup_min_ratio", "cos_min_ratio", "total_num_steps"}),
}

# What users of other trainers write, too far from DeepSpeed's word for a spelling match.
SYNONYMS = {
    "zero": "zero_optimization",
    "batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "grad_accum": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "lr_scheduler": "scheduler",
    "float16": "fp16",
}


def nearest(key: str, valid: Iterable[str], cutoff: float = 0.78) -> str | None:
    """The valid key that `key` most likely misspells, or None when none is near."""
    # difflib depends on the order of equal matches: sorted, so that every rank prints the same word.
    valid = sorted(valid)
    plain = key.strip().lower().replace("-", "_")
    if plain in valid:
        return plain
    if SYNONYMS.get(plain) in valid:
        return SYNONYMS[plain]
    match = difflib.get_close_matches(plain, valid, n=1, cutoff=cutoff)
    return match[0] if match else None


def check_deepspeed_keys(config: dict[str, Any], source: str) -> list[str]:
    """Refuses removed and misspelt keys of DeepSpeed; returns a warning line per unknown key that is near none.

    `config` is the whole ds_config, `source` its name in the lines. Raises `UserError`.
    """
    warnings = []
    for key in config:
        if key in REMOVED:
            raise UserError(f'{source}: key "{key}" was removed from DeepSpeed; {REMOVED[key]}')
        if key in TOP_LEVEL:
            continue
        meant = nearest(key, TOP_LEVEL)
        if meant:
            raise UserError(
                f'{source}: unknown key "{key}", which DeepSpeed would ignore silently; did you mean "{meant}"?'
            )
        warnings.append(
            f'{source}: key "{key}" is unknown to DeepSpeed, which ignores it; remove it if it has no reader'
        )
    if "bf16" in config and "bfloat16" in config:
        raise UserError(f'{source}: "bf16" and "bfloat16" name the same block; keep "bf16"')
    for name, valid in BLOCKS.items():
        _check_block(config, name, valid, source)
    scheduler = config.get("scheduler") or {}
    params = SCHEDULER_PARAMS.get(scheduler.get("type"))
    if params and scheduler.get("params") is not None:
        _check_block(scheduler, "params", params, source, "scheduler.")
    return warnings


def _check_block(config: dict[str, Any], name: str, valid: frozenset[str], source: str, prefix: str = "") -> None:
    block = config.get(name)
    if block is None or (name == "zero_optimization" and isinstance(block, bool)):  # DeepSpeed reads true as stage 1
        return
    if not isinstance(block, dict):
        raise UserError(
            f'{source}: "{prefix}{name}" is {block!r}; give an object, such as {{"{sorted(valid)[0]}": ...}}'
        )
    for key in block:
        if name == "zero_optimization" and key in REMOVED_ZERO:
            raise UserError(f'{source}: key "{name}.{key}" was removed from DeepSpeed; remove it')
        if key not in valid:
            meant = nearest(key, valid)
            hint = f'did you mean "{meant}"?' if meant else f"valid keys: {', '.join(sorted(valid))}"
            raise UserError(f'{source}: unknown key "{key}" in "{prefix}{name}"; {hint}')
