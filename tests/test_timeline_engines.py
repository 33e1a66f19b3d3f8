"""StepTimeline on real grids: what a rank waits for is named, nothing else changes, and everything comes off again."""

import json
import time

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from distributed import run_on_grid

import ds_recsys
from ds_recsys import regions
from ds_recsys.timeline import CATEGORIES
from ds_recsys.topology import Grid, TensorAxis

_NAP = 0.05  # seconds; a step without naps takes a few milliseconds
_STEPS = 4


class _Layer(torch.nn.Linear):
    """A layer that computes for `nap` seconds more, on each micro-batch."""

    nap = 0.0

    def forward(self, value):
        time.sleep(self.nap)
        return super().forward(value)


class _Shared(_Layer):
    """A layer with a collective over the tensor axis forward and one backward, the second after a nap on rank 1."""

    axis = None

    def forward(self, value):
        value = regions.copy_to_region(value, self.axis)
        if value.requires_grad:
            value.register_hook(lambda _: time.sleep(self.nap))
        return regions.reduce_from_region(torch.nn.Linear.forward(self, value), self.axis)


def _config(stage=0, micro_batches=4):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
    }


def _pipeline(grid, stage=0, layer=_Layer):
    torch.manual_seed(0)
    model = PipelineModule([layer(16, 16) for _ in range(4)], topology=grid.deepspeed(), loss_fn=torch.nn.MSELoss())
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=_config(stage))[0]
    _Shared.axis = TensorAxis(
        engine.grid.get_slice_parallel_group(), grid.tensor, engine.grid.get_slice_parallel_rank()
    )
    return engine


def _batch(engine):
    generator = torch.Generator().manual_seed(dist.get_rank())
    one = (torch.randn(2, 16, generator=generator), torch.randn(2, 16, generator=generator))
    return [one] * engine.micro_batches


def _train(engine, steps=_STEPS):
    return [engine.train_batch(iter(_batch(engine))).item() for _ in range(steps)]


def _slow(engine, rank):
    """From now on each layer of `rank` naps."""
    if dist.get_rank() == rank:
        for layer in engine.module.modules():
            layer.nap = _NAP


def _assert_adds_up(timeline):
    for step in timeline.steps:
        assert sum(getattr(step, name) for name in CATEGORIES) == pytest.approx(step.wall, abs=1e-9)
        assert all(getattr(step, name) >= 0 for name in CATEGORIES)


def _medians(timeline):
    """Seconds by category of each rank, over the slow steps."""
    return [rank.times for rank in timeline.summary(last=_STEPS).ranks]


def _a_slow_stage(stage):
    engine = _pipeline(Grid(pipe=2), stage)
    timeline = ds_recsys.StepTimeline(engine)
    _train(engine)
    _slow(engine, rank=1)
    _train(engine)
    _assert_adds_up(timeline)
    naps = 4 * 2 * _NAP  # micro-batches x layers
    ahead, behind = _medians(timeline)
    assert ahead["compute"] < 0.2 * naps and ahead["pipeline"] > 0.8 * naps
    assert naps <= behind["compute"] < 1.2 * naps and behind["pipeline"] < 0.2 * naps
    summary = timeline.summary(last=_STEPS)
    assert ahead["tensor"] == 0 and summary.times["gradients"] < 0.2 * naps
    assert summary.busy == pytest.approx(0.5, abs=0.1) and naps < summary.step < 1.3 * naps
    sent = 4 * 2 * 16 * 4  # bytes of the activations of a step; as many come back as gradients
    assert 2 * sent <= timeline.last.payload["pipeline"] < 2 * sent + 100
    assert [step.step for step in timeline.steps] == list(range(1, 2 * _STEPS + 1))
    timeline.clear()
    assert timeline.steps == [] and timeline.last is None
    timeline.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_slow_stage_computes_and_the_other_waits(stage):
    run_on_grid(_a_slow_stage, 2, stage=stage)


def _a_slow_replica(stage):
    engine = _pipeline(Grid(data=2), stage)
    timeline = ds_recsys.StepTimeline(engine)
    _slow(engine, rank=1)
    _train(engine)
    _assert_adds_up(timeline)
    naps = 4 * 4 * _NAP
    fast, slow = _medians(timeline)
    assert fast["gradients"] > 0.8 * naps and fast["compute"] < 0.2 * naps
    assert fast["pipeline"] == fast["tensor"] == 0
    assert slow["gradients"] < 0.2 * naps and slow["compute"] >= naps
    parameters = sum(p.numel() for p in engine.module.parameters()) * 4
    assert timeline.last.payload["gradients"] >= parameters
    timeline.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_slow_replica_is_waited_for_in_gradients(stage):
    run_on_grid(_a_slow_replica, 2, stage=stage)


def _a_slow_tensor_rank():
    engine = _pipeline(Grid(tensor=2), layer=_Shared)
    timeline = ds_recsys.StepTimeline(engine)
    _train(engine, 1)
    _slow(engine, rank=1)
    _train(engine)
    _assert_adds_up(timeline)
    naps = 4 * 3 * _NAP  # in the backward of all layers but the first, whose input needs no gradient
    fast, slow = _medians(timeline)
    assert fast["tensor"] > 0.8 * naps and fast["compute"] < 0.2 * naps
    assert slow["tensor"] < 0.2 * naps and slow["compute"] >= naps
    timeline.close()


def test_a_slow_tensor_rank_is_waited_for_inside_backward():
    run_on_grid(_a_slow_tensor_rank, 2)


def _nothing_changes(stage):
    found = []
    for timed in (False, True):
        engine = _pipeline(Grid(pipe=2, data=2), stage)
        timeline = ds_recsys.StepTimeline(engine) if timed else None
        losses = _train(engine)
        engine.eval_batch(iter(_batch(engine)))
        found.append((losses + _train(engine), [p.detach().clone() for p in engine.module.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert [step.step for step in timeline.steps] == list(range(1, 2 * _STEPS + 1))


@pytest.mark.parametrize("stage", [0, 1])
def test_losses_and_weights_are_bit_equal_and_evaluation_does_not_count(stage):
    run_on_grid(_nothing_changes, 4, stage=stage)


def _collective_methods():
    owners = (dist.ProcessGroup, dist.Work)
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


def _it_comes_off():
    engines = [_pipeline(Grid(pipe=2)) for _ in range(2)]
    before = [dict(vars(engine)) for engine in engines], _collective_methods()
    timelines = [ds_recsys.StepTimeline(engine) for engine in engines]
    for engine in engines:
        _train(engine, 1)
        assert _collective_methods() == before[1], "the classes of torch are wrapped outside of a step"
    timelines[0].close()
    _train(engines[0], 1)
    _train(engines[1], 1)
    assert [len(timeline.steps) for timeline in timelines] == [1, 2]
    timelines[1].close()
    for engine, attributes in zip(engines, before[0], strict=True):
        for name in ("train_batch", "_INSTRUCTION_MAP"):
            assert vars(engine).get(name) is attributes.get(name)
    assert _collective_methods() == before[1]


def test_two_engines_and_everything_comes_off():
    run_on_grid(_it_comes_off, 2)


class _Broken(_Layer):
    broken = False

    def forward(self, value):
        if self.broken:
            raise RuntimeError("broken")
        return super().forward(value)


def _a_broken_step():
    before = _collective_methods()
    engine = _pipeline(Grid(), layer=_Broken)
    timeline = ds_recsys.StepTimeline(engine)
    _Broken.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        _train(engine, 1)
    assert _collective_methods() == before and "_INSTRUCTION_MAP" not in vars(engine)
    _Broken.broken = False
    engine.timers("train_batch").reset()  # which DeepSpeed left running
    _train(engine, 1)
    _assert_adds_up(timeline)
    assert len(timeline.steps) == 1


def _a_broken_forward():
    model = torch.nn.Sequential(_Broken(16, 16))
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=_config(0, 2))[0]
    timeline = ds_recsys.StepTimeline(engine)
    _Broken.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        engine(torch.zeros(2, 16))
    _Broken.broken = False
    time.sleep(_NAP)
    _plain_steps(engine, 1)
    assert timeline.last.wall < _NAP


def test_a_forward_that_breaks_off_does_not_count():
    run_on_grid(_a_broken_forward, 1)


def test_a_step_that_breaks_off_does_not_count():
    run_on_grid(_a_broken_step, 1)


def _replaced_instruction(first):
    from deepspeed.runtime.pipe import schedule

    engine = _pipeline(Grid(data=2))
    timeline = ds_recsys.StepTimeline(engine) if first == "timeline" else None

    def reduce(self):
        time.sleep(_NAP)
        type(self)._exec_reduce_grads(self)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.ReduceGrads: reduce}
    timeline = timeline or ds_recsys.StepTimeline(engine)
    _train(engine)
    assert _medians(timeline)[0]["gradients"] > _NAP
    timeline.close()
    assert engine._INSTRUCTION_MAP[schedule.ReduceGrads] is reduce


@pytest.mark.parametrize("first", ["timeline", "replacement"])
def test_a_replaced_instruction_is_timed_whichever_came_first(first):
    run_on_grid(_replaced_instruction, 2, first=first)


def _plain_engine(stage):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[_Layer(16, 16) for _ in range(3)])
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=_config(stage, 2))[0]


def _plain_steps(engine, steps, micro_batches=2):
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(steps * micro_batches):
        loss = engine(torch.randn(2, 16, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def _an_engine_without_a_pipeline(stage):
    expected = _plain_steps(_plain_engine(stage), _STEPS)
    engine = _plain_engine(stage)
    before = set(vars(engine))
    timeline = ds_recsys.StepTimeline(engine)
    assert _plain_steps(engine, _STEPS) == expected
    with torch.no_grad():
        engine(torch.zeros(2, 16))
    engine.eval()
    engine(torch.zeros(2, 16))
    engine.train()
    time.sleep(_NAP)
    timeline.clear()
    _slow(engine, rank=1)
    _plain_steps(engine, _STEPS)
    _assert_adds_up(timeline)
    assert [step.step for step in timeline.steps] == list(range(_STEPS + 1, 2 * _STEPS + 1))
    assert timeline.steps[0].other < _NAP, "evaluation began a step"
    naps = 2 * 3 * _NAP
    fast, slow = _medians(timeline)
    assert fast["gradients"] > 0.8 * naps and fast["compute"] < 0.2 * naps
    assert slow["gradients"] < 0.2 * naps and naps <= slow["compute"] < 1.2 * naps
    assert fast["optimizer"] > 0 and fast["pipeline"] == fast["tensor"] == 0
    timeline.close()
    assert set(vars(engine)) == before


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_engine_without_a_pipeline(stage):
    run_on_grid(_an_engine_without_a_pipeline, 2, stage=stage)


class _Asynchronous(_Layer):
    """Starts a sum, on rank 1 after a nap, computes for a quarter of a nap meanwhile, then waits."""

    def forward(self, value):
        time.sleep(self.nap)
        total = torch.ones(1)
        work = dist.all_reduce(total, async_op=True)
        time.sleep(_NAP / 4)
        work.wait()
        assert total.item() == 2
        return torch.nn.Linear.forward(self, value)


def _asynchronous():
    engine = _pipeline(Grid(data=2), layer=_Asynchronous)
    timeline = ds_recsys.StepTimeline(engine)
    _train(engine, 1)
    _slow(engine, rank=1)
    _train(engine)
    _assert_adds_up(timeline)
    fast, slow = _medians(timeline)
    layers = 4 * 4
    assert fast["compute"] == pytest.approx(layers * _NAP / 4, rel=0.25)
    assert fast["gradients"] == pytest.approx(layers * _NAP, rel=0.25)
    assert slow["compute"] == pytest.approx(layers * _NAP * 5 / 4, rel=0.25)
    timeline.close()


def test_an_asynchronous_collective_costs_what_is_waited_for():
    run_on_grid(_asynchronous, 2)


def _traced(path):
    engine = _pipeline(Grid(pipe=2, data=2))
    timeline = ds_recsys.StepTimeline(engine, trace_step=3, trace_file=path)
    _train(engine)
    timeline.close()
    return timeline.steps[2]


def test_the_trace_of_a_step_holds_all_ranks(tmp_path):
    path = tmp_path / "run" / "trace.json"
    steps = run_on_grid(_traced, 4, path=path)
    assert [entry.name for entry in path.parent.iterdir()] == ["trace.json"]
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names[3] == "rank 3: pipe 1 data 1 tensor 0" and len(names) == 4
    begin = min(step.start for step in steps)
    for rank, step in enumerate(steps):
        mine = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        assert mine[0]["name"] == "step" and mine[0]["ts"] == pytest.approx((step.start - begin) * 1e6, abs=1)
        assert mine[0]["dur"] == pytest.approx(step.wall * 1e6, abs=1)
        labels = [event["name"] for event in mine]
        for kind in ("forward", "backward"):
            assert [label for label in labels if label.startswith(kind)] == [f"{kind} {i}" for i in range(4)]
        assert {"reduce gradients", "optimizer step"} <= set(labels)
        assert ("recv activation 3" in labels) == (rank >= 2)
        assert any(label.startswith("all_reduce 2.2 kB (data)") for label in labels)
        _assert_nested(mine)


def _assert_nested(events):
    """Each event lies inside the one around it, or after it."""
    around = []
    for event in events:
        end = event["ts"] + event["dur"]
        while around and around[-1] <= event["ts"] + 1e-3:
            around.pop()
        assert not around or end <= around[-1] + 1e-3, event
        around.append(end)
