"""What must hold between keys, before any process group exists. Each function raises one-line `UserError`s.

`check_file` needs the file alone; `check_grid` the world size; `check_pipeline_engine` holds only for what the trainer
drives, DeepSpeed's PipelineEngine (a plain engine of the user's may well use ZeRO 2 or 3); `check_model` the model.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from ds_recsys.config.schema import Recsys
from ds_recsys.errors import UserError

# The names of layers, width and heads in Hugging Face configs (attribute_map covers these on a config object).
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_file(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    """The checks that need nothing but the config."""
    for key in BATCH_KEYS:
        value = deepspeed.get(key)
        if value is not None and value != "auto" and (type(value) is not int or value < 1):
            raise UserError(f'{source}: "{key}" is {value!r}; give a positive integer or "auto"')
    bf16 = deepspeed.get("bf16", deepspeed.get("bfloat16"))
    if _enabled(deepspeed.get("fp16")) and _enabled(bf16):
        raise UserError(f'{source}: "fp16.enabled" and "bf16.enabled" are both true; keep one of them')
    for name in ("optimizer", "scheduler"):
        block = deepspeed.get(name)
        if block and not isinstance(block.get("type"), str):
            raise UserError(f'{source}: "{name}.type" is {block.get("type")!r}; name one, or remove the block')
        if block and not isinstance(block.get("params", {}), dict):
            raise UserError(f'{source}: "{name}.params" is {block["params"]!r}; give an object')
    if recsys.parallel == "auto":
        _check_open(deepspeed, recsys, source)
    if recsys.parallel is None or "pipe" in recsys.model_fields_set:
        check_bounds(recsys.partition.bounds, recsys.pipe, None, source)
    if recsys.head.blocks > 1 and recsys.tensor > 1:
        raise UserError(
            f'{source}: "recsys.head.blocks" {recsys.head.blocks} does not work with "recsys.tensor" {recsys.tensor}, whose '
            "ranks share the head already; set one of them to 1"
        )
    if recsys.head.blocks > 1 and recsys.model.tie:
        raise UserError(
            f'{source}: "recsys.head.blocks" {recsys.head.blocks} needs a head of its own, and "recsys.model.tie" is true; '
            "change one of them"
        )
    _check_compression(deepspeed, recsys, source)
    _check_data_parallel(deepspeed, recsys, source)
    if recsys.model.num_layers is not None and recsys.model.num_layers + _head_layers(recsys) < recsys.pipe:
        raise UserError(
            f'{source}: "recsys.model.num_layers" {recsys.model.num_layers} is less than "recsys.pipe" {recsys.pipe}: '
            "a stage would be empty; lower pipe or raise num_layers"
        )
    if recsys.model.config is not None:
        check_model(recsys, recsys.model.config, source)


def _check_open(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    """What "parallel": "auto" needs to compare grids."""
    if type(deepspeed.get("train_batch_size")) is not int:
        raise UserError(
            f'{source}: "recsys.parallel" "auto" compares grids that train on the same batch: give "train_batch_size"'
        )
    if recsys.head.blocks > 1:
        raise UserError(
            f'{source}: "recsys.parallel" "auto" does not measure a split head, and "recsys.head.blocks" is '
            f"{recsys.head.blocks}; leave one of them out"
        )


def _head_layers(recsys: Recsys) -> int:
    """Layers of the head that can be a stage without a decoder layer."""
    return recsys.head.blocks if recsys.head.blocks > 1 else 0


def _check_compression(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    if recsys.compression.method == "none":
        return
    what = f'{source}: "recsys.compression.method" "{recsys.compression.method}"'
    if zero_stage(deepspeed) > 2:
        raise UserError(f'{what} does not work with "zero_optimization.stage" 3; use stage 0, 1 or 2')
    if recsys.compression.owner_shares is not None and zero_stage(deepspeed):
        raise UserError(
            f'{source}: "recsys.compression.owner_shares" does not work with "zero_optimization.stage" '
            f"{zero_stage(deepspeed)}, whose shards say who sums what; use stage 0 or leave it out"
        )
    if deepspeed.get("communication_data_type"):
        raise UserError(
            f'{what} and "communication_data_type" "{deepspeed["communication_data_type"]}" both say what gradients are '
            "sent as; remove one"
        )


def _check_data_parallel(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    mode = recsys.data_parallel.mode
    if mode == "sync":
        return
    what = f'{source}: "recsys.data_parallel.mode" "{mode}"'
    if recsys.data_shares is not None and recsys.data_parallel.local:
        raise UserError(
            f'{what} does not work with "recsys.data_shares": a replica that trains alone needs a whole share of the batch; '
            'leave it out, or use "sync" or "delayed"'
        )
    stage = zero_stage(deepspeed)
    if stage and recsys.data_parallel.local:
        raise UserError(
            f'{what} does not work with "zero_optimization.stage" {stage}, whose shards of the optimizer assume equal '
            "replicas; use stage 0"
        )
    if stage:
        raise UserError(f'{what} does not work with "zero_optimization.stage" {stage}; use stage 0')
    for name in ("fp16", "bf16", "bfloat16"):
        if _enabled(deepspeed.get(name)) and name == "fp16":
            raise UserError(f'{what} does not work with "fp16.enabled" true, whose loss scale changes; remove it')
        if _enabled(deepspeed.get(name)) and recsys.data_parallel.local:
            raise UserError(
                f'{what} does not work with "{name}.enabled" true, whose optimizer shards its fp32 weights over the '
                "replicas; train in fp32"
            )
        if _enabled(deepspeed.get(name)) and recsys.data_parallel.look_ahead:
            raise UserError(
                f'{what} with "look_ahead" takes a step back, which the rounded weights of "{name}.enabled" true do not; train '
                "in fp32 or leave it out"
            )
    if deepspeed.get("communication_data_type"):
        raise UserError(
            f'{what} sends what "recsys.compression" says, not "communication_data_type" '
            f'"{deepspeed["communication_data_type"]}"; remove the latter'
        )
    if recsys.partition.measured:
        raise UserError(
            f'{what} does not work with "recsys.partition.method" "{recsys.partition.method}": layers would move under it; '
            'use "parameters", "uniform" or bounds'
        )
    if recsys.head.sparse_gradients is True:
        raise UserError(f'{what} does not work with "recsys.head.sparse_gradients" true; use "auto" or false')
    compression = recsys.compression
    if compression.momentum:
        raise UserError(f'{what} does not work with "recsys.compression.momentum", which corrects gradients; remove it')
    if mode == "async":
        for key, applies, reason in (
            ("method", compression.method == "powersgd", "powersgd, which needs all replicas at once; choose another"),
            ("error_feedback", not compression.error_feedback, "false: what was not sent is sent later; remove it"),
            ("warmup_steps", compression.warmup_steps, "above 0: there are no common steps; remove it"),
            ("owner_shares", compression.owner_shares, "set: there nobody sums for others; remove it"),
        ):
            if applies:
                raise UserError(f'{what} does not work with "recsys.compression.{key}" {reason}')


def check_bounds(bounds: list[int] | None, pipe: int, num_layers: int | None, source: str) -> None:
    """`bounds` must be `pipe` + 1 rising cuts from 0 to `num_layers` (the pipeline's layers; None: not known yet)."""
    if bounds is None:
        return
    what = f'{source}: "recsys.partition.bounds" {bounds}'
    if len(bounds) != pipe + 1:
        raise UserError(f'{what} has {len(bounds)} values, "recsys.pipe" {pipe} needs {pipe + 1}; give one per cut')
    if bounds[0] != 0:
        raise UserError(f"{what} starts at {bounds[0]}; start at 0, the first pipeline layer")
    if any(right <= left for left, right in itertools.pairwise(bounds)):
        raise UserError(f"{what} does not rise, so a stage would be empty; give each stage a layer")
    if num_layers is not None and bounds[-1] != num_layers:
        raise UserError(f"{what} ends at {bounds[-1]}, the model has {num_layers} pipeline layers; end at {num_layers}")


def check_grid(recsys: Recsys, world_size: int, source: str) -> int:
    """The size of the data axis. `world_size` must equal pipe x data x tensor."""
    stages = recsys.pipe * recsys.tensor
    grid = f'"recsys.pipe" {recsys.pipe} x "recsys.tensor" {recsys.tensor}'
    if recsys.data == "auto":
        if world_size % stages:
            raise UserError(
                f"{source}: {world_size} rank(s) cannot be divided by {grid} = {stages}; "
                f"start a multiple of {stages} ranks or change the grid"
            )
        return world_size // stages
    if stages * recsys.data != world_size:
        raise UserError(
            f'{source}: {grid} x "recsys.data" {recsys.data} = {stages * recsys.data} but {world_size} rank(s) were '
            f'started; start {stages * recsys.data} ranks or change the grid ("data": "auto" fits it)'
        )
    return recsys.data


def check_shares(recsys: Recsys, data: int, source: str) -> None:
    """A share for each of `data` replicas."""
    for key, shares in (
        ("data_shares", recsys.data_shares),
        ("compression.owner_shares", recsys.compression.owner_shares),
    ):
        if shares is not None and len(shares) != data:
            raise UserError(
                f'{source}: "recsys.{key}" has {len(shares)} number(s), the data axis {data} replica(s); give one to each, '
                "or leave it out"
            )


def check_pipeline_engine(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    """What DeepSpeed's PipelineEngine, which the trainer always drives, cannot do."""
    stage = zero_stage(deepspeed)
    if stage >= 2:
        raise UserError(
            f'{source}: "zero_optimization.stage" {stage} with "recsys.pipe" {recsys.pipe}: the trainer always drives '
            "DeepSpeed's PipelineEngine (also at pipe 1), which excludes ZeRO 2 and 3; set stage to 0 or 1"
        )
    stages = (deepspeed.get("pipeline") or {}).get("stages", "auto")
    if stages not in ("auto", recsys.pipe):
        raise UserError(
            f'{source}: "pipeline.stages" {stages!r} and "recsys.pipe" {recsys.pipe} disagree; remove "pipeline.stages"'
        )
    interval = (deepspeed.get("pipeline") or {}).get("activation_checkpoint_interval", 0)
    if interval not in (0, recsys.training.activation_checkpoint_interval):
        raise UserError(
            f'{source}: "pipeline.activation_checkpoint_interval" {interval!r} and '
            f'"recsys.training.activation_checkpoint_interval" {recsys.training.activation_checkpoint_interval} '
            "disagree; remove the former"
        )
    autotp = (deepspeed.get("tensor_parallel") or {}).get("autotp_size", 0)
    if autotp not in (0, 1):
        raise UserError(f'{source}: "tensor_parallel.autotp_size" {autotp!r} does not work with a pipeline; remove it')
    if deepspeed.get("sequence_parallel_size", 1) not in (1, "auto"):
        raise UserError(
            f'{source}: "sequence_parallel_size" {deepspeed["sequence_parallel_size"]!r} does not work with a '
            "pipeline; remove it"
        )


def check_model(recsys: Recsys, model_config: Any, source: str) -> None:
    """Layers against stages, width against heads, heads against `tensor`; `model_config`: an HF config or its dict."""
    layers, hidden, heads = (_number(model_config, names) for names in (_LAYERS, _HIDDEN, _HEADS))
    layers = recsys.model.num_layers if recsys.model.num_layers is not None else layers
    if layers is not None and layers + _head_layers(recsys) < recsys.pipe:
        raise UserError(
            f'{source}: the model has {layers} decoder layer(s), fewer than "recsys.pipe" {recsys.pipe} stages; '
            "lower pipe or use a deeper model"
        )
    # With a head_dim of their own the heads need not fill the hidden size (Gemma, Qwen3).
    if hidden and heads and not _number(model_config, ("head_dim",)) and hidden % heads:
        raise UserError(
            f"{source}: the model's hidden size {hidden} is not divisible by its {heads} heads; change one of them"
        )
    if heads and heads < recsys.tensor:
        raise UserError(
            f'{source}: the model\'s {heads} heads are fewer than "recsys.tensor" {recsys.tensor}; lower tensor'
        )


def check_head(deepspeed: Mapping[str, Any], recsys: Recsys, source: str) -> None:
    """The head's loss against precision, ZeRO stage and optimizer."""
    if recsys.head.loss != "full" and recsys.training.label_smoothing:
        raise UserError(
            f'{source}: "recsys.training.label_smoothing" {recsys.training.label_smoothing} needs "recsys.head.loss" '
            f'"full", not "{recsys.head.loss}"; remove one of them'
        )
    reason = no_sparse_gradients(deepspeed)
    if recsys.head.sparse_gradients is True and reason:
        raise UserError(f'{source}: "recsys.head.sparse_gradients" true does not work with {reason}; use "auto"')
    if recsys.sequence_parallel and recsys.tensor == 1:
        raise UserError(f'{source}: "recsys.sequence_parallel" true needs "recsys.tensor" above 1, not 1; change one')
    if recsys.sequence_parallel and recsys.dataset.max_length % recsys.tensor:
        raise UserError(
            f'{source}: with "recsys.sequence_parallel" the "recsys.dataset.max_length" {recsys.dataset.max_length} must '
            f'be a multiple of "recsys.tensor" {recsys.tensor}; change one'
        )


def no_sparse_gradients(deepspeed: Mapping[str, Any]) -> str | None:
    """What in DeepSpeed's keys keeps gradients from staying rows; None when nothing does."""
    if zero_stage(deepspeed):
        return f'"zero_optimization.stage" {zero_stage(deepspeed)}, which flattens gradients'
    for name in ("fp16", "bf16", "bfloat16"):
        if _enabled(deepspeed.get(name)):
            return f'"{name}.enabled" true, whose optimizer flattens gradients'
    kind = (deepspeed.get("optimizer") or {}).get("type", "AdamW")
    if kind.lower() not in ("adam", "adamw"):
        return f'"optimizer.type" "{kind}"; it is Adam or AdamW that has a form for rows'
    return None


def hidden_size(model_config: Any) -> int | None:
    """Width of the model, from its Hugging Face config or its dict."""
    return None if model_config is None else _number(model_config, _HIDDEN)


def zero_stage(deepspeed: Mapping[str, Any]) -> int:
    """The ZeRO stage a config asks for; 0 without one. `true` is DeepSpeed's old spelling of stage 1."""
    block = deepspeed.get("zero_optimization") or {}
    stage = 1 if block is True else block.get("stage", 0)
    return stage if isinstance(stage, int) else 0


def _enabled(block: Any) -> bool:
    return isinstance(block, dict) and block.get("enabled") is True


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if type(value) is int:
            return value
    return None
