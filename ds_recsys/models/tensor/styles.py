"""What each parallel style does to a module of a decoder layer. HF names the styles in `base_model_tp_plan`
(https://huggingface.co/docs/transformers/perf_infer_gpu_multi); what they mean is written here on plain tensors.

A style is installed after the module's parameters were cut. `Scope` carries what the modules of a layer share.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ds_recsys.models.shards import Shard
from ds_recsys.models.tensor.scope import Scope, wrap
from ds_recsys.models.tensor.split import Split
from ds_recsys.regions import copy_to_region, gather_from_region, reduce_from_region


@dataclass(frozen=True)
class Colwise:
    """A linear layer that holds some of its outputs: every rank reads the whole input.

    `gather` puts the outputs together again, of which `select` are this rank's business: a fused projection that
    several ranks need the same rows of. `random` starts the region's own random numbers.
    """

    name: str
    gather: Split | None = None
    select: Shard | None = None
    random: bool = False

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.name)
        resize(module)

        def forward(inner: Callable, value: Tensor) -> Tensor:
            out = scope.outputs(module, inner, value)
            if self.gather is not None:
                out = gather_from_region(out, scope.axis, [b - a for a, b in self.gather.bounds])
            if self.select is not None:
                ranges = self.select.ranges[scope.axis.rank]
                whole = copy_to_region(out, scope.axis)
                out = torch.cat([whole[..., start:stop] for start, stop in ranges], dim=-1)
            if self.random and module.training:
                scope.start_random(out.device)
            return out

        wrap(module, forward)


@dataclass(frozen=True)
class Rowwise:
    """A linear layer that holds some of its inputs: the ranks' outputs are summed, and the bias added once.

    With `split`, every rank is given the whole input and takes its own columns.
    """

    name: str
    split: Split | None = None

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.name)
        resize(module)
        product = partial_product(module)

        def forward(inner: Callable, value: Tensor) -> Tensor:
            if self.split is not None:
                start, stop = self.split.bounds[scope.axis.rank]
                value = scope.enter(value).narrow(-1, start, stop - start)
            out = scope.leave(product(value))
            return out if module.bias is None else out + module.bias

        wrap(module, forward)


@dataclass(frozen=True)
class Experts:
    """A module that computes with its share of every expert's features: its float inputs enter, its output is summed."""

    name: str
    random: bool = False

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.name)

        def forward(inner: Callable, *args: Any, **kwargs: Any) -> Tensor:
            args = tuple(_entered(value, scope) for value in args)
            kwargs = {key: _entered(value, scope) for key, value in kwargs.items()}
            if self.random and module.training:
                scope.start_random(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).device)
            return scope.leave(inner(*args, **kwargs))

        wrap(module, forward)


@dataclass(frozen=True)
class SharedBias:
    """A bias added on every rank to a partial output: each adds its share of it, 1 / ranks."""

    owner: str
    name: str

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.owner)

        def forward(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            # An entry of the instance hides the parameter, which stays registered under its name.
            module.__dict__[self.name] = copy_to_region(module._parameters[self.name], scope.axis) / scope.axis.size
            try:
                return inner(*args, **kwargs)
            finally:
                del module.__dict__[self.name]

        wrap(module, forward)


@dataclass(frozen=True)
class HeadArgument:
    """A keyword argument of an attention module with a row per head: [heads, ...], [batch * heads, ...] or
    [batch, heads, S, S]. Each rank is given its own; a mask [batch, 1, S, S] for all heads stays.
    """

    name: str
    key: str
    heads: Split

    def install(self, block: nn.Module, scope: Scope) -> None:
        start, stop = self.heads.bounds[scope.axis.rank]

        def own(value: Tensor) -> Tensor:
            if value.dim() == 4:
                return value if value.shape[1] == 1 else value[:, start:stop]
            return value.unflatten(0, (-1, self.heads.count))[:, start:stop].flatten(0, 1)

        def forward(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get(self.key) is not None:
                kwargs[self.key] = own(kwargs[self.key])
            return inner(*args, **kwargs)

        wrap(block.get_submodule(self.name), forward)


@dataclass(frozen=True)
class Summed:
    """A module whose output is each rank's part of a sum."""

    name: str

    def install(self, block: nn.Module, scope: Scope) -> None:
        wrap(
            block.get_submodule(self.name),
            lambda inner, *args, **kwargs: reduce_from_region(inner(*args, **kwargs), scope.axis),
        )


@dataclass(frozen=True)
class Identity:
    """An expert that returns its input on every rank, inside a sum over the ranks."""

    name: str

    def install(self, block: nn.Module, scope: Scope) -> None:
        wrap(
            block.get_submodule(self.name),
            lambda inner, value, *args, **kwargs: inner(value / scope.axis.size, *args, **kwargs),
        )


@dataclass(frozen=True)
class LatentKeys:
    """Multi-head latent attention's first projection: its last `rope` outputs go to the sharded heads directly."""

    name: str
    rope: int

    def install(self, block: nn.Module, scope: Scope) -> None:
        def forward(inner: Callable, value: Tensor) -> Tensor:
            out = inner(value)
            latent, rope = out.split([out.shape[-1] - self.rope, self.rope], dim=-1)
            return torch.cat([latent, copy_to_region(rope, scope.axis)], dim=-1)

        wrap(block.get_submodule(self.name), forward)


@dataclass(frozen=True)
class PartialGradient:
    """A parameter that all ranks hold whole and use on their own heads: its gradients are summed."""

    name: str

    def install(self, block: nn.Module, scope: Scope) -> None:
        def total(gradient: Tensor) -> Tensor:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=scope.axis.group)
            return gradient

        _on_gradient(block.get_parameter(self.name), total)


@dataclass(frozen=True)
class SharedRows:
    """A parameter of which several ranks hold the same rows (a key-value head for several ranks' query heads)."""

    name: str
    shard: Shard

    def install(self, block: nn.Module, scope: Scope) -> None:
        dim, ranges = self.shard.dim, self.shard.ranges
        length = max(stop for own in ranges for _, stop in own)

        def total(gradient: Tensor) -> Tensor:
            shape = (*gradient.shape[:dim], length, *gradient.shape[dim + 1 :])
            full, at = gradient.new_zeros(shape), 0
            for start, stop in ranges[scope.axis.rank]:
                full.narrow(dim, start, stop - start).copy_(gradient.narrow(dim, at, stop - start))
                at += stop - start
            dist.all_reduce(full, group=scope.axis.group)
            return self.shard.take(full, scope.axis.rank)

        _on_gradient(block.get_parameter(self.name), total)


@dataclass(frozen=True)
class Attributes:
    """Numbers that a module's forward reads, such as how many heads it has: `values[rank]`."""

    name: str
    values: tuple[dict[str, int], ...]

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.name)
        for key, value in self.values[scope.axis.rank].items():
            setattr(module, key, value)


@dataclass(frozen=True)
class OwnConfig:
    """A module whose forward reads the numbers of heads off its config: a config of its own, `counts[rank]` of
    (query, key-value) heads.
    """

    name: str
    counts: tuple[tuple[int, int], ...]

    def install(self, block: nn.Module, scope: Scope) -> None:
        module = block.get_submodule(self.name)
        module.config = copy.copy(module.config)
        module.config.num_attention_heads, module.config.num_key_value_heads = self.counts[scope.axis.rank]


def resize(module: nn.Module) -> None:
    """Let a linear layer's sizes, which HF's code may read, follow its weight."""
    outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    if isinstance(module, Conv1D):
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


def partial_product(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The linear layer without its bias."""
    if isinstance(module, Conv1D):
        return lambda value: value @ module.weight
    return lambda value: F.linear(value, module.weight)


def _entered(value: Any, scope: Scope) -> Any:
    return scope.enter(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _on_gradient(param: nn.Parameter, total: Callable[[Tensor], Tensor]) -> None:
    # A leaf's hook is given the sum of all its uses in one backward, before that is added to `.grad`.
    if param.requires_grad:
        param.register_hook(total)
