"""Mode "async" on plain engines and pipelines: against a simulation, at different speeds, stopped, lost, resumed."""

import functools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from compression_grid import Layers, differing
from distributed import run_on_grid as run_for_long
from logs import write_log
from modes_async import BASE, in_lockstep, plain_engine, step, train, weights_of

import ds_recsys
from ds_recsys import UserError

run_on_grid = functools.partial(run_for_long, timeout=45)

_SGD = {**BASE, "optimizer": {"type": "SGD", "params": {"lr": 0.2}}, "gradient_clipping": 0.3}


def _in_lockstep(send_every):
    engine = plain_engine(config=_SGD, send_every=send_every)
    in_lockstep(engine.data_parallel)
    for number in range(20):
        step(engine, number)
    own = weights_of(engine)
    engine.data_parallel.flush()
    engine.data_parallel.close()
    return own, weights_of(engine)


def _simulated(replicas, steps, send_every):
    """The equations, in one process: what is sent after one step is applied after the next one, and known after that."""
    torch.manual_seed(0)
    model = Layers()
    start = torch.cat([p.detach().view(-1) for p in model.parameters()]).double()
    own = torch.zeros(replicas, len(start), dtype=torch.float64)
    told = torch.zeros_like(own)  # to each other replica the same
    weights = start.repeat(replicas, 1)
    came = torch.zeros_like(own)
    under_way, sent = None, 0
    for number in range(steps):
        for i in range(replicas):
            torch.nn.utils.vector_to_parameters(weights[i].float(), model.parameters())
            generator = torch.Generator().manual_seed(1000 * number + i)
            items = torch.randint(50, (8,), generator=generator)
            model.zero_grad()
            model(items, (3 * items + 1) % 50).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            own[i] -= 0.2 * torch.cat([p.grad.view(-1) for p in model.parameters()]).double()
        if under_way is not None:
            came, under_way = came + under_way, None
        elif number + 1 - sent >= send_every:
            under_way, sent = own - told, number + 1
            told = own.clone()
        others = came.sum(0) - came
        weights = start + (own + (replicas - 1) * (own - told) + others) / replicas
    return weights.float(), (start + own.mean(0)).float()


@pytest.mark.parametrize("replicas, send_every", [(2, 1), (3, 1), (3, 4)])
def test_twenty_steps_equal_a_simulation(replicas, send_every):
    results = run_on_grid(_in_lockstep, replicas, send_every=send_every)
    expected, consensus = _simulated(replicas, 20, send_every)
    for (own, flushed), simulated in zip(results, expected, strict=True):
        assert (own - simulated).abs().max() < 1e-6
        assert (flushed - consensus).abs().max() < 1e-6 and torch.equal(flushed, results[0][1])
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def _at_full_speed(method):
    engine = plain_engine(method)
    losses = train(engine, 30)
    mode = engine.data_parallel
    own = weights_of(engine)
    mode.flush()
    flushed = weights_of(engine)
    figures = mode.as_dict()
    mode.close()
    assert not any(thread.is_alive() for thread in mode.wire._threads)
    return own, flushed, losses, figures


@pytest.mark.parametrize("replicas, method", [(2, "none"), (3, "int8"), (4, "topk")])
def test_after_a_flush_all_replicas_hold_the_same_bits(replicas, method):
    results = run_on_grid(_at_full_speed, replicas, method=method)
    first = results[0]
    for own, flushed, losses, figures in results:
        assert torch.equal(flushed, first[1]) and not torch.equal(own, flushed)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and all(map(torch.isfinite, torch.tensor(losses)))
        assert figures["messages"] > 0 and figures["sent_bytes"] > 0
    assert sum(figures["steps"] for *_, figures in results) >= 30 * replicas
    assert not torch.equal(results[0][0], results[1][0])


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def pipeline_config(pipe, tensor, compression=None, training=None, **data_parallel):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "steps_per_print": 100_000,
        "recsys": {
            "pipe": pipe,
            "tensor": tensor,
            "dataset": {"max_length": 12},
            "model": {"config": _LLAMA, "tie": True},
            "training": training or {"steps": 12, "eval_every_epochs": 0},
            "compression": compression or {},
            "data_parallel": {"mode": "async", "send_every": 1, **data_parallel},
        },
    }


def _copies_that_differ(engine):
    """As `differing`, within replicas."""
    replica = engine.data_parallel.data_rank
    shards = engine.module.builder.shards()
    tensor_rank = engine.grid.get_slice_parallel_rank()
    mine = {
        (replica, name, tensor_rank if name in shards else -1): parameter.detach().numpy().tobytes()
        for name, parameter in engine.module.hf_named_parameters()
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    copies, held = {}, 0
    for one in everyone:
        for key, value in one.items():
            held += key in copies
            copies.setdefault(key, set()).add(value)
    assert held, "nothing is held twice"
    return [key for key, values in copies.items() if len(values) > 1]


def _pipeline(folder, values, pause):
    trainer = ds_recsys.Trainer(values, data=folder / "log.csv", run_dir=None)
    mode, engine = trainer.mode, trainer.engine
    trainer.callbacks = []
    losses = []
    while trainer._progress() < 12:
        for micro_batches in trainer.batches.epoch_iterator(len(losses) // trainer.batches.steps_per_epoch, 0):
            losses.append(trainer._step(micro_batches).item())
            time.sleep(pause * mode.data_rank)
            if trainer._progress() >= 12:
                break
    mode.meet(0)
    apart = _copies_that_differ(engine)
    spread = [None] * dist.get_world_size()
    dist.all_gather_object(spread, differing(engine))
    mode.flush()
    mode.end()
    return apart, bool(any(spread)), differing(engine), mode.steps, losses


@pytest.mark.parametrize("pipe, tensor, method", [(2, 1, "none"), (2, 1, "int8"), (1, 2, "int8")])
def test_copies_within_a_replica_stay_equal_and_a_flush_makes_all_equal(folder, pipe, tensor, method):
    compression = {"method": method, **({"min_elements": 1} if method != "none" else {})}
    values = pipeline_config(pipe, tensor, compression)
    results = run_on_grid(_pipeline, 4, folder=folder, values=values, pause=0.02)
    for apart, spread, differ, _, losses in results:
        assert apart == [] and spread and differ == []
        assert sum(losses[-3:]) < sum(losses[:3])
    assert len({steps for *_, steps, _ in results}) > 1, "the replicas went at one speed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("async")
    write_log(folder / "log.csv")
    return folder


def _at_different_speeds():
    schedule = {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 31, "warmup_num_steps": 2, "warmup_max_lr": 0.01},
    }
    engine = plain_engine(config={**BASE, "scheduler": schedule})
    slow = dist.get_rank() == 2
    losses = train(engine, 30, pause=0.15 if slow else 0.05)
    mode = engine.data_parallel
    figures = {**mode.as_dict(), "schedule": engine.lr_scheduler.last_batch_iteration + 1}
    mode.flush()
    mode.close()
    return len(losses), figures, weights_of(engine)


def test_a_slow_replica_does_not_slow_the_others():
    results = run_on_grid(_at_different_speeds, 3)
    first, second, slow = (steps for steps, *_ in results)
    assert min(first, second) > 1.7 * slow > 0, (first, second, slow)
    assert first + second + slow >= 90
    assert all(figures["dropped_steps"] == 0 for _, figures, _ in results)
    assert all(figures["schedule"] == figures["progress"] >= 30 for _, figures, _ in results)
    assert all(torch.equal(weights, results[0][2]) for *_, weights in results)


def _stopped(folder):
    handler = _keep_logs()
    engine = plain_engine(max_staleness=10)
    mode, pids = engine.data_parallel, [None] * 3
    dist.all_gather_object(pids, os.getpid())
    rank = dist.get_rank()
    train(engine, 5, pause=0.02)
    mode.meet(mode.progress(0))
    dist.barrier()  # all have left the meeting
    steps = mode.steps
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0:
        while _state_of(pids[2]) != "T":
            time.sleep(0.01)
        for _ in range(40):
            step(engine, mode.steps)
            time.sleep(0.02)
        os.kill(pids[2], signal.SIGCONT)
    made = mode.steps - steps
    train(engine, 60, pause=0.02)
    mode.flush()
    mode.end()
    return made, mode.as_dict(), weights_of(engine), handler


def _state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def _keep_logs():
    """A list that fills with what is logged."""
    import logging

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("ds_recsys").addHandler(handler)
    return lines


def test_a_stopped_replica_is_reported_and_comes_back(folder):
    results = run_on_grid(_stopped, 3, folder=folder)
    made, _, weights, lines = results[0]
    assert made >= 40, "it waited for the replica that was stopped"
    assert len([line for line in lines if line.startswith("replica 2 has taken nothing")]) == 1, lines
    assert len([line for line in lines if line.startswith("replica 2 is back")]) == 1, lines
    _, figures, _, lines = results[2]
    dropped = [line for line in lines if line.startswith("replica 2 is") and "behind" in line]
    assert len(dropped) == 1 and "\n" not in dropped[0] and figures["dropped_steps"] >= 1, lines
    assert all(torch.equal(result[2], weights) for result in results)
    assert all(result[1]["lost"] == [] for result in results)


def _lost(on_lost, victim):
    lines = _keep_logs()
    engine = plain_engine(on_lost=on_lost)
    train(engine, 5, pause=0.01)
    mode = engine.data_parallel
    mode.meet(mode.progress(0))
    if dist.get_rank() == victim:
        time.sleep(2)  # until the others are through the meeting too
        return None  # this process ends without a word
    before = mode.steps
    try:
        train(engine, 20, pause=0.01)
        mode.flush()
        mode.end()
    except UserError as error:
        return str(error), mode.steps - before, None, None, lines
    return None, mode.steps - before, weights_of(engine), mode.as_dict(), lines


@pytest.mark.parametrize("on_lost, victim", [("stop", 2), ("continue", 2), ("continue", 0)])
def test_a_lost_replica_ends_the_run_or_does_not(on_lost, victim):
    results = [result for result in run_on_grid(_lost, 3, on_lost=on_lost, victim=victim) if result]
    assert len(results) == 2
    for error, steps, weights, figures, lines in results:
        if on_lost == "stop" or victim == 0:
            assert error and "\n" not in error and f"replica {victim} is lost" in error and "--resume" in error
            assert ("replica 0, which writes" in error) == (victim == 0)
        else:
            assert error is None and steps > 15 and figures["lost"] == [2]
            assert torch.equal(weights, results[0][2])
            assert len([line for line in lines if "replica 2 is lost" in line]) == 1


def _resumed(folder, method):
    engine = plain_engine(method)
    in_lockstep(engine.data_parallel)
    for number in range(8):
        step(engine, number)
    engine.save_checkpoint(str(folder))
    expected = [step(engine, number) for number in range(8, 15)]
    again = plain_engine(method)
    again.load_checkpoint(str(folder))
    assert again.data_parallel.steps == 8
    in_lockstep(again.data_parallel)
    losses = [step(again, number) for number in range(8, 15)]
    assert losses == expected and torch.equal(weights_of(again), weights_of(engine))
    forgetful = plain_engine(method)
    forgetful.load_checkpoint(str(folder))
    for peer in forgetful.data_parallel.ledger.peers.values():
        peer.pending.zero_()
    in_lockstep(forgetful.data_parallel)
    assert [step(forgetful, number) for number in range(8, 15)] != expected, "what is pending changes nothing"
    unbroken = plain_engine(method)
    in_lockstep(unbroken.data_parallel)
    for number in range(8):
        step(unbroken, number)
    unbroken.data_parallel.meet(0)
    assert [step(unbroken, number) for number in range(8, 15)] == expected, "saving changed the run"
    for one in (engine, again, forgetful, unbroken):
        one.data_parallel.meet(0)
        one.data_parallel.close()


@pytest.mark.parametrize("method", ["none", "int4", "randomk"])
def test_a_resumed_run_is_bit_equal(tmp_path, method):
    run_on_grid(_resumed, 2, folder=tmp_path, method=method)


def _other_size(folder, save):
    engine = plain_engine()
    if save:
        train(engine, 5)
        engine.save_checkpoint(str(folder))
        with engine.data_parallel.evaluation():
            weights = weights_of(engine)
        engine.data_parallel.close()
        return weights
    engine.load_checkpoint(str(folder), tag=(folder / "latest").read_text())
    loaded = weights_of(engine)
    train(engine, 10)
    engine.data_parallel.flush()
    engine.data_parallel.close()
    return loaded


def test_a_checkpoint_holds_the_mean_and_goes_on_with_another_number_of_replicas(tmp_path):
    saved = run_on_grid(_other_size, 2, folder=tmp_path, save=True)
    loaded = run_on_grid(_other_size, 3, folder=tmp_path, save=False)
    assert torch.equal(saved[0], saved[1]) and all(torch.equal(weights, saved[0]) for weights in loaded)


_REFUSED = {
    "powersgd": ({"method": "powersgd"}, "needs all replicas at once"),
    "error_feedback": ({"method": "int8", "error_feedback": False}, "sent later"),
    "warm-up": ({"method": "int8", "warmup_steps": 5}, "no common steps"),
    "owners": ({"method": "int8", "owner_shares": [1, 0]}, "nobody sums"),
}


@pytest.mark.parametrize("case", _REFUSED)
def test_what_cannot_work_is_one_line(case):
    compression, message = _REFUSED[case]
    values = pipeline_config(1, 1, compression)
    with pytest.raises(UserError, match=message) as caught:
        ds_recsys.load_config(values)
    assert "\n" not in str(caught.value) and "async" in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [({"zero_optimization": {"stage": 1}}, "stage 0"), ({"bf16": {"enabled": True}}, "train in fp32")],
)
def test_an_optimizer_in_shards_is_one_line(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ds_recsys.load_config({**pipeline_config(1, 1), **changes})
    assert "\n" not in str(caught.value)
