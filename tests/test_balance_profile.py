"""The profiler finds what each stage and layer takes, on a real pipeline whose layers move a clock, and changes nothing."""

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing
from distributed import run_on_grid
from logs import config, write_log

import ds_recsys
from ds_recsys.balance.profile import StageProfiler
from ds_recsys.timeline.clock import HostClock
from ds_recsys.topology import Grid

_FORWARD, _BACKWARD = [0.01, 0.02, 0.03, 0.01], [0.02, 0.01, 0.04, 0.03]


class _Clock(HostClock):
    """Goes on only where a layer works."""

    time = 0.0

    def now(self):
        return self.time


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, forward, backward):
        ctx.seconds = backward
        _Clock.time += forward
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        _Clock.time += ctx.seconds
        return gradient, None, None


class _Layer(torch.nn.Linear):
    def __init__(self, place):
        super().__init__(8, 8)
        self.place = place

    def forward(self, value):
        return _Sleep.apply(super().forward(value), _FORWARD[self.place], _BACKWARD[self.place])


def _engine(pipe, interval):
    torch.manual_seed(0)
    model = PipelineModule(
        [_Layer(place) for place in range(4)],
        topology=Grid(pipe, 1, 1).deepspeed(),
        loss_fn=torch.nn.MSELoss(),
        partition_method="uniform",
        activation_checkpoint_interval=interval,
        activation_checkpoint_func=checkpointing.non_reentrant_checkpoint,
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "steps_per_print": 1000,
    }
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def _profiled(pipe, interval):
    plain, engine = _engine(pipe, interval), _engine(pipe, interval)
    profiler = StageProfiler(engine, sample_every=6, clock=_Clock())
    one = torch.ones(2, 5, 8)
    for _ in range(7):
        losses = [e.train_batch(iter([(one, one)] * 4)).item() for e in (plain, engine)]
        assert losses[0] == losses[1]
    steps = profiler.steps
    profiler.close()
    engine.train_batch(iter([(one, one)] * 4))
    assert len(profiler.steps) == len(steps) == 7
    assert [bool(step.layers) for step in steps] == [False, True, True, True, False, True, False]
    return engine.module._local_start, engine.module._local_stop, steps[5]


@pytest.mark.parametrize("pipe", [1, 2])
def test_times_are_those_of_the_layers(pipe):
    for start, stop, step in run_on_grid(_profiled, pipe, pipe=pipe, interval=0):
        assert step.tokens == step.layer_tokens == 10
        assert list(step.layers) == list(range(start, stop))
        assert step.forward == pytest.approx(sum(_FORWARD[start:stop]))
        assert step.backward == pytest.approx(sum(_BACKWARD[start:stop]))
        for layer, profile in step.layers.items():
            assert profile.forward == pytest.approx(_FORWARD[layer])
            assert profile.backward == pytest.approx(_BACKWARD[layer])
            assert profile.boundary_bytes == 2 * 5 * 8 * 4 <= profile.activation_bytes < 1000


def test_recomputation_counts_as_backward():
    for start, stop, step in run_on_grid(_profiled, 2, pipe=2, interval=1):
        assert step.backward == pytest.approx(sum(_BACKWARD[start:stop]) + sum(_FORWARD[start:stop]))
        for layer, profile in step.layers.items():
            assert profile.forward == pytest.approx(_FORWARD[layer])
            assert profile.backward == pytest.approx(_BACKWARD[layer] + _FORWARD[layer])


def _tokens(folder):
    """(values in a micro-batch, what the profiler counted) of each step."""
    values = config(pipe=2, tensor=2, training={"steps": 4, "eval_every_epochs": 0})
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=None)
    trainer.callbacks = []
    profiler, found = StageProfiler(trainer.engine), []
    for _, micro_batches in zip(range(4), trainer.batches.epoch_iterator(0), strict=False):
        trainer._step(micro_batches)
        step = profiler.steps[-1]
        found.append((sum(inputs.numel() for inputs, _ in micro_batches) / len(micro_batches), step.tokens))
        if step.layers:
            found.append((micro_batches[-1][0].numel(), step.layer_tokens))
    return found


def test_ranks_of_a_tensor_axis_count_the_tokens_that_they_put_together(tmp_path):
    write_log(tmp_path / "log.csv")
    results = run_on_grid(_tokens, 4, folder=tmp_path)
    assert all(counted == values for found in results for values, counted in found)
    assert all(len(found) == 7 for found in results)  # of three steps the layers too
