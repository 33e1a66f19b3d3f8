"""A checkpoint goes on, on another grid, as the unbroken run would have."""

import pytest
from distributed import run_on_grid
from logs import write_log
from test_tensor_trainer import _LLAMA, _losses, _values

import ds_recsys
from ds_recsys.topology import Grid

_GRIDS = {"2x1x2": Grid(2, 1, 2), "1x2x1": Grid(1, 2, 1), "1x1x2": Grid(1, 1, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")
    write_log(folder / "log.csv")
    return folder


def _run(folder, name, grid, zero, steps, resume=False, bf16=False):
    values = _values(_LLAMA, grid.pipe, grid.tensor, checkpoint={"every_steps": 4, "every_epochs": 0})
    values["recsys"]["training"] = {"steps": 8, "eval_every_epochs": 0, "keep_best": False}
    values["zero_optimization"]["stage"] = zero
    values["bf16"] = {"enabled": bf16}
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=folder / name, resume=resume)
    trainer.total_steps = steps
    trainer.train()
    return trainer.engine.get_lr(), trainer.engine.global_steps


@pytest.mark.parametrize(
    "there, back, zero, bf16",
    [
        ("2x1x2", "1x2x1", 0, False),
        ("1x2x1", "2x1x2", 0, False),
        ("2x1x2", "1x2x1", 1, False),
        ("1x2x1", "2x1x2", 1, False),
        ("1x1x2", "1x2x1", 1, True),
    ],
)
def test_a_run_goes_on_on_another_grid(folder, there, back, zero, bf16):
    there, back = _GRIDS[there], _GRIDS[back]
    options = {"folder": folder, "zero": zero, "bf16": bf16}
    name = f"{there}-{back}-{zero}-{bf16}"
    whole = run_on_grid(_run, there.world_size, name=f"{name}-whole", grid=there, steps=8, **options)
    run_on_grid(_run, there.world_size, name=name, grid=there, steps=4, **options)
    again = run_on_grid(_run, back.world_size, name=name, grid=back, steps=8, resume=True, **options)
    assert _losses(folder / name) == pytest.approx(_losses(folder / f"{name}-whole"), abs=2e-3 if bf16 else 1e-5)
    assert len(_losses(folder / name)) == 8
    assert again[0] == whole[0]
