"""Layers move in an engine whose gradients are compressed: what was held back of their gradients moves along."""

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_grid
from migration import LAYERS, Setup, start, train

import ds_recsys
from ds_recsys.balance.migrate import migrate
from ds_recsys.topology import Grid


def _kept(engine, kind) -> dict[str, torch.Tensor]:
    """What all ranks together hold, by parameter: the sum of residuals of either side, or a rank's factors."""
    mine = engine.gradient_compression.state_of({name for name, _ in engine.module.named_parameters()})
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, {name: p.numel() for name, p in engine.module.named_parameters()})
    sizes = {name: size for held in sizes for name, size in held.items()}
    found = {}
    for held in everyone:
        for (what, *key), value in held.items():
            if what == kind == "residuals":
                _, name, begin, end = key
                found.setdefault(name, torch.zeros(sizes[name]))[begin:end] += value
            elif what == kind:
                found[key[0]] = value
    return found


def _move(setup, method, kind, options):
    engine, batches = start(setup)
    compression = ds_recsys.compress_gradients(engine, method, min_elements=1, **options)
    losses = train(engine, 12, {}, batches)
    for bounds in ([0, 7, LAYERS], [0, 2, LAYERS]):
        before, steps = _kept(engine, kind), compression.reducer.totals.steps
        migrate(engine, bounds)
        after = _kept(engine, kind)
        assert {"2.inner.weight", "6.inner.weight"} <= before.keys() == after.keys()
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-7)
        assert any(value.any() for value in before.values())
        losses += train(engine, range(len(losses), len(losses) + 12), {}, batches)
        assert compression.reducer.totals.steps == steps + 12
    weights = [p.detach().float() for p in engine.module.parameters()]
    replicas = [None] * dist.get_world_size()
    dist.all_gather_object(replicas, (engine.stage_id, weights))
    for stage, held in replicas:
        assert stage != engine.stage_id or all(map(torch.equal, held, weights))
    return losses


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("topk", "residuals", {"ratio": 0.2, "overlap": False}),
        ("int4", "residuals", {}),
        ("powersgd", "factors", {"rank": 1}),
    ],
    ids=["topk", "int4", "powersgd"],
)
@pytest.mark.parametrize("mode", ["zero0", "zero1", "bf16"])
def test_error_feedback_moves_along(mode, method, kind, options):
    setup = Setup(Grid(2, 2), mode)
    losses = run_on_grid(_move, 4, setup=setup, method=method, kind=kind, options=options)[0]
    assert sum(losses[-5:]) < sum(losses[:5])
