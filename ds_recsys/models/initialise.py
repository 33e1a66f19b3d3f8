"""Values for the parameters of a new layer: slices of a checkpoint, or HF's own initialisation, the same on any grid.

Random values depend on (seed, HF module name) only: every module is initialised by HF's `_init_weights` under a
generator seeded from its name, so a stage needs no other stage's layers and draws in no particular order.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_recsys.errors import UserError
from ds_recsys.models.shards import Shard

if TYPE_CHECKING:
    from ds_recsys.models.layers import PipelineLayer
    from ds_recsys.models.skeleton import Skeleton
    from ds_recsys.models.weights import Source


def name_seed(seed: int, name: str) -> int:
    """A 63-bit seed from (seed, name), stable between processes, machines and Python versions."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def fill_layer(
    layer: "PipelineLayer", skeleton: "Skeleton", source: "Source | None", seed: int, dtype: torch.dtype,
    shards: Mapping[str, Shard], rank: int,
) -> list[str]:  # fmt: skip
    """Replace the meta parameters of `layer` by values; return the HF names that `source` did not provide.

    Of the parameters in `shards` only the part of tensor rank `rank` stays; random ones are drawn whole and cut, so that
    they do not depend on the size of the axis.

    Raises:
        UserError: `source` lacks a parameter that it should hold, or holds it in another shape.
    """
    missing: list[str] = []
    memo: dict[int, nn.Parameter] = {}
    for prefix, module in layer.named_modules():
        for attr, meta in list(module._parameters.items()):
            if meta is None:
                continue
            if id(meta) not in memo:
                name = skeleton.aliases[f"{prefix}.{attr}"]
                shard = shards.get(name)
                value = None if source is None else source.get(name, tuple(meta.shape), part=shard and (shard, rank))
                if value is None:
                    missing.append(name)
                    # NaN marks what HF's initialisation leaves out; empty memory would pass unseen.
                    data = (
                        torch.full(meta.shape, torch.nan)
                        if meta.is_floating_point()
                        else torch.zeros(meta.shape, dtype=meta.dtype)
                    )
                else:
                    data = torch.empty(value.shape, dtype=dtype if meta.is_floating_point() else meta.dtype)
                    data.copy_(value)
                    del value
                memo[id(meta)] = nn.Parameter(data, meta.requires_grad)
            module._parameters[attr] = memo[id(meta)]
        if source is not None:
            for attr, buffer in module._buffers.items():
                if buffer is not None and attr not in module._non_persistent_buffers_set:
                    value = source.get(f"{prefix}.{attr}", tuple(buffer.shape), optional=True)
                    if value is not None:
                        buffer.copy_(value)
    if missing:
        _initialise(layer, skeleton, set(missing), seed)
        for name, param in layer.named_parameters():
            if name in missing and name in shards:
                param.data = shards[name].take(param.data, rank)
        for name, param in layer.named_parameters():
            if torch.isnan(param).any():
                raise UserError(
                    f"HF does not initialise parameter {name!r} of {skeleton.config.model_type!r}: give weights"
                )
            if param.is_floating_point() and param.dtype != dtype:
                param.data = param.data.to(dtype)
    return missing


def leave_empty(
    layer: "PipelineLayer", skeleton: "Skeleton", dtype: torch.dtype, shards: Mapping[str, Shard], rank: int
) -> None:
    """Replace the meta parameters of `layer` by parameters of any values; of those in `shards` the part of `rank`."""
    memo: dict[int, nn.Parameter] = {}
    for prefix, module in layer.named_modules():
        for attr, meta in module._parameters.items():
            if meta is None:
                continue
            if id(meta) not in memo:
                shard = shards.get(skeleton.aliases[f"{prefix}.{attr}"])
                part = meta.detach() if shard is None else shard.take(meta.detach(), rank)
                empty = torch.empty(part.shape, dtype=dtype if meta.is_floating_point() else meta.dtype)
                memo[id(meta)] = nn.Parameter(empty, meta.requires_grad)
            module._parameters[attr] = memo[id(meta)]


@torch.no_grad()
def _initialise(layer: "PipelineLayer", skeleton: "Skeleton", missing: set[str], seed: int) -> None:
    params = dict(layer.named_parameters())
    kept = {name: p.data for name, p in params.items() if name not in missing}
    for name in kept:
        params[name].data = kept[name].clone()  # HF initialises a module as a whole; what was loaded is put back
    with torch.random.fork_rng(devices=[]):
        for name in layer.module_names:
            model = _nearest_model(skeleton, name)
            module = layer.get_submodule(name)
            for sub, child in _post_order(name, module):
                torch.manual_seed(name_seed(seed, sub))
                model._init_weights(child)
        _initialise_outer(skeleton, {n: params[n] for n in skeleton.outer if n in params}, layer.module_names, seed)
    for name, data in kept.items():
        params[name].data = data


def _initialise_outer(skeleton: "Skeleton", params: dict[str, Tensor], whole: Iterable[str], seed: int) -> None:
    """Parameters held one by one: put them into the skeleton, where their HF modules are, and let HF initialise
    those.
    """
    params = {n: p for n, p in params.items() if not any(n.startswith(w + ".") for w in whole)}
    if not params:
        return
    owners = {""} | {".".join(p[:i]) for p in (n.split(".") for n in params) for i in range(1, len(p))}
    every = {**skeleton.outer, **params}
    with skeleton._bound(every, torch.device("cpu")):
        for name in sorted(owners, key=lambda n: (-n.count(".") - bool(n), n)):  # children before parents, as HF does
            torch.manual_seed(name_seed(seed, name))
            _nearest_model(skeleton, name)._init_weights(skeleton.model.get_submodule(name))


def _post_order(name: str, module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for key, child in module.named_children():
        yield from _post_order(f"{name}.{key}", child)
    yield name, module


def _nearest_model(skeleton: "Skeleton", name: str) -> PreTrainedModel:
    """The innermost PreTrainedModel that contains module `name`: its `_init_weights` is the one HF would use."""
    found, module = skeleton.model, skeleton.model
    for part in name.split(".") if name else ():
        module = module.get_submodule(part)
        found = module if isinstance(module, PreTrainedModel) else found
    return found
