"""Which layers live on which stages, and what has to move between two cuts. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from ds_recsys.errors import UserError


@dataclass(frozen=True)
class Unit:
    """What holds parameters and moves as a whole: one layer of the list, or the module of a tied key.

    Attributes:
        name: of its module inside the PipelineModule, "3" or "tied_modules.embedding".
        places: its positions in the list of layers; a tied module has several.
    """

    name: str
    places: tuple[int, ...]

    def stages(self, bounds: Sequence[int]) -> set[int]:
        """The stages that hold it, or a copy of it."""
        return {bisect_right(bounds, place) - 1 for place in self.places}


@dataclass(frozen=True)
class Move:
    """Stage `target` gets `unit` from stage `source`, each rank from the one of its own data and tensor rank."""

    unit: Unit
    source: int
    target: int


def units_of(layers: Sequence) -> list[Unit]:
    """The units of a PipelineModule's list, in its order; functions hold nothing and are none."""
    places: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        if isinstance(layer, TiedLayerSpec):
            places.setdefault(f"tied_modules.{layer.key}", []).append(place)
        elif isinstance(layer, (LayerSpec, nn.Module)):
            places[str(place)] = [place]
    return [Unit(name, tuple(where)) for name, where in places.items()]


def plan_moves(units: Sequence[Unit], old: Sequence[int], new: Sequence[int]) -> list[Move]:
    """What each stage lacks under the bounds `new` and which stage sends it, in the same order on every rank."""
    moves = []
    for unit in units:
        holders = unit.stages(old)
        for target in sorted(unit.stages(new) - holders):
            source = min(holders, key=lambda stage, to=target: (abs(stage - to), stage))
            moves.append(Move(unit, source, target))
    return moves


def in_rounds(moves: Sequence[Move]) -> list[list[Move]]:
    """The moves in rounds, each with at most one move from a stage to another, so that pairs of stages work at once."""
    rounds: list[list[Move]] = []
    done: dict[tuple[int, int], int] = {}
    for move in moves:
        pair = move.source, move.target
        number = done[pair] = done.get(pair, -1) + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(move)
    return rounds


def check_bounds(bounds: Sequence[int], num_stages: int, num_layers: int) -> None:
    """Raise `UserError` unless `bounds` cuts the list into stages of at least one layer each."""
    rising = all(low < high for low, high in zip(bounds, bounds[1:], strict=False))
    if len(bounds) != num_stages + 1 or bounds[0] != 0 or bounds[-1] != num_layers or not rising:
        raise UserError(
            f"stage bounds {list(bounds)} do not cut {num_layers} layers into {num_stages} stages: give {num_stages + 1} "
            f"rising numbers from 0 to {num_layers}"
        )
