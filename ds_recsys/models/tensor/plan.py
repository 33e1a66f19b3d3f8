"""From HF's tensor-parallel plan, or our own for families without one, to what is cut and installed in one layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_recsys.errors import UserError
from ds_recsys.models.shards import Shard
from ds_recsys.models.tensor.families import CORRECTIONS, OWN_PLANS, UNSHARDED
from ds_recsys.models.tensor.fused import LAYOUTS
from ds_recsys.models.tensor.region import Region, drops
from ds_recsys.models.tensor.scope import Scope
from ds_recsys.models.tensor.sequence import check_sequence, sequence_steps
from ds_recsys.models.tensor.styles import Experts, Identity, LatentKeys, Summed
from ds_recsys.topology import TensorAxis

if TYPE_CHECKING:
    from ds_recsys.models.skeleton import Skeleton

CUT = {"colwise", "rowwise", "packed_colwise", "packed_rowwise", "colwise_gather_output", "rowwise_split_input"}
# Planned together with the rest of their region; the others by themselves.
INSIDE = CUT | {*LAYOUTS, "shared_bias", "argument", "own_config", "replicated_with_grad_allreduce"}
WHOLE = {"replicate", "local_params", "mla_kv_a_proj", "moe_tp_experts", "moe_identity_expert", "all_reduce"}


@dataclass(frozen=True)
class BlockPlan:
    """One decoder layer on a tensor group.

    Attributes:
        shards: parameter name inside the layer -> who holds which of its rows; the parameters not named are replicated.
        steps: what is installed in the layer, in this order.
        sequence: hidden states come and go as [B, S / size, H], this rank's positions; all else is for length S.
    """

    shards: dict[str, Shard]
    steps: tuple[Any, ...]
    sequence: bool = False

    def apply(self, block: nn.Module, axis: TensorAxis) -> None:
        """Make `block` compute its rank's share. Its parameters must hold their values and be cut already.

        Its modules' `forward`s are wrapped on the instance, so a copy made afterwards would run the original's.
        """
        if axis.size == 1:
            return
        scope = Scope(axis, self.sequence)
        for step in self.steps:
            step.install(block, scope)
        scope.around(block, drops(block))


def plan_block(skeleton: "Skeleton", index: int, size: int, sequence_parallel: bool = False) -> BlockPlan:
    """How decoder layer `index` is shared out among `size` tensor ranks. Pure: no process group, no weights.

    Raises:
        UserError: the model type has no plan, its plan names an unknown style, a size cannot be shared out, or the
            layer does not lend itself to sequence parallelism.
    """
    if size == 1:
        return BlockPlan({}, ())
    block = skeleton.blocks[index]
    styles = layer_styles(skeleton, index)
    try:
        regions = [Region(block, name, own, skeleton.config, size) for name, own in _by_region(styles).items()]
        if sequence_parallel:
            check_sequence(block, styles, regions)
    except UserError as error:
        raise UserError(
            f"{skeleton.block_name(index)} of model type {skeleton.config.model_type!r}: {error}"
        ) from error
    shards = {name: shard for region in regions for name, shard in region.shards.items()}
    steps = [step for region in regions for step in region.steps] + list(_modules(block, styles, skeleton.config))
    if sequence_parallel:
        steps += sequence_steps(block, regions, shards, steps)
    return BlockPlan(shards, tuple(steps), sequence_parallel)


def layer_styles(skeleton: "Skeleton", index: int) -> dict[str, str]:
    """Name of a module or parameter inside layer `index` -> its style."""
    name = skeleton.config.model_type
    if name in UNSHARDED:
        raise UserError(f"model type {name!r} cannot be tensor-parallel: {UNSHARDED[name]}; set tensor to 1")
    plan = OWN_PLANS[name] if name in OWN_PLANS else hf_plan(skeleton)
    if not plan:
        raise UserError(f"model type {name!r} has no tensor-parallel plan in transformers, nor here; set tensor to 1")
    plan = {**plan, **CORRECTIONS.get(name, {})}
    styles = _matches(skeleton.blocks[index], plan)
    if not styles and not any(_matches(block, plan) for block in skeleton.blocks):
        raise UserError(f"the tensor-parallel plan of model type {name!r} fits none of its layers; set tensor to 1")
    for path, style in styles.items():
        if style.split()[0] not in INSIDE | WHOLE:
            raise UserError(
                f"model type {name!r} wants style {style!r} for {path!r}, which is not known here; set tensor to 1"
            )
    return styles


def _matches(block: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """The modules and parameters of `block` that `plan` speaks of; `*` stands for a number."""
    names = [n for n, _ in block.named_modules()] + [n for n, _ in block.named_parameters()]
    general = {n: re.sub(r"(?<=\.)\d+(?=\.|$)", "*", n) for n in names}
    return {n: plan[key] for n in names for key in (general[n], n) if key in plan}


def hf_plan(skeleton: "Skeleton") -> dict[str, str]:
    """HF's plan for the parts of one layer: `layers.*.self_attn.q_proj` without the way to the layer."""
    plan = getattr(skeleton.config, "base_model_tp_plan", None) or {}
    prefix = skeleton.list_name.rpartition(".")[2] + ".*."
    return {key.removeprefix(prefix): style for key, style in plan.items() if key.startswith(prefix)}


def _by_region(styles: dict[str, str]) -> dict[str, dict[str, str]]:
    """The entries of each region; it is named by the module that computes it, which is the parent if nothing is said."""
    regions: dict[str, dict[str, str]] = {}
    for path, style in styles.items():
        kind, _, word = style.partition(" ")
        if kind in INSIDE:
            itself = kind in ("argument", "own_config")
            region = path if itself else word or path.rpartition(".")[0]
            regions.setdefault(region, {})[path] = style if itself else kind
    return regions


def _modules(block: nn.Module, styles: dict[str, str], config: Any) -> Iterable[Any]:
    """Steps for whole modules, after those for the layers inside."""
    for path, style in styles.items():
        if style == "mla_kv_a_proj":
            yield LatentKeys(path, config.qk_rope_head_dim)
        elif style == "moe_identity_expert":
            yield Identity(path)
        elif style == "moe_tp_experts":
            yield Experts(path, drops(block.get_submodule(path)))
        elif style == "all_reduce":
            yield Summed(path)
