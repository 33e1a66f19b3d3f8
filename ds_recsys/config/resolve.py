"""Replaces every "auto" by a value, and fills what DeepSpeed cannot start without.

Batch sizes, with `data` the size of the data axis and a pipeline's gradient accumulation being its micro-batches:
train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data.
- Two of the three given: the third follows. All three: they must agree.
- Only train_batch_size: accumulation is the largest divisor of train_batch_size / data up to 4 x pipe when pipe > 1
  (a pipeline of p stages idles (p - 1) / (m + p - 1) of the time with m micro-batches), else 1.
- Only train_micro_batch_size_per_gpu: accumulation is 4 x pipe when pipe > 1, else 1.
- Neither, one of them "auto": a micro-batch of 8, the default of Hugging Face's Trainer. Neither, none "auto": refused.
"""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_recsys.cache import default_cache
from ds_recsys.config.checks import no_sparse_gradients
from ds_recsys.config.schema import Recsys
from ds_recsys.errors import UserError

_BATCH = "train_batch_size"
_MICRO = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"
BATCH_KEYS = (_BATCH, _MICRO, _ACCUMULATION)
_DEFAULT_EPOCHS = 3
_DEFAULT_MICRO_BATCH = 8
_EVAL_BATCH = 128
_WARMUP_FRACTION = 0.05

Record = Callable[[str, Any], None]


def resolve_batch(deepspeed: dict[str, Any], pipe: int, data: int, source: str, record: Record) -> None:
    """Sets the three batch sizes in `deepspeed` by the rules above; `record(key, value)` hears what was chosen."""
    given = {key: deepspeed.get(key) for key in BATCH_KEYS}
    batch, micro, steps = (None if value == "auto" else value for value in given.values())
    if batch is not None and micro is None:
        # The part of one replica is cut into micro-batches: by `steps`, if given, else by the rule for `pipe`.
        share = _divide(
            batch, data, f'{source}: "{_BATCH}" {batch} cannot be divided over "recsys.data" {data} replicas'
        )
        steps = steps or max(d for d in range(1, (4 * pipe if pipe > 1 else 1) + 1) if share % d == 0)
        micro = _divide(
            share, steps, f'{source}: "{_BATCH}" {batch} / "recsys.data" {data} / "{_ACCUMULATION}" {steps}'
        )
    elif batch is not None and steps is None:
        what = f'{source}: "{_BATCH}" {batch} / "{_MICRO}" {micro} / "recsys.data" {data}'
        steps = _divide(batch, micro * data, what)
    elif batch is None:
        if micro is None and "auto" not in given.values():
            raise UserError(f'{source}: no batch size; give "{_BATCH}", or "{_MICRO}", or set one of them to "auto"')
        micro = micro or _DEFAULT_MICRO_BATCH
        steps = steps or (4 * pipe if pipe > 1 else 1)
        batch = micro * steps * data
    if batch != micro * steps * data:
        raise UserError(
            f'{source}: "{_BATCH}" {batch} is not "{_MICRO}" {micro} x "{_ACCUMULATION}" {steps} x "recsys.data" '
            f"{data} = {micro * steps * data}; change one, or leave one out"
        )
    for key, value in zip(BATCH_KEYS, (batch, micro, steps), strict=True):
        deepspeed[key] = value
        if given[key] in (None, "auto"):
            record(key, value)


def resolve_optimizer(deepspeed: dict[str, Any], recsys: Recsys, source: str, record: Record) -> None:
    """AdamW when none is given; "auto" hyperparameters; PyTorch's Adam, which needs no compiler, unless refused.

    Learning rate "auto": 3e-4 for pretrained weights, 1e-3 for random ones; the rest as torch.optim.AdamW, but without
    weight decay, as Hugging Face's Trainer.
    """
    if deepspeed.get("optimizer") is None:
        deepspeed["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
        record("optimizer.type", "AdamW")
    params = deepspeed["optimizer"].setdefault("params", {})
    adam = deepspeed["optimizer"]["type"].lower() in ("adam", "adamw")
    pretrained = recsys.model.path is not None and recsys.model.weights == "pretrained"
    defaults = {"lr": 3e-4 if pretrained else 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    if adam and "lr" not in params:
        params["lr"] = "auto"
    for key, value in params.items():
        if value == "auto":
            if key not in defaults:
                raise UserError(f'{source}: "optimizer.params.{key}" cannot be "auto"; give a value')
            params[key] = defaults[key]
            record(f"optimizer.params.{key}", params[key])
    zero = deepspeed.get("zero_optimization")
    offloaded = isinstance(zero, dict) and (zero.get("offload_optimizer") or zero.get("cpu_offload"))
    if adam and "torch_adam" not in params and not offloaded:
        params["torch_adam"] = True
        record("optimizer.params.torch_adam", True)
    if deepspeed.get("gradient_clipping") == "auto":
        deepspeed["gradient_clipping"] = 1.0
        record("gradient_clipping", 1.0)


def resolve_schedule(deepspeed: dict[str, Any], total_steps: int | None, source: str, record: Record) -> None:
    """The scheduler's "auto"s. Those that depend on the length of the run stay "auto" while `total_steps` is None.

    total_num_steps: all steps of the run; warmup_num_steps: 5 % of them, at least 1; warmup_max_lr: the optimizer's lr;
    warmup_min_lr and warmup_min_ratio: 0.
    """
    params = (deepspeed.get("scheduler") or {}).get("params") or {}
    values: dict[str, Any] = {
        "warmup_max_lr": deepspeed["optimizer"]["params"].get("lr"),
        "warmup_min_lr": 0.0,
        "warmup_min_ratio": 0.0,
        "total_num_steps": total_steps,
        "warmup_num_steps": None if total_steps is None else max(1, math.ceil(_WARMUP_FRACTION * total_steps)),
    }
    for key, value in params.items():
        if value != "auto":
            continue
        if key not in values:
            raise UserError(f'{source}: "scheduler.params.{key}" cannot be "auto"; give a value')
        if values[key] is not None:
            params[key] = values[key]
            record(f"scheduler.params.{key}", values[key])


def refuse_other_autos(deepspeed: dict[str, Any], source: str) -> None:
    """A top-level "auto" that is left would kill DeepSpeed with a bare TypeError (inside blocks it is harmless)."""
    for key, value in deepspeed.items():
        if value == "auto":
            raise UserError(f'{source}: "{key}" cannot be "auto"; give a value or remove the key')


def resolve_grid(recsys: Recsys, data: int, local_world_size: int, record: Record) -> Recsys:
    """The block with the "auto"s of its grid replaced; `local_world_size` ranks share the cores of this host."""
    changes: dict[str, Any] = {}
    if recsys.data == "auto":
        changes["data"] = data
    if recsys.threads_per_rank == "auto":
        changes["threads_per_rank"] = max(1, usable_cpus() // local_world_size)
    return _changed(recsys, changes, record)


def resolve_pipeline(
    deepspeed: dict[str, Any], recsys: Recsys, hidden_size: int | None, source: str, record: Record
) -> None:
    """What a tensor axis needs of DeepSpeed's "pipeline" block.

    By default each tensor rank sends its share of a stage's output, and the receivers put the shares together. With
    sequence parallelism a rank's output is its own, so it is sent as it is; so is one that does not divide by `tensor`,
    whose shares DeepSpeed 0.19 asks ranks of the wrong stage for.
    """
    if recsys.sequence_parallel:
        reason = '"recsys.sequence_parallel" true'
    elif hidden_size is not None and hidden_size % recsys.tensor:
        reason = f'hidden size {hidden_size} not divisible by "recsys.tensor" {recsys.tensor}'
    else:
        return
    block = deepspeed.setdefault("pipeline", {})
    for key in ("pipe_partitioned", "grad_partitioned"):
        if block.get(key) is True:
            raise UserError(f'{source}: "pipeline.{key}" true does not work with {reason}; remove the key')
        if key not in block:
            block[key] = False
            record(f"pipeline.{key}", False)


def resolve_sparse_gradients(deepspeed: dict[str, Any], recsys: Recsys, record: Record) -> Recsys:
    """Rows wherever the loss leaves most of the table alone, and DeepSpeed and the mode let gradients be rows."""
    if recsys.head.loss == "full":  # touches every row: nothing was decided for the user
        return recsys.model_copy(update={"head": recsys.head.model_copy(update={"sparse_gradients": False})})
    rows = no_sparse_gradients(deepspeed) is None and recsys.data_parallel.mode == "sync"
    return _changed(recsys, {"head.sparse_gradients": rows}, record)


def resolve_rest(recsys: Recsys, record: Record) -> Recsys:
    """The block with its other "auto"s replaced."""
    changes: dict[str, Any] = {}
    if recsys.training.epochs is None and recsys.training.steps is None:
        changes["training.epochs"] = _DEFAULT_EPOCHS
    if recsys.dataset.cache_dir == "auto":
        changes["dataset.cache_dir"] = str(default_cache())
    if recsys.evaluation.batch_size == "auto":
        changes["evaluation.batch_size"] = _EVAL_BATCH
    return _changed(recsys, changes, record)


def _changed(recsys: Recsys, changes: dict[str, Any], record: Record) -> Recsys:
    for key, value in changes.items():
        record(f"recsys.{key}", value)
        block, _, name = key.rpartition(".")
        update = {block: getattr(recsys, block).model_copy(update={name: value})} if block else {name: value}
        recsys = recsys.model_copy(update=update)
    return recsys


def ranks(*names: str) -> int | None:
    """The number in the first of these environment variables that a launcher has set."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def total_steps(recsys: Recsys, steps_per_epoch: int | None) -> int | None:
    """Optimizer steps of the whole run, or None while the length of an epoch is needed and not known."""
    if recsys.training.steps is not None:
        return recsys.training.steps
    return None if steps_per_epoch is None else (recsys.training.epochs or _DEFAULT_EPOCHS) * steps_per_epoch


def usable_cpus() -> int:
    """CPU cores this process may use: its affinity mask, and the quota of its cgroup (v2) where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores


def without_recsys(config: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of DeepSpeed's own keys."""
    return copy.deepcopy({key: value for key, value in config.items() if key != "recsys"})


def _divide(number: int, by: int, what: str) -> int:
    if number % by:
        raise UserError(f"{what}: not a whole number; change one of them")
    return number // by
