"""Measure, compare, take one: the plan of a run whose config says `"parallel": "auto"`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from ds_recsys.balance.callback import memory_limit
from ds_recsys.comm.hosts import this_host
from ds_recsys.comm.reducer import value_bytes
from ds_recsys.config import Config, zero_stage
from ds_recsys.config.compression import Compression
from ds_recsys.config.resolve import ranks
from ds_recsys.errors import UserError
from ds_recsys.models.specs import ModelBuilder
from ds_recsys.planner import layers, links
from ds_recsys.planner.facts import Facts
from ds_recsys.planner.owners import replica_shares
from ds_recsys.planner.plan import METHODS, MODES, Plan, divisors, plans
from ds_recsys.planner.rule import MUST_GAIN, decide

_TOKENS = 4_096  # of the largest micro-batch that is tried


@dataclass(frozen=True)
class Choice:
    """The plan of a run: the keys that it sets, and why; the same on every rank."""

    values: dict[str, Any]
    reason: str

    def apply(self, config: Config) -> Config:
        """`config` with the plan's keys in place of its own."""
        return config.with_values(self.values)

    def as_dict(self) -> dict:
        """For a checkpoint: a run that resumes on as many ranks keeps its plan."""
        return {"values": self.values, "reason": self.reason, "world_size": dist.get_world_size()}


def known(saved: dict | None) -> Choice | None:
    """The choice that a checkpoint holds, if it is one for as many ranks as there are now."""
    if not saved or saved["world_size"] != dist.get_world_size():
        return None
    return Choice(saved["values"], saved["reason"] + "\n  (as in the checkpoint: nothing was measured anew)")


def choose(config: Config, model_config: PreTrainedConfig, windows, counts: torch.Tensor) -> Choice:
    """What `config` leaves open, decided by measuring. Collective over the world, once.

    Args:
        config: not resolved yet; what it sets by hand is kept.
        windows: of training, as `ds_recsys.assemble.training_windows` makes them.
        counts: int64 [I + 1], how often each item occurs in training.

    Raises:
        UserError: the config does not let plans be compared, or no plan can run.
    """
    open_keys = _Open(config)
    resolved = on_some_grid(config, windows=len(windows), model_config=model_config)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, this_host())
    names = list(dict.fromkeys(found))
    hosts = tuple(names.index(host) for host in found)
    candidates, refused = _runnable(config, model_config, open_keys.plans(hosts))
    if not candidates:
        raise UserError(f"{config.source}: {next(iter(refused.values()), 'no grid fits the ranks')}")
    with torch.random.fork_rng():
        facts, unsplit, optimizer = _measure(resolved, model_config, windows, counts, hosts, candidates, open_keys)
    refused |= {plan: unsplit[plan.tensor] for plan in candidates if plan.tensor in unsplit}
    candidates = [plan for plan in candidates if plan not in refused]
    decided = decide(facts, candidates, zero_stage(resolved.deepspeed))
    decided = replace(decided, refused={**decided.refused, **_grids_without_plan(candidates, refused)})
    values = {**decided.plan.values(), **open_keys.partition(decided.plan), **optimizer.values()}
    choice = [Choice(values, f"{decided.describe(facts)}{optimizer.describe()}")]
    dist.broadcast_object_list(choice)  # every rank decides alike, but for rounding on unlike processors
    return choice[0]


def on_some_grid(config: Config, **known) -> Config:
    """The config resolved on the first grid that its checks let through: with the fewest stages, then tensor ranks.

    For what does not depend on the grid. `known` is for `Config.resolve`; needs no process group.

    Raises:
        UserError: no grid can run.
    """
    world_size, refusal = ranks("WORLD_SIZE") or 1, None
    candidates = _Open(config).plans([0] * world_size)
    for plan in sorted(candidates, key=lambda plan: (plan.pipe, plan.tensor, plan.micro_batches)):
        try:
            return config.with_values(plan.values()).resolve(**known)
        except UserError as error:
            refusal = refusal or error
    raise refusal or UserError(
        f'{config.source}: "train_batch_size" {config.deepspeed["train_batch_size"]} cannot be shared out over {world_size} '
        "ranks as the rest of the config has it; change the batch, the number of ranks, or leave a key of the grid out"
    )


class _Open:
    """What the config leaves to be chosen."""

    def __init__(self, config: Config):
        self.config = config
        recsys, deepspeed = config.recsys, config.deepspeed
        self.batch = deepspeed.get("train_batch_size")
        given = recsys.model_fields_set
        self.fixed = {axis: getattr(recsys, axis) for axis in ("pipe", "data", "tensor") if axis in given}
        self.fixed = {axis: size for axis, size in self.fixed.items() if size != "auto"}
        for key, name in (
            ("train_micro_batch_size_per_gpu", "micro_batch"),
            ("gradient_accumulation_steps", "micro_batches"),
        ):
            if type(deepspeed.get(key)) is int:
                self.fixed[name] = deepspeed[key]
        compression, mode = recsys.compression, recsys.data_parallel
        by_hand = "method" in compression.model_fields_set and compression.method != "auto"
        self.methods = [compression.method] if by_hand else list(METHODS)
        self.modes = [mode.mode] if "mode" in mode.model_fields_set else list(MODES)
        self.look_ahead = mode.look_ahead or "mode" not in mode.model_fields_set
        given = deepspeed.get("optimizer") or {}
        self.adam = given.get("type", "").lower() in ("adam", "adamw")
        self.adam = self.adam and not given.get("params", {}).keys() & {"fused", "foreach", "amsgrad"}
        self.owners_open = compression.owner_shares is None and not zero_stage(deepspeed)
        self.partition_open = not recsys.partition.model_fields_set & {"method", "bounds"}

    @property
    def largest(self) -> int:
        """Windows of the largest micro-batch that is tried."""
        fixed = self.fixed.get("micro_batch")
        length = self.config.recsys.dataset.max_length
        return fixed or max(d for d in divisors(self.batch) if d == 1 or d * length <= _TOKENS)

    def plans(self, hosts) -> list[Plan]:
        return list(plans(hosts, self.batch, self.largest, self.fixed, self.methods, self.modes, self.look_ahead))

    def compression(self, method: str) -> Compression:
        """The block with this method: its other keys as they were given."""
        return self.config.recsys.compression.model_copy(update={"method": method})

    def partition(self, plan: Plan) -> dict[str, Any]:
        """The cut into stages; it is measured again while the run goes on where the mode lets layers move."""
        if plan.pipe == 1 or not self.partition_open:
            return {}
        moving = {"recsys.partition.method": "adaptive"} if plan.mode == "sync" else {}
        return {"recsys.partition.bounds": list(plan.bounds), **moving}


@dataclass(frozen=True)
class _Optimizer:
    """Seconds per parameter of AdamW as the config has it, and of its fused form where that is open."""

    given: float
    fused: float | None

    @property
    def fuse(self) -> bool:
        return self.fused is not None and self.fused < MUST_GAIN * self.given

    @property
    def seconds(self) -> float:
        return self.fused if self.fuse else self.given

    def values(self) -> dict[str, Any]:
        return {"optimizer.params.fused": True} if self.fuse else {}

    def describe(self) -> str:
        if not self.fuse:
            return ""
        return f"\n  fused AdamW: {1e9 * self.fused:.2g} ns a parameter, {1e9 * self.given:.2g} ns otherwise"


def _runnable(config: Config, model_config, candidates: list[Plan]) -> tuple[list[Plan], dict[Plan, str]]:
    """Those that the checks of a config let through, and why the others are not."""
    good, refused = [], {}
    for plan in candidates:
        try:
            config.with_values(plan.values()).resolve(model_config=model_config)
        except UserError as error:
            refused[plan] = str(error).removeprefix(f"{config.source}: ")
        else:
            good.append(plan)
    return good, refused


def _grids_without_plan(candidates: list[Plan], refused: dict[Plan, str]) -> dict[tuple[int, int, int], str]:
    some = {(plan.pipe, plan.data, plan.tensor) for plan in candidates}
    why = {(plan.pipe, plan.data, plan.tensor): reason for plan, reason in refused.items()}
    return {grid: reason for grid, reason in why.items() if grid not in some}


def _measure(
    config: Config, model_config, windows, counts, hosts, candidates: list[Plan], open_keys: _Open
) -> tuple[Facts, dict[int, str], _Optimizer]:
    """(the facts that these plans need; tensor size -> why the layers cannot be shared by so many; optimizer). Collective."""
    recsys, builder = config.recsys, ModelBuilder(model_config)
    largest = max(plan.micro_batch for plan in candidates)
    sizes = sorted({max(1, largest // 4), largest})
    adamw = _adamw(config.deepspeed)
    # rows of a table have a lazy Adam of their own
    fused = open_keys.adam and config.deepspeed["optimizer"]["params"].get("torch_adam") is True
    fused = fused and recsys.head.sparse_gradients is not True
    clips = config.deepspeed.get("gradient_clipping", 1.0) > 0  # as DeepSpeed has it
    kinds, unsplit, slowdowns, pace, copy, ahead = {}, {}, (1.0,) * len(hosts), 0.0, 0.0, 0.0
    optimizer = _Optimizer(0.0, None)
    for tensor in sorted({plan.tensor for plan in candidates}):
        _tell(f"layers, tensor {tensor}")
        try:
            mine = layers.measure(recsys, model_config, windows, counts, sizes, tensor, adamw, fused, clips)
        except UserError as error:
            unsplit[tensor] = str(error)
            continue
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if not kinds:  # ranks of a larger tensor axis wait for each other, and all look alike
            slowdowns = layers.slowdowns_of([one.seconds for one in everyone])
            pace = sum(mine.seconds) / mine.processor_seconds if mine.processor_seconds else 0.0
            pace /= slowdowns[dist.get_rank()]
            other = min(one.fused for one in everyone) if fused else None
            optimizer = _Optimizer(min(one.optimizer for one in everyone), other)
            copy, ahead = min(one.copy for one in everyone), min(one.ahead for one in everyone)
        kinds[tensor] = layers.on_fastest(everyone, slowdowns, tensor)
    sums = {}
    candidates = [plan for plan in candidates if plan.tensor in kinds]
    methods = {plan.method for plan in candidates}
    blocks = [open_keys.compression(method) for method in ("none", *open_keys.methods) if method in {"none", *methods}]
    rates: list[float] = []
    unlike = len(set(hosts)) > 2 and open_keys.owners_open  # two send each other everything
    if unlike and any(plan.data > 2 and plan.method != "none" for plan in candidates):
        _tell("links")
        rates = links.measure_rates(hosts)
    for data, tensor in sorted({(plan.data, plan.tensor) for plan in candidates if plan.data > 1}):
        _tell(f"sums over data {data} beside tensor {tensor}")
        owners = replica_shares(hosts, rates, slowdowns, data, tensor) if rates else ()
        sums[data, tensor] = links.measure_sums(
            data, tensor, list({b.method: b for b in blocks}.values()), pace, owners, model_config.hidden_size
        )
    strides = sorted({plan.data * plan.tensor for plan in candidates if plan.pipe > 1})
    skeleton = builder.skeleton
    weight = skeleton.outer[skeleton.table_name]
    table = sum(parameter.numel() for parameter in skeleton.embedding.parameters())
    facts = Facts(
        hosts,
        slowdowns,
        {tensor: layers.pipeline_layers(builder, found) for tensor, found in kinds.items()},
        sums,
        {stride: links.measure_transfers(stride) for stride in strides},
        optimizer.seconds,
        copy,
        ahead,
        tied=table if skeleton.tied else 0,
        looked_up=recsys.dataset.max_length * weight.shape[1] if recsys.compression.early_head else 0,
        sent={block.method: value_bytes(block, skeleton.table_name, tuple(weight.shape)) for block in blocks},
        sparse=table if recsys.head.sparse_gradients is True else 0,
        bucket=recsys.compression.bucket_elements if recsys.compression.overlap else None,
        shares=tuple(recsys.data_shares) if recsys.data_shares else None,
        tail=builder.tail(),
        memory_limit=memory_limit(recsys.partition),
    )
    return facts, unsplit, optimizer


def _tell(what: str) -> None:
    if dist.get_rank() == 0:
        print(f"parallel auto: measuring {what}", flush=True)


def _adamw(deepspeed: dict) -> dict:
    """What the optimizer block says that changes how long a step takes."""
    params = deepspeed["optimizer"].get("params", {})
    return {name: params[name] for name in ("fused", "foreach", "amsgrad") if name in params}
