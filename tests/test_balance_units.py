"""What has to move between two cuts, and in which order."""

import pytest
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from ds_recsys import UserError
from ds_recsys.balance.units import Unit, check_bounds, in_rounds, plan_moves, units_of

_TABLE = TiedLayerSpec("table", nn.Embedding, 4, 2)
_LAYERS = [_TABLE, len, LayerSpec(nn.Linear, 2, 2), nn.Linear(2, 2), _TABLE, nn.ReLU(), _TABLE]


def _moves(old, new):
    return [(move.unit.name, move.source, move.target) for move in plan_moves(units_of(_LAYERS), old, new)]


def test_units_are_layers_and_tied_modules_but_no_functions():
    named = {"tied_modules.table": (0, 4, 6), "2": (2,), "3": (3,), "5": (5,)}
    assert units_of(_LAYERS) == [Unit(name, places) for name, places in named.items()]


def test_a_tied_module_moves_from_the_nearest_stage_that_has_it_and_only_where_it_lacks():
    assert _moves([0, 3, 7], [0, 3, 7]) == []
    assert _moves([0, 3, 7], [0, 2, 7]) == [("2", 0, 1)]
    assert _moves([0, 2, 4, 5, 7], [0, 4, 5, 6, 7]) == [
        ("tied_modules.table", 0, 1),
        ("2", 1, 0),
        ("3", 1, 0),
        ("5", 3, 2),
    ]
    assert _moves([0, 1, 2, 3, 7], [0, 1, 2, 5, 7]) == [("tied_modules.table", 3, 2), ("3", 3, 2)]


def test_pairs_of_stages_work_at_once():
    moves = plan_moves([Unit(str(place), (place,)) for place in range(9)], [0, 4, 6, 9], [0, 1, 4, 9])
    rounds = [[(move.unit.name, move.target) for move in batch] for batch in in_rounds(moves)]
    assert rounds == [[("1", 1), ("4", 2)], [("2", 1), ("5", 2)], [("3", 1)]]


@pytest.mark.parametrize("bounds", [[0, 4], [1, 2, 4], [0, 2, 3], [0, 2, 2, 4], [0, 3, 2, 4], []])
def test_bounds_that_do_not_cut_the_list(bounds):
    with pytest.raises(UserError, match="do not cut 4 layers"):
        check_bounds(bounds, len(bounds) - 1 if len(bounds) > 2 else 2, 4)
