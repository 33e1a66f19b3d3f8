"""Sequence parallelism: between the regions every rank holds its own positions only (Megatron-LM,
https://arxiv.org/abs/2205.05198, section 4.2).

Norms, residuals and dropout then run, and keep their activations, for 1 / T of the sequence. A region gathers the
sequence where it starts and scatters its sum where it ends, in place of the all-reduces on either side.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_recsys.errors import UserError
from ds_recsys.models.tensor.region import OUTSIDE, Region
from ds_recsys.models.tensor.scope import Scope, wrap
from ds_recsys.models.tensor.styles import PartialGradient

PLAIN = {"colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicated_with_grad_allreduce", "own_config"}
PLAIN |= {"qkv_parts", "qkv_grouped", "qkv_flags", "argument", "local_params"}


@dataclass(frozen=True)
class GatherSequence:
    """The module of a region: it is given a piece of the sequence [B, S / T, H] and computes on all of it."""

    name: str

    def install(self, block: nn.Module, scope: Scope) -> None:
        def forward(inner: Callable, *args: Any, **kwargs: Any) -> Any:
            if args:
                return inner(scope.gather(args[0]), *args[1:], **kwargs)
            key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return inner(**{**kwargs, key: scope.gather(kwargs[key])})

        wrap(block.get_submodule(self.name), forward)


def check_sequence(block: nn.Module, styles: dict[str, str], regions: Iterable[Region]) -> None:
    """Raise `UserError` unless all that looks at several positions at once happens inside the regions."""
    regions = list(regions)
    for path, style in styles.items():
        if style.split()[0] not in PLAIN:
            raise UserError(_refusal(f"{path!r} has style {style!r}"))
    for region in regions:
        ends = [path for path, style in region.entries.items() if style in ("rowwise", "packed_rowwise")]
        if not region.parent or not ends:
            raise UserError(_refusal(f"region {region.parent or 'of the layer itself'!r} has no module of its own"))
        if any(hasattr(region.module, name) for name in OUTSIDE):
            raise UserError(_refusal(f"{region.parent!r} has projections that are not cut"))
    if not any(region.heads for region in regions):
        raise UserError(_refusal("its attention is not cut"))
    inside = tuple(f"{region.parent}." for region in regions)
    for path, module in block.named_modules():
        cut = f"{path}.".startswith(inside) or path in styles
        if not cut and not any(module.children()) and not _by_position(module):
            raise UserError(_refusal(f"{path!r} ({type(module).__name__}) may look at several positions"))


def sequence_steps(block: nn.Module, regions: Iterable[Region], shards: Iterable[str], summed: Iterable[Any]) -> list:
    """The regions' entries, and the sums of all gradients that are of one rank's positions."""
    known = {step.name for step in summed if isinstance(step, PartialGradient)}
    whole = [name for name, _ in block.named_parameters() if name not in set(shards)]
    return [GatherSequence(region.parent) for region in regions] + [
        PartialGradient(name) for name in whole if name not in known
    ]


def _by_position(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Identity) or "norm" in type(module).__name__.lower()


def _refusal(reason: str) -> str:
    return f"no sequence parallelism here, since {reason}; set sequence_parallel to false"
