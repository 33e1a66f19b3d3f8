"""A run whose layers move between stages is, bit for bit, the run in which they never did.

DS_RECSYS_FULL_GRID=1 runs 50 steps in every mode on every grid, with and without recomputation; without it each grid has
one mode, and each mode two grids or more (with those of test_balance_migrate_tensor.py).
"""

import random
import weakref

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from distributed import distributed, run_on_grid
from migration import (
    LAYERS,
    Setup,
    check_exact,
    chosen,
    differences,
    keep,
    loss_fn,
    make_engine,
    run,
    snapshot,
    start,
    train,
)

from ds_recsys.balance.migrate import migrate
from ds_recsys.topology import Grid

_MODES = ("zero0", "zero1", "bf16")
_SHORT = {4: [0, 5, 8], 8: [0, 2, 8], 12: [0, 4, 8]}


def _exact(setups, **options):
    grid = setups[0].grid
    return run_on_grid(check_exact, grid.world_size, timeout=580, setups=setups, **options)


@pytest.mark.parametrize(
    ("grid", "mode"),
    [(Grid(2), "bf16"), (Grid(2, 2), "zero1"), (Grid(4), "zero0"), (Grid(4, 2), "bf16")],
    ids=str,
)
def test_weights_moments_steps_and_losses(grid, mode):
    """Frozen matrices, buffers, functions, modules given as objects, a tied table, seeded dropout: all at once."""
    plain = [Setup(grid, mode, tie="ends", dropout=0.1) for mode in _MODES]
    _exact(chosen([*plain, *(setup.but(recompute=1) for setup in plain)], mode))


@pytest.mark.parametrize("mode", _MODES)
def test_recomputation(mode):
    """Of every layer, of pairs of layers; and what dropout there is comes before the first of them."""
    plain = Setup(Grid(2), mode, tie="ends", model="recommender", dropout=0.1)
    losses = _exact([plain, plain.but(recompute=1), plain.but(recompute=2)], steps=15, moves=_SHORT)[0]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("mode", [*_MODES, "bf16 zero1"])
def test_a_tied_table_in_the_middle_that_moves(mode):
    """Its process groups are made anew: a stage gets a copy of it, another gives it up."""
    setup = Setup(Grid(4), mode, tie="three")
    _exact([setup], steps=20, moves={5: [0, 2, 6, 8, LAYERS], 10: [0, 3, 4, 7, LAYERS], 15: [0, 2, 5, 8, LAYERS]})


def _merged(setup):
    """Losses with and without a time in which one stage has two of the table's three places."""
    moves = {5: [0, 6, 7, 8, LAYERS], 10: [0, 2, 3, 4, LAYERS], 15: [0, 2, 5, 8, LAYERS]}
    return run(setup, 20, {})[0], run(setup, 20, moves)[0]


@pytest.mark.parametrize("mode", ["zero0", "zero1"])
def test_places_of_a_tied_table_that_meet_on_a_stage(mode):
    """Autograd adds up what an all-reduce did, in another order: the same to rounding."""
    stayed, moved = run_on_grid(_merged, 4, setup=Setup(Grid(4), mode, tie="three"))[0]
    assert stayed[:6] == moved[:6] and moved == pytest.approx(stayed, rel=1e-4)


def _with_fp16(setups, **options):
    get_accelerator().is_fp16_supported = lambda: True  # slow on most CPUs, and the same
    check_exact(setups, **options)


@pytest.mark.parametrize("mode", ["fp16", "fp16 zero1"])
def test_loss_scale(mode):
    setup = Setup(Grid(2, 2), mode)
    run_on_grid(_with_fp16, 4, setups=[setup], steps=20, moves={5: [0, 8, LAYERS], 10: [0, 5, LAYERS]})


def _adamw(groups):
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("make_optimizer", [None, _adamw], ids=["the same optimizer", "a factory"])
@pytest.mark.parametrize("mode", _MODES)
def test_optimizers_of_the_user_with_groups(mode, make_optimizer):
    setup = Setup(Grid(2, 2), mode, optimizer="client")
    moves = {5: [0, 8, LAYERS], 10: [0, 3, LAYERS], 15: [0, 5, LAYERS]}
    _exact([setup], steps=20, moves=moves, make_optimizer=make_optimizer)


def test_row_sparse_item_table():
    setup = Setup(Grid(2, 2), optimizer="sparse", model="recommender", tie="ends", clip=1.0)
    _exact([setup], steps=20, moves={5: [0, 6, 8], 10: [0, 2, 8], 15: [0, 4, 8]})


def _norms(setup):
    """Losses that clipping acts on, with and without migrations."""
    return run(setup, 20, {})[0], run(setup, 20, {5: [0, 8, LAYERS], 10: [0, 5, LAYERS]})[0]


@pytest.mark.parametrize("mode", _MODES)
def test_clipping_stays_the_same_to_rounding(mode):
    """The norm is added up stage by stage, so its last bit depends on the cut."""
    stayed, moved = run_on_grid(_norms, 2, setup=Setup(Grid(2), mode, clip=0.3))[0]
    assert moved == pytest.approx(stayed, rel=1e-5)


@pytest.mark.parametrize("mode", _MODES)
def test_what_others_hold_on_to_stays_and_what_left_is_freed(mode):
    run_on_grid(_objects, 2, setup=Setup(Grid(2), mode))


def _objects(setup):
    engine, batches = start(setup)
    train(engine, 2, {}, batches)
    module, optimizer, scheduler = engine.module, engine.optimizer, engine.lr_scheduler
    place = "2" if engine.is_first_stage() else "8"
    stays, weight = module.get_submodule(place), next(module.get_submodule(place).parameters())
    leaves = weakref.ref(module.get_submodule("4").inner.weight) if engine.is_first_stage() else None
    given = module._layer_specs[3]
    generators = [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()]
    figures = migrate(engine, [0, 3, LAYERS])
    assert generators == [str(random.getstate()), str(np.random.get_state()), torch.get_rng_state().tolist()]
    assert (engine.module, engine.optimizer, engine.lr_scheduler) == (module, optimizer, scheduler)
    assert module.get_submodule(place) is stays and next(stays.parameters()) is weight
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) > 0
    assert figures.bounds == (0, 3, LAYERS) and figures.layers == ("3", "4")
    if engine.is_first_stage():
        assert leaves() is None or leaves().untyped_storage().nbytes() <= 4
        assert given.inner.weight.shape == (12, 8) and given.inner.weight.untyped_storage().nbytes() <= 4
    values = sum(p.numel() for layer in (given, given) for p in layer.parameters())
    bytes_per_value = {"zero0": 12, "zero1": 12, "bf16": 14}[setup.mode]  # weights, two moments, fp32 copies
    assert 1 <= figures.bytes / (values * bytes_per_value) < 1.3  # alignment, buffers
    assert figures.busiest_bytes == figures.bytes and 0 < figures.seconds < 10


class _Scaled(torch.nn.Module):
    """A loss with a weight of its own, which every stage has and the last one trains."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, outputs, labels):
        return loss_fn(outputs * self.scale, labels)


def _widths(mode):
    """Boundaries of other shapes, layers without weights, a loss with one: losses and weights with and without moves."""
    found = []
    for moves in ({}, {4: [0, 4, 7], 8: [0, 2, 7], 12: [0, 3, 7]}):
        torch.manual_seed(1)
        widths = [LayerSpec(torch.nn.Linear, rows, columns) for rows, columns in ((8, 6), (6, 10), (10, 3), (3, 12))]
        specs = [LayerSpec(torch.nn.Embedding, 12, 8), widths[0], torch.nn.Tanh(), widths[1], keep, *widths[2:]]
        module = PipelineModule(specs, topology=Grid(2).deepspeed(), loss_fn=_Scaled(), partition_method="uniform")
        engine = make_engine(Setup(Grid(2), mode), module)
        migrate(engine, [0, 3, 7])
        found.append((train(engine, 16, moves), snapshot(engine)))
        engine.destroy()
    assert found[0][0] == found[1][0] and not differences(found[0][1], found[1][1])


@pytest.mark.parametrize("mode", ["zero0", "zero1"])
def test_boundaries_of_other_shapes(mode):
    run_on_grid(_widths, 2, mode=mode)


@distributed(pipe=2)
def test_nothing_to_do():
    engine = make_engine(Setup(Grid(2)))
    train(engine, 1)
    before = snapshot(engine)
    figures = migrate(engine, [0, 5, LAYERS])
    assert figures.layers == () and figures.bytes == 0 and not differences(before, snapshot(engine))
