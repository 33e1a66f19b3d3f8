"""What the ranks tell each other before layers move, and the reasons not to that only shows when all have."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import nn
from torch.nn import Parameter

from ds_recsys import compat_stages
from ds_recsys.balance.optimizer_state import Share
from ds_recsys.balance.parcels import Label, Others, label_of
from ds_recsys.balance.units import Move, Unit
from ds_recsys.errors import UserError


@dataclass(frozen=True)
class Report:
    """Of one rank.

    Attributes:
        groups: the options of the optimizer's parameter groups, as text.
        held: name of each unit of the stage, "" for what is in none (a loss with weights) -> groups of its parameters.
        counted: those of them with a parameter that this tensor rank counts in the gradient's norm.
        forward_passes: so far; what `seed_layers` derives seeds from.
        outgoing: name of each unit that this rank sends -> what is in it.
    """

    stage: int
    tensor_rank: int
    bounds: tuple[int, ...]
    groups: tuple[str, ...]
    held: dict[str, set[int]]
    counted: set[str]
    forward_passes: int | None
    outgoing: dict[str, Label] = field(default_factory=dict)
    problem: str | None = None


def survey(
    engine,
    bounds: Sequence[int],
    moves: Sequence[Move],
    layers: dict[str, nn.Module],
    shares: dict[Parameter, Share],
    problem: str | None,
) -> list[Report]:
    """The reports of all ranks, by rank. Collective.

    Args:
        layers: of this stage, by name.
        shares: of this rank in the state of their parameters.
        problem: why this rank will not have these bounds.
    """
    module = engine.module
    held = {name: list(layer.parameters()) for name, layer in layers.items()}
    known = {parameter for inside in held.values() for parameter in inside}
    held[""] = [parameter for parameter in module.parameters() if parameter not in known]
    leaving = {move.unit.name for move in moves if move.source == module.stage_id}
    own = Report(
        module.stage_id,
        compat_stages.tensor_rank(module),
        tuple(bounds),
        () if problem else tuple(map(_as_text, compat_stages.torch_optimizer(engine).param_groups)),
        {name: {shares[p].group for p in inside if p in shares} for name, inside in held.items()},
        {name for name, inside in held.items() if any(counts_in_norm(module, name, p) for p in inside if p in shares)},
        module.micro_offset if module.seed_layers else None,
        {
            name: label_of(layers[name], shares, others_of(engine, name), tied=name.startswith("tied_modules."))
            for name in leaving
        },
        problem or _shared_weights(module, layers, moves),
    )
    reports: list[Report] = [own] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    return reports


def others_of(engine, name: str) -> Others:
    """What goes with a layer beside its tensors and the optimizer's state."""
    compression = getattr(engine, "gradient_compression", None)
    if compression is None:
        return {}
    layer = engine.module.get_submodule(name)
    return compression.state_of({f"{name}.{inner}" for inner, _ in layer.named_parameters()})


def _as_text(group: dict) -> str:
    return repr(sorted((key, value) for key, value in group.items() if key not in ("params", "param_names")))


def counts_in_norm(module, name: str, parameter: Parameter) -> bool:
    """In the norm of gradients; a tied one on the first of its stages."""
    if getattr(parameter, "ds_pipe_replicated", False) and not name.startswith("tied_modules."):
        return False
    return compat_stages.tensor_rank(module) == 0 or is_model_parallel_parameter(parameter)


def _shared_weights(module: nn.Module, layers: dict[str, nn.Module], moves: Sequence[Move]) -> str | None:
    """What is one to torch would be two after a move, or overwritten by it; every rank has the layers given as modules."""
    given = enumerate(compat_stages.layer_list(module))
    known = {str(place): layer for place, layer in given if isinstance(layer, nn.Module)} | layers
    moving, owners = {move.unit.name for move in moves}, {}
    for name, layer in known.items():
        for parameter in layer.parameters():
            other = owners.setdefault(parameter, name)
            if other != name and {other, name} & moving:
                return (
                    f"layers {other} and {name} are the same module or share a weight, and one of them would move: use "
                    "TiedLayerSpec for both"
                )
    return None


def check(reports: Sequence[Report], units: Sequence[Unit], moved: bool, grouped: bool, normed: bool) -> None:
    """Raise the same `UserError` on every rank unless the stages can be cut as the reports say.

    Args:
        moved: whether the bounds are others than those in force.
        grouped: whether the optimizer works group by group on all stages at once, so that each needs all groups.
        normed: whether it fails on a stage with nothing for the gradient's norm, which counts tied weights on one stage.
    """
    bounds = reports[0].bounds
    for rank, report in enumerate(reports):
        if report.bounds != bounds:
            raise UserError(f"rank {rank} asks for stage bounds {list(report.bounds)} and rank 0 for {list(bounds)}")
        if report.problem:
            raise UserError(report.problem)
    if not moved:
        return
    first = reports[0]
    for report in reports:
        if report.groups != first.groups:
            raise UserError(
                f"the optimizers of stages {first.stage} and {report.stage} have other parameter groups: "
                f"{', '.join(first.groups)} and {', '.join(report.groups)}; layers move only between equal ones"
            )
        if report.forward_passes != first.forward_passes:
            raise UserError(
                f"stages {first.stage} and {report.stage} count {first.forward_passes} and {report.forward_passes} forward "
                "passes, and seed_layers draws from that: call the module on all stages alike"
            )
    groups = {name: report.held[name] for report in reports for name in report.held if name}
    for stage in range(len(bounds) - 1):
        resident = next(report.held[""] for report in reports if report.stage == stage)
        found = resident.union(*(groups[unit.name] for unit in units if stage in unit.stages(bounds)))
        if not found:
            raise UserError(f"stage bounds {list(bounds)} leave stage {stage} without a trainable parameter")
        first_of = {unit.name for unit in units if stage == min(unit.stages(bounds))}
        for tensor_rank in {report.tensor_rank for report in reports} if normed else ():
            peers = [report for report in reports if report.tensor_rank == tensor_rank]
            if not any(
                report.counted & first_of or ("" in report.counted and report.stage == stage) for report in peers
            ):
                raise UserError(
                    f"stage bounds {list(bounds)} leave stage {stage} with copies of weights alone that other stages or tensor "
                    "ranks count in the gradient's norm, and BF16_Optimizer needs another trainable parameter there"
                )
        if grouped and len(found) < len(first.groups):
            absent = min(set(range(len(first.groups))) - found)
            raise UserError(
                f"stage bounds {list(bounds)} leave stage {stage} without a parameter of the optimizer's group {absent}, and "
                "all stages must have the same groups"
            )
