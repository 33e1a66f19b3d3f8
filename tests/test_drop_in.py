"""`ds_recsys.initialize` in place of `deepspeed.initialize` in scripts that know nothing of recommenders."""

import argparse
import json
import logging
import os

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from distributed import run_on_grid

import ds_recsys

_PIPELINE = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    "gradient_clipping": 0.5,
    "steps_per_print": 1000,
}


def _pipeline_losses(initialize, config, as_args=False):
    """DeepSpeed's own pipeline example in small: an nn.Sequential as PipelineModule, labels and train_batch."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    model = PipelineModule(layers, num_stages=2, loss_fn=torch.nn.CrossEntropyLoss())
    parameters = [p for p in model.parameters() if p.requires_grad]
    how = (
        {"args": argparse.Namespace(deepspeed_config=config, local_rank=int(os.environ["LOCAL_RANK"]))}
        if as_args
        else {"config": config}
    )
    engine, _, _, _ = initialize(model=model, model_parameters=parameters, **how)
    generator = torch.Generator().manual_seed(engine.grid.get_data_parallel_rank())
    losses = []
    for _ in range(6):
        batches = [
            (torch.randn(2, 8, generator=generator), torch.randint(4, (2,), generator=generator))
            for _ in range(engine.micro_batches)
        ]
        losses.append(engine.train_batch(iter(batches)).item())
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def _both(config, given):
    plain = _pipeline_losses(deepspeed.initialize, config)
    ours = _pipeline_losses(ds_recsys.initialize, given, as_args=isinstance(given, str))
    assert ours[0] == plain[0]
    assert all(torch.equal(a, b) for a, b in zip(ours[1], plain[1], strict=True))


@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_script_is_bit_equal(stage, tmp_path):
    config = {**_PIPELINE, "zero_optimization": {"stage": stage}}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    run_on_grid(_both, 4, config=config, given=str(path))


def test_recsys_block_and_auto_are_resolved(tmp_path):
    automatic = {
        **_PIPELINE,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "recsys": {"pipe": 2},
    }
    run_on_grid(_both, 4, config=_PIPELINE, given=automatic)


def _plain_engine_losses(initialize):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for step in range(4):
        loss = engine(torch.full((2, 8), 1.0 + step)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _plain_engine():
    assert _plain_engine_losses(ds_recsys.initialize) == _plain_engine_losses(deepspeed.initialize)


def test_plain_engine_with_zero_2_is_bit_equal():
    run_on_grid(_plain_engine, 2)


def _bad_config():
    with pytest.raises(ds_recsys.UserError, match="zero_optimisation.*zero_optimization"):
        ds_recsys.initialize(
            model=torch.nn.Linear(2, 2), config={"train_batch_size": 1, "zero_optimisation": {"stage": 1}}
        )
    with pytest.raises(ds_recsys.UserError, match="2 configs given"):
        ds_recsys.initialize(
            args=argparse.Namespace(deepspeed_config="a.json"),
            model=torch.nn.Linear(2, 2),
            config={"train_batch_size": 1},
        )


def _idle_settings():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("ds_recsys").addHandler(handler)
    config = {
        "train_batch_size": 1,
        "optimizer": _PIPELINE["optimizer"],
        "recsys": {"seed": 1, "training": {"epochs": 1}},
    }
    model = torch.nn.Linear(2, 2)
    ds_recsys.initialize(model=model, model_parameters=model.parameters(), config=config)
    assert records == ["config: recsys.seed, training has no effect here: ds_recsys.Trainer reads it"]


def test_settings_without_effect_are_named():
    run_on_grid(_idle_settings, 1)


def test_mistakes_are_one_line():
    run_on_grid(_bad_config, 1)
