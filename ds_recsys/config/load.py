"""`load_config`: one ds_config in, one frozen `Config` out."""

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_recsys.config import checks, resolve
from ds_recsys.config.block import parse_block
from ds_recsys.config.deepspeed_keys import check_deepspeed_keys
from ds_recsys.config.jsonfile import read_json
from ds_recsys.config.schema import Recsys
from ds_recsys.errors import UserError


@dataclass(frozen=True)
class Config:
    """A checked ds_config.

    recsys:   the typed "recsys" block (defaults when the file has none)
    source:   the file, as errors name it
    warnings: one line each, for rank 0 to print
    resolved: dotted key -> the value that took the place of an "auto" or of a key that was not given
    """

    recsys: Recsys
    source: str
    warnings: tuple[str, ...] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)
    _deepspeed: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def deepspeed(self) -> dict[str, Any]:
        """DeepSpeed's own keys, for `deepspeed.initialize(config=...)`: a fresh copy, for DeepSpeed writes into it."""
        return copy.deepcopy(self._deepspeed)

    @property
    def train_batch_size(self) -> int | None:
        """Sequences per optimizer step over all ranks; None while it is not resolved."""
        value = self._deepspeed.get("train_batch_size")
        return None if value == "auto" else value

    def resolve(
        self,
        *,
        world_size: int | None = None,
        local_world_size: int | None = None,
        windows: int | None = None,
        steps_per_epoch: int | None = None,
        model_config: Any = None,
    ) -> "Config":
        """The config of the trainer's run: cross-checked, every "auto" replaced. Needs no process group.

        world_size:       ranks of the run; None: as the launcher's environment says, else 1
        local_world_size: ranks on this host, which share its cores; None: as the environment says, else all
        windows:          training windows, from which the steps of an epoch follow (the last batch is filled up)
        steps_per_epoch:  the same, counted by the caller; it goes before `windows`
        model_config:     Hugging Face config of the recommender (or its dict; vocab_size is items + 1)
        The scheduler's step counts wait for the third or fourth: they stay "auto" meanwhile, and resolving the result
        again with the missing number fills them in.

        Raises `UserError`, one line, both values named.
        """
        world_size = world_size or resolve.ranks("WORLD_SIZE") or 1
        data = checks.check_grid(self.recsys, world_size, self.source)
        checks.check_shares(self.recsys, data, self.source)
        checks.check_pipeline_engine(self._deepspeed, self.recsys, self.source)
        if model_config is not None:
            checks.check_model(self.recsys, model_config, self.source)
        checks.check_head(self._deepspeed, self.recsys, self.source)

        resolved = dict(self.resolved)
        record = resolved.__setitem__
        deepspeed = self.deepspeed
        recsys = resolve.resolve_grid(
            self.recsys, data, local_world_size or resolve.ranks("LOCAL_WORLD_SIZE", "LOCAL_SIZE") or world_size, record
        )
        recsys = resolve.resolve_rest(recsys, record)
        resolve.resolve_batch(deepspeed, recsys.pipe, data, self.source, record)
        resolve.resolve_optimizer(deepspeed, recsys, self.source, record)
        if steps_per_epoch is None and windows is not None:
            steps_per_epoch = math.ceil(windows / deepspeed["train_batch_size"])
        if recsys.tensor > 1:
            resolve.resolve_pipeline(deepspeed, recsys, checks.hidden_size(model_config), self.source, record)
        if recsys.head.sparse_gradients == "auto":
            recsys = resolve.resolve_sparse_gradients(deepspeed, recsys, record)
        resolve.resolve_schedule(deepspeed, resolve.total_steps(recsys, steps_per_epoch), self.source, record)
        resolve.refuse_other_autos(deepspeed, self.source)
        return replace(self, recsys=recsys, resolved=resolved, _deepspeed=deepspeed)

    def resolve_for_engine(
        self, *, world_size: int | None = None, local_world_size: int | None = None, pipe: int = 1, tensor: int = 1
    ) -> "Config":
        """The config for an engine around the user's own module of `pipe` stages and `tensor` ranks (any ZeRO stage).

        Only "auto" batch sizes and the block's grid are resolved; whatever DeepSpeed can read stays as it was given.
        Raises `UserError`, one line, both values named.
        """
        for key, size, what in (("pipe", pipe, "stage(s)"), ("tensor", tensor, "rank(s) on its tensor axis")):
            given = getattr(self.recsys, key)
            if key in self.recsys.model_fields_set and given != size:
                raise UserError(
                    f'{self.source}: "recsys.{key}" is {given}, the module has {size} {what}; '
                    f"change one of them, or leave {key} out"
                )
        recsys = self.recsys.model_copy(update={"pipe": pipe, "tensor": tensor})
        world_size = world_size or resolve.ranks("WORLD_SIZE") or 1
        data = checks.check_grid(recsys, world_size, self.source)
        resolved = dict(self.resolved)
        recsys = resolve.resolve_grid(
            recsys,
            data,
            local_world_size or resolve.ranks("LOCAL_WORLD_SIZE", "LOCAL_SIZE") or world_size,
            resolved.__setitem__,
        )
        deepspeed = self.deepspeed
        if any(deepspeed.get(key) == "auto" for key in checks.BATCH_KEYS):
            resolve.resolve_batch(deepspeed, pipe, data, self.source, resolved.__setitem__)
        resolve.refuse_other_autos(deepspeed, self.source)
        return replace(self, recsys=recsys, resolved=resolved, _deepspeed=deepspeed)

    def with_values(self, values: Mapping[str, Any]) -> "Config":
        """The config with other values for these dotted keys, as if its file had them; not resolved.

        Raises `UserError`, one line, as `load_config` does.
        """
        changed = {**self.deepspeed, "recsys": self.recsys.model_dump(exclude_unset=True)}
        for key, value in values.items():
            _set(changed, key, value)
        recsys, deepspeed = parse_block(changed["recsys"], self.source), resolve.without_recsys(changed)
        checks.check_file(deepspeed, recsys, self.source)
        return replace(self, recsys=recsys, resolved={**self.resolved, **values}, _deepspeed=deepspeed)

    def describe(self) -> list[str]:
        """What was decided for the user: `key: value (auto)` lines, in the order of the decisions."""
        return [f"{key}: {json.dumps(value)} (auto)" for key, value in self.resolved.items()]

    def to_dict(self) -> dict[str, Any]:
        """The whole config, DeepSpeed's keys and the block, as JSON values; `load_config` reads it back."""
        return {**self.deepspeed, "recsys": self.recsys.model_dump()}


def load_config(config: str | Path | Mapping[str, Any], *, overrides: Any = None) -> Config:
    """Reads and checks a ds_config: a path, or the dict itself.

    overrides: dotted keys that replace what the file says, as a mapping (`{"recsys.pipe": 2}`, nested mappings too) or
    as `key=value` strings from a command line, whose values are JSON where they parse as JSON and strings where not.

    Every mistake is a `UserError` of one line. No process group is needed, nor torch: what depends on the number of
    ranks is checked by `Config.resolve`.
    """
    if isinstance(config, Mapping):
        values, source = copy.deepcopy(dict(config)), "config"
    else:
        values, source = read_json(config), str(config)
    changes = list(_flatten(overrides))
    if changes:
        for key, value in changes:
            _set(values, key, value)
        source += " (with overrides)"
    warnings = check_deepspeed_keys(values, source)
    recsys = parse_block(values.get("recsys", {}), source)
    deepspeed = resolve.without_recsys(values)
    checks.check_file(deepspeed, recsys, source)
    warnings += _schedule_warnings(deepspeed, source)
    return Config(recsys=recsys, source=source, warnings=tuple(warnings), _deepspeed=deepspeed)


def _flatten(overrides: Mapping[str, Any] | Iterable[str] | None) -> Iterable[tuple[str, Any]]:
    if overrides is None:
        return
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if isinstance(value, Mapping) and value:
                yield from ((f"{key}.{inner}", leaf) for inner, leaf in _flatten(value))
            else:
                yield key, value
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"override {text!r}: not of the form key=value; write it as recsys.pipe=2")
        try:
            yield key.strip(), json.loads(value)
        except ValueError:
            yield key.strip(), value


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, name = dotted.split(".")
    for depth, parent in enumerate(parents):
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            inner = ".".join(parents[: depth + 1])
            raise UserError(f'override "{dotted}": "{inner}" is {values!r}, not an object; override "{inner}" itself')
    values[name] = value


def _schedule_warnings(deepspeed: dict[str, Any], source: str) -> list[str]:
    scheduler, optimizer = deepspeed.get("scheduler") or {}, deepspeed.get("optimizer") or {}
    lr = (optimizer.get("params") or {}).get("lr")
    if scheduler.get("type") == "WarmupDecayLR" and "warmup_max_lr" not in (scheduler.get("params") or {}):
        if lr not in (None, 0.001):
            return [
                f'{source}: "scheduler.params.warmup_max_lr" is not given: WarmupDecayLR rises to 0.001 and not to '
                f'"optimizer.params.lr" {lr}; set it, or "auto"'
            ]
    return []
