"""A recommender whose layers are split over tensor ranks: moved between stages it is, bit for bit, the one that never was.

DS_RECSYS_FULL_GRID=1 runs every mode on every grid. Pipe 4 x data 2 x tensor 2 would be 16 ranks, and is left out.
"""

import pytest
from distributed import run_on_grid
from migration import Setup, check_exact, chosen

from ds_recsys.topology import Grid


@pytest.mark.parametrize(
    ("grid", "mode"), [(Grid(2, 1, 2), "zero0"), (Grid(2, 2, 2), "zero1"), (Grid(4, 1, 2), "bf16")], ids=str
)
def test_layers_that_are_split_over_tensor_ranks(grid, mode):
    """50 steps, three migrations; each rank exchanges with the one of its data and tensor rank."""
    plain = [Setup(grid, mode, tie="ends", dropout=0.1, model="recommender") for mode in ("zero0", "zero1", "bf16")]
    setups = chosen([*plain, *(setup.but(recompute=1) for setup in plain)], mode)
    run_on_grid(check_exact, grid.world_size, timeout=580, setups=setups)
