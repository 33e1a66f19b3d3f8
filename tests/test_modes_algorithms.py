"""Each mode against the algorithm of its paper in one process: 20 steps, fp32, weights within 1e-6."""

import copy

import pytest
import torch
from distributed import run_on_grid
from modes import ADAM, SGD, Reference, clipped, config, engine, farthest, mean, same, train, weights

from ds_recsys.comm.modes import fragments

REPLICAS, STEPS = 3, 20


def _trained(mode, optimizer, options, flush=True, clip=0.0):
    made = engine(mode, config(optimizer, gradient_clipping=clip), **options)
    train(made, 0, STEPS)
    if flush:
        made.data_parallel.flush()
    schedule = made.data_parallel
    names = [set(f.parameters.names) for f in schedule._fragments] if mode == "diloco" else None
    return weights(made), names


def _check(reference, mode, optimizer, options, flush=True, common=True):
    found = run_on_grid(_trained, REPLICAS, mode=mode, optimizer=optimizer, options=options, flush=flush)
    for replica, (trained, _) in enumerate(found):
        expected = reference.weights(replica)
        assert farthest(trained, expected) < 1e-6
        assert farthest(trained, Reference(1).weights()) > 1e-2, "it did not train"
        assert not common or same(trained, found[0][0])


# ---- delayed


def _delayed(optimizer, correction):
    """w(t+1) = opt(w(t), g(t-1)), g(t-1) the mean of gradients at w(t-1); DC-ASGD's equation 5."""
    reference, before, late = Reference(1, optimizer), None, None
    for step in [*range(STEPS), None]:
        now = reference.weights()
        own = step is not None and mean([reference.gradients(replica, step, model=0) for replica in range(REPLICAS)])
        if late is not None:
            reference.step(0, {n: g + correction * g * g * (now[n] - before[n]) for n, g in late.items()})
        before, late = now, own
    reference.models *= REPLICAS
    return reference


@pytest.mark.parametrize("correction", [0.0, 30.0])
def test_delayed(correction):
    expected = _delayed(SGD, correction)
    assert not correction or farthest(expected.weights(), _delayed(SGD, 0.0).weights()) > 1e-4
    _check(expected, "delayed", SGD, {"delay_correction": correction})


def _looking_ahead(optimizer, clip=None):
    """The same, and g(t) of each replica at opt(w(t), its own g(t-1)), a step that is taken back."""
    reference, average, own = Reference(1, optimizer), None, None
    for step in [*range(STEPS), None]:
        fresh = []
        for replica in range(REPLICAS):
            ahead = copy.deepcopy(reference)
            if own:
                ahead.step(0, clipped(own[replica], clip))
            fresh.append(None if step is None else ahead.gradients(replica, step, model=0))
        if average is not None:
            reference.step(0, clipped(average, clip))
        average, own = step is not None and mean(fresh), fresh
    reference.models *= REPLICAS
    return reference


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "AdamW"])
def test_delayed_that_looks_ahead(optimizer):
    expected = _looking_ahead(optimizer)
    assert farthest(expected.weights(), _delayed(optimizer, 0.0).weights()) > 1e-3
    _check(expected, "delayed", optimizer, {"look_ahead": True})


def test_looking_ahead_clips_the_own_gradient():
    expected, free = _looking_ahead(SGD, clip=0.5), _looking_ahead(SGD)
    found = run_on_grid(_trained, REPLICAS, mode="delayed", optimizer=SGD, options={"look_ahead": True}, clip=0.5)
    for trained, _ in found:
        assert farthest(trained, expected.weights()) < 1e-5 < farthest(trained, free.weights())


# ---- local SGD


@pytest.mark.parametrize("dense_until", [0, 6])
def test_local_sgd(dense_until):
    reference = Reference(REPLICAS)
    for step in range(STEPS):
        if step < dense_until:
            reference.dense_step(step)
            continue
        reference.local_step(step)
        if (step + 1 - dense_until) % 4 == 0:
            reference.set(reference.mean())
    options = {"every": 4, "dense_until": dense_until}
    apart = dense_until == 6  # 14 local steps: two after the last average
    _check(reference, "local_sgd", ADAM, options, flush=False, common=not apart)
    if apart:
        assert farthest(reference.weights(0), reference.weights(1)) > 1e-3
        reference.set(reference.mean())
        _check(reference, "local_sgd", ADAM, options)


def test_a_replica_clips_its_own_gradient():
    reference, free = Reference(REPLICAS, SGD), Reference(REPLICAS, SGD)
    for step in range(STEPS):
        reference.local_step(step, clip=0.5)
        free.local_step(step)
    found = run_on_grid(_trained, REPLICAS, mode="local_sgd", optimizer=SGD, options={}, flush=False, clip=0.5)
    for replica, (trained, _) in enumerate(found):
        assert farthest(trained, reference.weights(replica)) < 1e-5 < farthest(trained, free.weights(replica))


def _synchronous(optimizer):
    made = engine(None, config(optimizer))
    train(made, 0, STEPS)
    return weights(made)


def test_local_sgd_of_one_step_is_synchronous_sgd():
    optimizer = {"type": "SGD", "params": {"lr": 0.3}}
    synchronous = run_on_grid(_synchronous, REPLICAS, optimizer=optimizer)[0]
    for local, _ in run_on_grid(_trained, REPLICAS, mode="local_sgd", optimizer=optimizer, options={"every": 1}):
        assert farthest(local, synchronous) < 1e-6


# ---- DiLoCo


def _diloco(every, lr, momentum):
    """Algorithm 1 of the paper, with torch's SGD as the outer optimizer."""
    reference = Reference(REPLICAS)
    outer = {name: torch.nn.Parameter(value) for name, value in reference.weights().items()}
    optimizer = torch.optim.SGD(outer.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(STEPS):
        reference.local_step(step)
        if (step + 1) % every == 0 or step == STEPS - 1:
            average = reference.mean()
            for name, parameter in outer.items():
                parameter.grad = parameter.detach() - average[name]
            optimizer.step()
            reference.set(outer)
    return reference


@pytest.mark.parametrize("every", [4, 6])  # 20 = 3 x 6 + 2: the last round ends early
def test_diloco(every):
    _check(_diloco(every, 0.7, 0.9), "diloco", ADAM, {"every": every})
    assert farthest(_diloco(every, 0.7, 0.9).weights(), _diloco(every, 0.7, 0.0).weights()) > 1e-3


def test_diloco_with_a_plain_outer_step_of_one_averages_parameters():
    reference = Reference(REPLICAS)
    for step in range(STEPS):
        reference.local_step(step)
        reference.set(reference.mean())
    _check(reference, "diloco", ADAM, {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0})


def _streaming(parts, every, tau, alpha, flush=False):
    """Algorithm 2 of Streaming DiLoCo: fragment p leaves where step - offset(p) is a multiple of H, arrives tau later."""
    reference = Reference(REPLICAS)
    outer = {name: torch.nn.Parameter(value) for name, value in reference.weights().items()}
    optimizers = [
        torch.optim.SGD([outer[name] for name in sorted(names)], lr=0.7, momentum=0.9, nesterov=True) for names in parts
    ]
    under_way = {}

    def arrive(number, changes):
        for name, change in changes.items():
            outer[name].grad = change
        optimizers[number].step()
        for replica in range(REPLICAS):
            own = reference.weights(replica)
            reference.set({n: alpha * own[n] + (1 - alpha) * outer[n].detach() for n in changes}, replica)

    for step in range(1, STEPS + 1):
        reference.local_step(step - 1)
        for number, names in enumerate(parts):
            offset = number * every // len(parts)
            if (step - offset) % every == 0:
                average = reference.mean()
                under_way[number, step + tau] = {name: outer[name].detach() - average[name] for name in names}
            if (number, step) in under_way:
                arrive(number, under_way.pop((number, step)))
    for (number, _), changes in under_way.items() if flush else ():
        arrive(number, changes)
    return reference


@pytest.mark.parametrize(
    "count, every, tau, alpha", [(1, 5, 2, 0.0), (3, 6, 0, 0.0), (3, 6, 4, 0.5)], ids=["overlap", "parts", "all"]
)
def test_streaming_diloco(count, every, tau, alpha):
    options = {"every": every, "fragments": count, "overlap_steps": tau, "mixing": alpha}
    parts = run_on_grid(_trained, REPLICAS, mode="diloco", optimizer=ADAM, options=options)[0][1]
    assert len(parts) == count and sum(map(len, parts)) == len(set().union(*parts)) == len(Reference(1).weights())
    _check(_streaming(parts, every, tau, alpha), "diloco", ADAM, options, flush=False, common=False)


def test_fragments_are_balanced_and_copies_stay_together():
    stages = [{"table": 1000, **{f"a{i}": 100 for i in range(8)}}, {**{f"b{i}": 70 for i in range(9)}, "table": 1000}]
    placed = fragments.assign(stages, 3)
    for stage in stages:
        load = [sum(size for name, size in stage.items() if placed[name] == number) for number in range(3)]
        assert load[placed["table"]] == 1000, "what is heavy alone travels alone"
        others = [value for number, value in enumerate(load) if number != placed["table"]]
        assert max(others) - min(others) <= 100
    leaving = [[p for p in range(3) if fragments.leaves(p, step, 6, 3)] for step in range(1, 13)]
    assert leaving == [[], [1], [], [2], [], [0]] * 2


def test_what_is_under_way_at_the_end_arrives_once():
    options = {"every": 5, "overlap_steps": 2}
    parts = [Reference(1).weights().keys()]
    _check(_streaming(parts, 5, 2, 0.0, flush=True), "diloco", ADAM, options)
    assert farthest(_streaming(parts, 5, 2, 0.0).weights(), _streaming(parts, 5, 2, 0.0, flush=True).weights()) > 1e-3
