"""The bookkeeping of mode "async" against a simulation written from its equations, without processes."""

import random

import pytest
import torch
from torch import Tensor

from ds_recsys.comm.compressors import compressor
from ds_recsys.comm.modes.exchange import Format, Ledger, mean_in_order
from ds_recsys.config.compression import Compression

_SHAPES = (("table", (30, 40)), ("bias", (40,)), ("head", (40, 30)))
_NUMEL = 2 * 1200 + 40
_METHODS = {
    "none": {},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int4": {"method": "int4"},
    "topk": {"method": "topk", "ratio": 0.05},
    "randomk": {"method": "randomk", "ratio": 0.1},
}


def _options(method):
    return Compression(**_METHODS[method], **({"min_elements": 1} if method != "none" else {}))


class _Problem:
    """Each replica pulls its weights towards a target of its own."""

    def __init__(self, replicas):
        generator = torch.Generator().manual_seed(0)
        self.start = torch.randn(_NUMEL, generator=generator)
        self.targets = torch.randn(replicas, _NUMEL, generator=generator)

    def change(self, replica, weights):
        return 0.1 * (self.targets[replica] - weights)


class _Simulation:
    """theta_i = theta_0 + (S_i + sum over j of (S_i - sent_ij) + sum over j of what came from j) / N, in fp64."""

    def __init__(self, problem, replicas, quantise):
        self.problem, self.quantise = problem, quantise
        self.start, self.own = problem.start.double(), torch.zeros(replicas, _NUMEL, dtype=torch.float64)
        self.sent = torch.zeros(replicas, replicas, _NUMEL, dtype=torch.float64)
        self.came = torch.zeros(replicas, replicas, _NUMEL, dtype=torch.float64)
        self.replicas, self.under_way, self.number = replicas, {}, {}

    def weights(self, i) -> Tensor:
        others = [j for j in range(self.replicas) if j != i]
        kept = self.own[i] + sum(self.own[i] - self.sent[i, j] for j in others)
        return self.start + (kept + sum(self.came[i, j] for j in others)) / self.replicas

    def step(self, i):
        self.own[i] += self.problem.change(i, self.weights(i))

    def send(self, i, j):
        self.number[i, j] = self.number.get((i, j), 0) + 1
        self.under_way[i, j] = self.quantise(self.own[i] - self.sent[i, j], self.number[i, j])
        self.sent[i, j] += self.under_way[i, j]

    def arrive(self, i, j):
        self.came[j, i] += self.under_way.pop((i, j))


def _quantiser(method):
    if method == "none":
        return lambda values, number: values
    options = {key: value for key, value in _METHODS[method].items() if key != "method"}
    kind = compressor(method, **options)

    def quantise(values, number):
        from ds_recsys.comm.payload import Codec

        values, place = values.float(), 0
        for name, shape in _SHAPES:
            part = values[place : place + torch.Size(shape).numel()]
            if len(shape) > 1:
                seed = Codec(part, None, number)._seed(type("Part", (), {"name": name, "start": 0, "compressor": kind}))
                part.copy_(kind.decompress(kind.compress(part, seed), part.numel(), seed))
            place += part.numel()
        return values.double()

    return quantise


def _ledgers(problem, replicas, method="none", max_staleness=1000, send_every=1):
    form = Format(_SHAPES, _options(method))
    return [Ledger(form, problem.start.clone(), own, replicas, max_staleness, send_every) for own in range(replicas)]


def _run(ledgers, problem, events, simulation=None, messages=None):
    messages = {} if messages is None else messages
    for kind, i, j in events:
        if simulation:
            getattr(simulation, kind)(*((i,) if kind == "step" else (i, j)))
        if kind == "step":
            ledgers[i].steps += 1
            ledgers[i].record(ledgers[i].weights + problem.change(i, ledgers[i].weights))
        elif kind == "send":
            messages[i, j] = torch.empty(ledgers[i].form.message_bytes, dtype=torch.uint8)
            ledgers[i].send(j, messages[i, j])
        else:
            ledgers[j].apply(i, messages.pop((i, j)))
            ledgers[i].hear(j, ledgers[j].steps, ledgers[j].peers[i].applied)
    return messages


def _schedule(replicas, steps, seed):
    """Any order of steps, sends and arrivals with one message under way at most from each to each."""
    draw, left, under_way, events = random.Random(seed), [steps] * replicas, set(), []
    while any(left):
        i, j = draw.sample(range(replicas), 2)
        if left[i] and draw.random() < 0.5:
            left[i] -= 1
            events.append(("step", i, i))
        elif (i, j) in under_way:
            under_way.remove((i, j))
            events.append(("arrive", i, j))
        elif draw.random() < 0.5:
            under_way.add((i, j))
            events.append(("send", i, j))
    return events + [("arrive", i, j) for i, j in sorted(under_way)]


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("method", _METHODS)
def test_any_order_of_events_gives_the_weights_of_the_equations(method, replicas):
    problem = _Problem(replicas)
    ledgers, simulation = _ledgers(problem, replicas, method), _Simulation(problem, replicas, _quantiser(method))
    _run(ledgers, problem, _schedule(replicas, 20, seed=replicas), simulation)
    for i, ledger in enumerate(ledgers):
        expected = simulation.weights(i)
        # a value at the border of two codes may fall to either side: those are few, and a code apart
        off = (ledger.weights - expected).abs() > 1e-6
        assert off.sum() <= (0 if method in ("none", "randomk") else 0.01 * _NUMEL), (method, int(off.sum()))
        assert (ledger.weights - problem.start).abs().max() > 0.1


@pytest.mark.parametrize("method", _METHODS)
def test_the_mean_is_that_of_all_changes_whatever_was_sent(method):
    problem = _Problem(3)
    ledgers, simulation = _ledgers(problem, 3, method), _Simulation(problem, 3, _quantiser(method))
    _run(ledgers, problem, _schedule(3, 20, seed=9), simulation)
    consensus = problem.start.double() + simulation.own.mean(0)
    assert (mean_in_order(ledger.weights for ledger in ledgers) - consensus).abs().max() < 1e-5
    assert max((ledger.weights - consensus).abs().max() for ledger in ledgers) > 1e-3, "they were equal before"


def test_with_equal_speed_and_no_delay_it_is_averaging_of_weights():
    problem = _Problem(2)
    ledgers, plain = _ledgers(problem, 2), problem.start.clone()
    for _ in range(20):
        plain = plain + sum(problem.change(i, plain) for i in range(2)) / 2
        _run(
            ledgers,
            problem,
            [("step", 0, 0), ("step", 1, 1), ("send", 0, 1), ("send", 1, 0)] + [("arrive", 0, 1), ("arrive", 1, 0)],
        )
        assert (ledgers[0].weights - plain).abs().max() < 1e-6 > (ledgers[1].weights - plain).abs().max()


def test_a_replica_that_was_away_drops_what_nobody_has_and_takes_the_rest_in_one_message():
    problem = _Problem(3)
    ledgers = _ledgers(problem, 3, max_staleness=5)
    _run(ledgers, problem, _schedule(3, 4, seed=1))
    assert not any(ledger.behind() for ledger in ledgers)
    others = [("step", 0, 0), ("step", 1, 1), ("send", 0, 1), ("arrive", 0, 1), ("send", 1, 0), ("arrive", 1, 0)]
    _run(ledgers, problem, [("step", 2, 2)] + 10 * others)
    assert ledgers[0].silent(2) and not ledgers[0].silent(1) and not ledgers[0].behind()
    for other in (0, 1):
        ledgers[2].hear(other, ledgers[other].steps, ledgers[other].peers[2].applied)
    assert ledgers[2].behind() > 5
    before = sum(ledger.weights.double() for ledger in ledgers)
    best = min(ledgers[2].peers.values(), key=lambda peer: 4 - peer.told)
    unpublished = best.pending.clone()
    steps = ledgers[2].drop()
    assert steps >= 1 and unpublished.abs().max() > 1e-3
    assert torch.allclose(sum(ledger.weights.double() for ledger in ledgers), before - unpublished, atol=1e-5)
    _run(ledgers, problem, [("send", 0, 2), ("send", 1, 2), ("arrive", 0, 2), ("arrive", 1, 2)])
    assert not ledgers[2].behind() and ledgers[2].dropped == steps


def test_a_message_waits_for_steps_to_tell_of_and_tells_of_all_of_them():
    problem = _Problem(2)
    ledgers = _ledgers(problem, 2, send_every=3)
    for step in range(3):
        assert not ledgers[0].may_send(1)
        ledgers[0].steps += 1
        if step != 1:  # two steps are recorded at once
            ledgers[0].record(ledgers[0].weights + 1.0)
    assert ledgers[0].may_send(1)
    messages = _run(ledgers, problem, [("send", 0, 1)])
    assert not ledgers[0].may_send(1)
    _run(ledgers, problem, [("arrive", 0, 1)], messages=messages)
    assert not ledgers[0].may_send(1) and ledgers[0].peers[1].heard == 3
    torch.testing.assert_close(ledgers[1].weights, problem.start + 1.0)


def test_of_two_that_were_cut_off_from_each_other_neither_is_behind():
    problem = _Problem(2)
    ledgers = _ledgers(problem, 2, max_staleness=5)
    messages = _run(ledgers, problem, 10 * [("step", 0, 0), ("step", 1, 1)])
    for i in range(2):
        ledgers[i].hear(1 - i, 10, 0)
        assert ledgers[i].silent(1 - i) and not ledgers[i].behind()
    assert not messages


def test_what_was_on_its_way_to_a_lost_replica_comes_back():
    problem = _Problem(3)
    ledgers = _ledgers(problem, 3, "int8")
    messages = _run(ledgers, problem, [("step", 0, 0)])
    before = ledgers[0].weights.clone()
    messages = _run(ledgers, problem, [("send", 0, 2)], messages=messages)
    assert not torch.equal(ledgers[0].weights, before)
    ledgers[0].lose(2, messages[0, 2])
    assert torch.allclose(ledgers[0].weights, before, atol=1e-6) and list(ledgers[0].peers) == [1]
    message = torch.empty(ledgers[0].form.message_bytes, dtype=torch.uint8)
    ledgers[0].send(1, message)
    assert ledgers[0].form.header(message)[2] == 2, "a change is shared by those that are left"


def test_state_is_restored_exactly():
    problem = _Problem(3)
    ledgers, again = _ledgers(problem, 3, "topk"), _ledgers(problem, 3, "topk")
    _run(ledgers, problem, _schedule(3, 10, seed=3))
    for ledger, other in zip(ledgers, again, strict=True):
        ledger.settle()
        other.load_state_dict(ledger.state_dict(), ledger.weights)
    rest = _schedule(3, 10, seed=4)
    _run(ledgers, problem, rest), _run(again, problem, rest)
    for ledger, other in zip(ledgers, again, strict=True):
        assert torch.equal(ledger.weights, other.weights) and ledger.peers[(ledger.own + 1) % 3].sent > 1
