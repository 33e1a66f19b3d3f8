"""Migrations that go wrong, and those that must not be tried."""

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from distributed import _context, _work, distributed, run_on_grid
from migration import LAYERS, Block, Setup, differences, keep, loss_fn, make_engine, run, snapshot, start, train

from ds_recsys import UserError, compat_stages
from ds_recsys.balance import migrate as migration_module
from ds_recsys.balance import parcels
from ds_recsys.balance.migrate import MigrationError, migrate
from ds_recsys.topology import Grid

_BACK = {4: [0, 8, LAYERS], 8: [0, 5, LAYERS]}


def _without_moments(setup):
    """Losses without a migration, and with one in which the moments of what moves are not sent along."""

    def forgetful(*args):
        shares, others = unpack(*args)
        for share in shares.values():
            for key in share.tensors.keys() & {"exp_avg", "exp_avg_sq"}:
                share.tensors[key].zero_()
        return shares, others

    unpack = parcels.unpack
    stayed = run(setup, 12, {})[0]
    with mock.patch.object(parcels, "unpack", forgetful):
        return stayed, run(setup, 12, _BACK)[0]


@pytest.mark.parametrize("mode", ["zero0", "zero1", "bf16"])
def test_without_the_moments_the_losses_differ(mode):
    stayed, moved = run_on_grid(_without_moments, 2, setup=Setup(Grid(2), mode))[0]
    assert stayed[:5] == moved[:5] and stayed[5] != moved[5]


def _with_stale_cache(setup):
    """Losses without a migration, and with one that leaves the cache of what is recomputed as it was."""

    def careless(module, bounds, layers):
        before = module.is_checkpointable_results
        set_stage(module, bounds, layers)
        module.is_checkpointable_results = before

    set_stage = compat_stages.set_stage
    stayed = run(setup, 6, {})[0]
    with mock.patch.object(compat_stages, "set_stage", careless):
        engine, batches = start(setup)
        return stayed, train(engine, 6, {4: [0, 8, LAYERS]}, batches)


def test_with_a_stale_checkpoint_cache_the_losses_differ():
    stayed, moved = run_on_grid(_with_stale_cache, 2, setup=Setup(Grid(2), recompute=1))[0]
    assert stayed[:4] == moved[:4] and stayed[4] != moved[4]


def _refuses(*args, **options):
    raise MemoryError("there is no memory for it")


_FAULTS = {
    "a byte has changed": lambda: mock.patch.object(parcels, "checksum", lambda values: 7),
    "a layer cannot be built": lambda: mock.patch.object(LayerSpec, "build", _refuses),
    "no memory for a layer": lambda: mock.patch.object(parcels, "room_for", _refuses),
    "a layer cannot be sent": lambda: mock.patch.object(parcels, "contents", _refuses),
}
_AT_THE_SENDER = ("a layer cannot be sent",)


def test_a_checksum_tells_one_changed_byte_and_another_order():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 256, (2, 100_000), generator=generator, dtype=torch.uint8)
    whole = parcels.checksum([first, second])
    assert whole == parcels.checksum([first.clone(), second]) != parcels.checksum([second, first])
    found = {whole}
    for place in range(0, 100_000, 5_000):
        changed = second.clone()
        changed[place] ^= 1
        found.add(int(torch.tensor([parcels.checksum([first, changed])])))  # as it travels
    assert len(found) == 21


def _fail(setup, fault):
    """Train with a migration from stage 0 to 1 that fails on the first rank of one, and without; the message on this rank."""
    stayed, found = run(setup, 8, {})
    engine, batches = start(setup)
    losses, before = train(engine, 4, {}, batches), list(engine.module.parts)
    culprit = 0 if fault in _AT_THE_SENDER else setup.grid.data
    patch = _FAULTS[fault]() if dist.get_rank() == culprit else contextlib.nullcontext()
    with pytest.raises(MigrationError) as raised, patch:
        migrate(engine, [0, 2, LAYERS])
    assert list(engine.module.parts) == before
    losses += train(engine, range(4, 8), {}, batches)
    assert not differences(found, snapshot(engine)) and losses == stayed
    migrate(engine, [0, 2, LAYERS])
    return str(raised.value)


@pytest.mark.parametrize("fault", _FAULTS)
@pytest.mark.parametrize("setup", [Setup(Grid(2)), Setup(Grid(2, 2), "zero1", tie="ends")], ids=lambda s: s.mode)
def test_a_layer_that_does_not_arrive_leaves_everything_as_it_was(setup, fault):
    messages = run_on_grid(_fail, setup.grid.world_size, setup=setup, fault=fault)
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    begins = f"rank {0 if fault in _AT_THE_SENDER else setup.grid.data}: " + {
        "a byte has changed": "layer 2 from rank 0 has another checksum than there",
    }.get(fault, "there is no memory for it")
    assert messages[0] == f"{begins}; no layer has moved, the stage bounds are still [0, 5, {LAYERS}]"


class _Blocked(torch.optim.SGD):
    """Keeps one scale for every four values, as 8-bit optimizers do."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["scales"] = torch.zeros(-(-parameter.numel() // 4))


@distributed(pipe=2)
def test_state_that_cannot_be_told_apart_by_parameter():
    """ZeRO-1 gives the optimizer one flat buffer for many weights; without ZeRO each weight has its own state."""
    for mode in ("zero1", "zero0"):
        torch.manual_seed(5)
        module = _small(LayerSpec(torch.nn.Embedding, 12, 8), Block(), Block(), torch.nn.Linear(8, 12))
        engine = make_engine(Setup(Grid(2), mode), module, _Blocked(module.parameters(), lr=0.1))
        train(engine, 2)
        if mode == "zero1":
            with pytest.raises(UserError, match="the optimizer keeps 'scales' in a shape of its own"):
                migrate(engine, [0, 1, 4])
        else:
            migrate(engine, [0, 1, 4])
            states = {name: engine.optimizer.state[p]["scales"].numel() for name, p in module.named_parameters()}
            assert states == {name: -(-p.numel() // 4) for name, p in module.named_parameters()}
        train(engine, 1)


def _small(*specs):
    return PipelineModule(list(specs), topology=Grid(2).deepspeed(), loss_fn=loss_fn, partition_method="uniform")


def _frozen():
    layer = torch.nn.Linear(8, 12)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 10], "stage bounds [0, 10] do not cut 10 layers into 2 stages: give 3 rising numbers from 0 to 10"),
        ([0, 0, 10], "do not cut"),
        ([0, 5, 9], "do not cut"),
        (
            [0, 1, 10],
            "leave stage 0 without a parameter of the optimizer's group 1, and all stages must have the same groups",
        ),
    ],
)
@distributed(pipe=2)
def test_bounds_that_cannot_be_had(bounds, message):
    engine = make_engine(Setup(Grid(2), "zero1", optimizer="client"))
    with pytest.raises(UserError) as raised:
        migrate(engine, bounds)
    assert message in str(raised.value)
    train(engine, 1)


@distributed(pipe=2)
def test_a_stage_of_tied_copies_alone():
    """BF16_Optimizer takes the norm of nothing; without it the cut is possible."""
    engine, batches = start(Setup(Grid(2), "bf16", tie="ends"))
    with pytest.raises(UserError, match="leave stage 1 with copies of weights alone that other stages"):
        migrate(engine, [0, 9, LAYERS])
    engine, batches = start(Setup(Grid(2), "zero1", tie="ends"))
    train(engine, 3, {1: [0, 9, LAYERS]}, batches)


@distributed(pipe=2, tensor=2)
def test_a_tensor_rank_with_copies_alone():
    """The second one counts no norm's weights, and the last stage of this cut has none other."""
    engine, _ = start(Setup(Grid(2, 1, 2), "bf16", tie="ends", model="recommender"))
    with pytest.raises(UserError, match="leave stage 1 with copies of weights alone that other stages or tensor ranks"):
        migrate(engine, [0, 6, 8])


@distributed(pipe=2)
def test_modules_that_cannot_be_cut_there():
    """A stage of frozen layers, a weight in two layers without a TiedLayerSpec, a layer changed after it was built."""
    shared = Block()
    embedding = LayerSpec(torch.nn.Embedding, 12, 8)
    for specs, bounds, error, message in [
        ([embedding, Block(), Block(), _frozen()], [0, 3, 4], UserError, "leave stage 1 without a trainable parameter"),
        (
            [embedding, shared, keep, shared, Block(), Block()],
            [0, 5, 6],
            UserError,
            "layers 1 and 3 are the same module",
        ),
        ([embedding, LayerSpec(Block), Block(), Block()], [0, 1, 4], MigrationError, "extra.bias"),
    ]:
        module = _small(*specs)
        for layer in module.forward_funcs:
            if message == "extra.bias" and isinstance(layer, Block):
                layer.extra = torch.nn.Linear(2, 2)
        engine = make_engine(Setup(Grid(2)), module)
        with pytest.raises(error, match=message):
            migrate(engine, bounds)


@distributed(pipe=2)
def test_ranks_that_ask_for_different_bounds_are_told_so():
    engine = make_engine(Setup(Grid(2)))
    with pytest.raises(UserError, match="rank 1 asks for stage bounds .0, 6, 10. and rank 0 for .0, 5, 10."):
        migrate(engine, [0, 5 + dist.get_rank(), LAYERS])
    train(engine, 1)


def _die(file):
    """Rank 1 is killed between the first layer that it got and the second; the others write what they are told."""
    engine = make_engine(Setup(Grid(2)))
    train(engine, 1)
    if dist.get_rank() == 1:
        rounds = migration_module.units.in_rounds

        def killed(moves):
            yield rounds(moves)[0]
            os._exit(9)

        migration_module.units.in_rounds = killed
    try:
        migrate(engine, [0, 2, LAYERS])
    except MigrationError as error:
        file.write_text(str(error))
        raise


def test_a_killed_rank_ends_the_others_in_one_line(tmp_path):
    file, ranks = tmp_path / "message", []
    for rank in range(2):
        receive, send = _context.Pipe(duplex=False)
        arguments = (rank, 2, str(tmp_path), 60, (_die.__module__, _die.__qualname__), {"file": file}, send)
        ranks.append((_context.Process(target=_work, args=arguments), receive))
        ranks[-1][0].start()
    for process, _ in ranks:
        process.join(60)
    assert ranks[1][0].exitcode == 9
    assert "rank 0 lost another rank while layers moved" in file.read_text()
    assert file.read_text().endswith("resume the last checkpoint") and "\n" not in file.read_text()


def _checkpoint(setup, folder):
    """Save after a migration; go on from there in this engine and in one that is made and cut anew."""
    moved = [0, 7, LAYERS]
    engine, batches = start(setup)
    train(engine, 6, {3: moved}, batches)
    engine.save_checkpoint(folder, tag="moved")
    expected = train(engine, range(6, 10), {}, batches), snapshot(engine)
    engine.destroy()
    engine, batches = start(setup)
    migrate(engine, moved)
    engine.load_checkpoint(folder, tag="moved")
    losses = train(engine, range(6, 10), {8: [0, 5, LAYERS], 9: moved}, batches)
    assert losses == expected[0] and not differences(expected[1], snapshot(engine))


@pytest.mark.parametrize("mode", ["zero0", "zero1", "bf16"])
def test_a_checkpoint_saved_after_a_migration_resumes(mode, tmp_path):
    setup = Setup(Grid(2, 2), mode, tie="ends", recompute=1)  # no buffers: a checkpoint has those of one data rank
    run_on_grid(_checkpoint, 4, setup=setup, folder=str(tmp_path))
