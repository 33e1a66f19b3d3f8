"""The partition solver against brute force, and the predicted step against DeepSpeed's own schedule."""

import math
import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from deepspeed.runtime.pipe.schedule import TrainSchedule

from ds_recsys.balance import search
from ds_recsys.balance.costs import LayerCost, Link, PipelineCosts, StageCost, predict
from ds_recsys.balance.partition import parameters, partition, uniform
from ds_recsys.errors import UserError


def brute_force(costs, micro_batches):
    """The bounds that `partition` promises, None if no cut is feasible: every cut is predicted and compared."""
    feasible = []
    for inner in combinations(range(1, costs.num_layers), costs.num_stages - 1):
        bounds = [0, *inner, costs.num_layers]
        found = predict(costs, bounds, micro_batches)
        fits = all(
            s.memory_limit is None or m <= s.memory_limit for s, m in zip(costs.stages, found.memory, strict=True)
        )
        whole = not any(costs.layers[bound].joined for bound in inner)
        needed = frozenset().union(*(layer.needed for layer in costs.layers))
        held = [frozenset().union(*(layer.needed for layer in costs.layers[a:b])) for a, b in pairwise(bounds)]
        trained = all(any(x.trainable_bytes for x in costs.layers[a:b]) for a, b in pairwise(bounds))
        if fits and whole and trained and all(one == needed for one in held):
            feasible.append((found.step_seconds, found.cross_host_bytes, bounds))
    if not feasible:
        return None
    least = min(feasible)[0]
    return min((crossing, bounds) for step, crossing, bounds in feasible if step <= least * (1 + 1e-9))[1]


def random_costs(draw, most_layers=9, most_stages=5):
    """Small numbers from few values, so that ties are common, or any numbers; some layers free, frozen or both."""
    coarse = draw.random() < 0.5

    def seconds(most):
        return draw.choice([0, 1, 2, 3]) * most / 3 if coarse else draw.uniform(0, most)

    def nbytes(most):
        return draw.choice([0, 1, 2, 4]) * most // 4 if coarse else draw.randint(0, most)

    frozen = draw.choice([0, 0.2, 0.6])
    layers = []
    for _ in range(draw.randint(1, most_layers)):
        trainable = 0 if draw.random() < frozen else nbytes(4000) or 1000
        layers.append(
            LayerCost(seconds(0.01), seconds(0.03), 4000, trainable, 3 * trainable, nbytes(2000), nbytes(1000))
        )
    num_stages = draw.randint(1, most_stages)
    slow, limited, updated = draw.random() < 0.6, draw.random() < 0.5, draw.random() < 0.7
    stages = [
        StageCost(
            slowdown=draw.choice([1.0, 1.5, 2.0]) if slow else 1.0,
            memory_limit=draw.choice([None, draw.randint(8_000, 80_000)]) if limited else None,
            overhead=seconds(0.001),
            reduction=draw.choice([0, 1e-6, 3e-6]) if updated else 0.0,
            optimizer=draw.choice([1e-7, 1e-6]) if updated else 0.0,
        )
        for _ in range(num_stages)
    ]
    links = [
        Link(draw.choice([0, 1e-7, 1e-5]), draw.choice([0, 1e-4]), draw.random() < 0.4) for _ in range(num_stages - 1)
    ]
    links, micro_batches = draw.choice([links, links, ()]), draw.choice([1, 2, 4, 16])
    if draw.random() < 0.3:  # layers that belong together, or kinds of which every stage must hold one
        layers = [
            replace(
                layer,
                joined=n > 0 and draw.random() < 0.2,
                needed=frozenset(kind for kind in "ab" if draw.random() < 0.7),
            )
            for n, layer in enumerate(layers)
        ]
    return PipelineCosts(layers, stages, links), micro_batches


def check(seeds, **sizes):
    cuts = infeasible = 0
    for seed in seeds:
        costs, micro_batches = random_costs(random.Random(seed), **sizes)
        expected = brute_force(costs, micro_batches)
        if expected is None:
            infeasible += 1
            with pytest.raises(UserError, match="fits in memory|have trainable parameters|with what it needs"):
                partition(costs, micro_batches)
        else:
            cuts += 1
            assert partition(costs, micro_batches) == expected, f"seed {seed}"
    return cuts, infeasible


def test_equals_brute_force():
    cuts, infeasible = check(range(2000))
    assert cuts > 1000 and infeasible > 300


def test_equals_brute_force_when_the_cuts_are_divided(monkeypatch):
    monkeypatch.setattr(search, "_WIDTH", 1)
    monkeypatch.setattr(search, "_FEW", 0)
    monkeypatch.setattr(search, "_MANY", 0)
    check(range(2000, 2300))
    monkeypatch.setattr(search, "_WIDTH", 2)
    monkeypatch.setattr(search, "_MANY", 40)
    check(range(2300, 2420), most_layers=13)


def tied_costs(draw):
    """Whole numbers, many of them 0, and links that cost only bytes across hosts: what is left to choose is those bytes."""
    num_layers, num_stages = draw.randint(5, 11), draw.randint(3, 5)
    layers = [
        LayerCost(draw.choice([0, 0, 1, 2]), 0, trainable_bytes=draw.randint(1, 2), boundary_bytes=draw.randint(0, 3))
        for _ in range(num_layers)
    ]
    stages = [StageCost(draw.choice([1, 1, 2]), reduction=draw.choice([0, 1])) for _ in range(num_stages)]
    links = [Link(crosses_hosts=draw.random() < 0.7) for _ in range(num_stages - 1)]
    return PipelineCosts(layers, stages, links), draw.choice([1, 2, 3])


@pytest.mark.parametrize("width, many", [(16, 800), (2, 0), (1, 20)])
def test_ties_equal_brute_force(monkeypatch, width, many):
    monkeypatch.setattr(search, "_WIDTH", width)
    monkeypatch.setattr(search, "_MANY", many)
    for seed in range(300):
        costs, micro_batches = tied_costs(random.Random(seed))
        assert partition(costs, micro_batches) == brute_force(costs, micro_batches), f"seed {seed}"


def large(seed, num_layers=60, num_stages=12):
    draw = random.Random(seed)
    layers = [
        LayerCost(draw.uniform(0.5, 1.5), 2.0, 0, draw.randint(1, 9), 0, 0, draw.randint(1, 3))
        for _ in range(num_layers)
    ]
    stages = [StageCost(draw.uniform(1, 2.5), None, 0.01, 0.1 * draw.randint(1, 5), 0.1) for _ in range(num_stages)]
    return PipelineCosts(layers, stages, [Link(0.1, 0.1, s % 4 == 3) for s in range(num_stages - 1)])


@pytest.mark.parametrize("micro_batches", [1, 4, 32])
def test_dividing_the_cuts_changes_nothing(monkeypatch, micro_batches):
    costs = large(micro_batches)
    expected = partition(costs, micro_batches)
    for width, few, many in [(4, 0, 0), (64, math.inf, math.inf), (8, 100, 2000)]:
        monkeypatch.setattr(search, "_WIDTH", width)
        monkeypatch.setattr(search, "_FEW", few)
        monkeypatch.setattr(search, "_MANY", many)
        assert partition(costs, micro_batches) == expected


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_the_unit_of_time_does_not_matter(unit):
    costs = large(5)
    scaled = PipelineCosts(
        [replace(x, forward=x.forward * unit, backward=x.backward * unit) for x in costs.layers],
        [
            replace(s, overhead=s.overhead * unit, reduction=s.reduction * unit, optimizer=s.optimizer * unit)
            for s in costs.stages
        ],
        [replace(x, seconds_per_byte=x.seconds_per_byte * unit, latency=x.latency * unit) for x in costs.links],
    )
    assert partition(scaled, 8) == partition(costs, 8)


def test_prediction_by_hand():
    layers = [
        LayerCost(1.0, 2.0, 100, 10, 30, 7, 50),
        LayerCost(2.0, 3.0, 200, 0, 0, 8, 60),
        LayerCost(0.5, 0.5, 300, 20, 60, 9, 70),
    ]
    stages = [StageCost(2.0, None, 0.25, 0.5, 0.25), StageCost(1.0, None, 0.5, 0.5, 0.25)]
    found = predict(PipelineCosts(layers, stages, [Link(0.01, 0.1, True)]), [0, 1, 3], micro_batches=4)
    trip = 2 * (0.1 + 0.5)  # 50 bytes one way, 50 back
    first, second = 2 * 3.0 + 0.25, 6.0 + 0.5
    assert found.stage_seconds == pytest.approx((first + trip, second + trip))
    update = [10 * (0.5 + 2 * 0.25), 20 * (0.5 + 0.25)]
    step = 3 * (second + trip) + (first + trip + second) + max(update)
    assert found.step_seconds == pytest.approx(step)
    assert found.transfer_seconds == pytest.approx((4 * trip, 4 * trip))
    assert found.cross_host_bytes == 4 * 2 * 50
    assert found.memory == (100 + 10 + 30 + 2 * 7, 500 + 20 + 60 + 1 * (8 + 9))
    busy = (4 * (first + second + 2 * trip) + sum(update)) / 2
    assert found.idle_share == pytest.approx(1 - busy / step)


def test_fewer_micro_batches_than_stages_bound_what_is_in_flight():
    costs = PipelineCosts([LayerCost(1, 1, activation_bytes=1, trainable_bytes=1)] * 4, [StageCost()] * 4)
    assert [m - 1 for m in predict(costs, [0, 1, 2, 3, 4], 8).memory] == [4, 3, 2, 1]
    assert [m - 1 for m in predict(costs, [0, 1, 2, 3, 4], 2).memory] == [2, 2, 2, 1]
    assert [TrainSchedule(8, 4, s).num_pipe_buffers() for s in range(3)] == [4, 3, 2]


def run_schedule(forward, backward, transfers, micro_batches):
    """Seconds that DeepSpeed's instructions take when a send and its receive start together and keep both ranks busy."""
    num_stages = len(forward)
    sends = {"SendActivation": (1, "RecvActivation"), "SendGrad": (-1, "RecvGrad")}
    pairs = {**sends, **{name: (-way, send) for send, (way, name) in sends.items()}}
    work = {"ForwardPass": forward, "BackwardPass": backward}
    left = []
    for s in range(num_stages):
        names = [type(x).__name__ for x in sum(TrainSchedule(micro_batches, num_stages, s).steps(), [])]
        left.append([name for name in names if name in work or name in pairs])
    clock = [0.0] * num_stages
    while any(left):
        for s in range(num_stages):
            while left[s] and left[s][0] in work:
                clock[s] += work[left[s].pop(0)][s]
            way, answer = pairs[left[s][0]] if left[s] else (0, None)
            if way and left[s + way][:1] == [answer]:
                done = max(clock[s], clock[s + way]) + transfers[min(s, s + way)]
                clock[s] = clock[s + way] = done
                left[s].pop(0), left[s + way].pop(0)
    return max(clock)


@pytest.mark.parametrize("num_stages", [1, 2, 4, 7])
@pytest.mark.parametrize("micro_batches", [1, 4, 16])
def test_prediction_is_a_tight_upper_bound_of_the_schedule(num_stages, micro_batches):
    draw = random.Random(0)

    def both(forward, transfers):
        layers = [
            LayerCost(f, 2 * f, boundary_bytes=nbytes) for f, nbytes in zip(forward, [*transfers, 0], strict=True)
        ]
        costs = PipelineCosts(layers, [StageCost()] * num_stages, [Link(1.0)] * (num_stages - 1))
        backward = [2 * f for f in forward]
        predicted = predict(costs, list(range(num_stages + 1)), micro_batches).step_seconds
        return predicted, run_schedule(forward, backward, transfers, micro_batches)

    predicted, ran = both([1] * num_stages, [0] * (num_stages - 1))
    assert predicted == ran  # equal stages, free transfers: exact
    for _ in range(20):
        predicted, ran = both(
            [draw.randint(5, 20) for _ in range(num_stages)], [draw.randint(0, 5) for _ in range(num_stages - 1)]
        )
        assert ran <= predicted <= 1.3 * ran
        assert micro_batches > 1 or predicted == ran


def blocks(count, **kwargs):
    return [LayerCost(0.01, 0.02, 100, 100, 300, 50, 10, **kwargs)] * count


def test_a_heavy_head_gets_a_stage_almost_alone():
    costs = PipelineCosts([*blocks(12), LayerCost(0.04, 0.08, 100, 100, 300)], [StageCost()] * 4)
    bounds = partition(costs, 16)
    assert bounds == [0, 4, 8, 12, 13]
    balanced = parameters([layer.trainable_bytes for layer in costs.layers], 4)
    assert predict(costs, bounds, 16).step_seconds < 0.9 * predict(costs, balanced, 16).step_seconds


def test_a_slow_device_gets_fewer_layers():
    costs = PipelineCosts(blocks(14), [StageCost(), StageCost(slowdown=2.0), StageCost(), StageCost()])
    assert partition(costs, 16) == [0, 4, 6, 10, 14]


def test_of_equally_good_cuts_the_fewest_bytes_across_hosts_then_the_smallest():
    layers = [replace(layer, boundary_bytes=nbytes) for layer, nbytes in zip(blocks(5), [9, 4, 4, 2, 0], strict=True)]
    crossing = PipelineCosts(layers, [StageCost()] * 3, [Link(crosses_hosts=True), Link()])
    assert partition(crossing, 4) == [0, 2, 3, 5]  # 2, 2, 1 in any order: not after layer 0
    assert partition(PipelineCosts(layers, [StageCost()] * 3), 4) == [0, 1, 3, 5]


def test_frozen_layers_count_for_time_and_not_for_the_update():
    layers = [replace(layer, trainable_bytes=0, optimizer_bytes=0) for layer in blocks(6)] + blocks(2)
    assert partition(PipelineCosts(layers, [StageCost()] * 2), 8) == [0, 7, 8]  # the other cuts leave a stage untrained
    costs = PipelineCosts(layers[:3] + blocks(5), [StageCost(optimizer=0.0)] * 2)
    assert partition(costs, 8) == [0, 4, 8]
    costs = PipelineCosts(layers[:3] + blocks(5), [StageCost(optimizer=1.0)] * 2)
    assert partition(costs, 8) == [0, 5, 8]


def test_the_first_stage_has_more_micro_batches_to_keep():
    costs = PipelineCosts(blocks(8), [StageCost(memory_limit=2400)] * 2)  # 500 and in-flight x 50 per layer
    assert partition(costs, 8) == [0, 4, 8]
    costs = PipelineCosts(blocks(8), [StageCost(memory_limit=2350), StageCost(memory_limit=2800)])
    assert partition(costs, 8) == [0, 3, 8]


def test_says_which_stage_is_short_of_memory_and_by_how_much():
    gib = 2**30
    layers = [LayerCost(1, 1, gib, gib), LayerCost(1, 1, 2 * gib, gib), LayerCost(1, 1, 3 * gib, gib)]
    costs = PipelineCosts(layers, [StageCost(memory_limit=8 * gib), StageCost(memory_limit=int(2.5 * gib))])
    with pytest.raises(UserError, match=r"bounds \[0, 2, 3\]\) stage 1 needs 4 GiB, 1.5 GiB more .* limit of 2.5 GiB"):
        partition(costs, 4)


def test_least_memory_short_on_one_stage_not_in_all():
    gib = 2**30
    layers = [
        LayerCost(1, 1, weight_bytes=10 * gib, trainable_bytes=1),
        LayerCost(1, 1, activation_bytes=gib, trainable_bytes=1),
        LayerCost(1, 1, weight_bytes=10 * gib, trainable_bytes=1),
    ]
    costs = PipelineCosts(layers, [StageCost(memory_limit=int(limit * gib)) for limit in (10.9, 9.5)])
    with pytest.raises(
        UserError, match=r"\[0, 2, 3\]\) stage 0 needs 12 GiB, 1.1 GiB more"
    ):  # 1.1 and 0.5, not 0 and 1.5
        partition(costs, 2)


def test_says_that_too_few_layers_are_trained():
    frozen = replace(blocks(1)[0], trainable_bytes=0)
    with pytest.raises(UserError, match="2 of 6 layers have trainable parameters, too few for 3 stages"):
        partition(PipelineCosts([frozen] * 4 + blocks(2), [StageCost()] * 3), 4)
    with pytest.raises(UserError, match="2 of 2 layers .* 3 stages"):
        partition(PipelineCosts(blocks(2), [StageCost()] * 3), 4)


def test_layers_that_cost_nothing():
    free = LayerCost(0, 0, trainable_bytes=1)
    assert partition(PipelineCosts([free] * 5, [StageCost()] * 3), 4) == [0, 1, 2, 5]
    assert partition(PipelineCosts([free], [StageCost()]), 1) == [0, 1]
    assert predict(PipelineCosts([free], [StageCost()]), [0, 1], 1).idle_share == 0


def test_costs_are_checked():
    with pytest.raises(ValueError, match="backward of a LayerCost is nan"):
        LayerCost(1.0, float("nan"))
    with pytest.raises(ValueError, match="slowdown of a StageCost is inf"):
        StageCost(slowdown=math.inf)
    with pytest.raises(ValueError, match="overhead of a StageCost is -1"):
        StageCost(overhead=-1)
    with pytest.raises(ValueError, match="3 stages have 2 links, not 1"):
        PipelineCosts(blocks(3), [StageCost()] * 3, [Link()])
    with pytest.raises(ValueError, match="a pipeline of 0 layers and 1 stages"):
        PipelineCosts([], [StageCost()])
    costs = PipelineCosts(blocks(3), [StageCost()] * 2)
    for bounds in ([0, 3], [0, 0, 3], [0, 2, 2], [1, 2, 3], [0, 2, 1, 3]):
        with pytest.raises(ValueError, match="do not cut 3 layers into 2 stages"):
            predict(costs, bounds, 1)
    for call in (lambda: predict(costs, [0, 1, 3], 0), lambda: partition(costs, 0)):
        with pytest.raises(ValueError, match="at least one micro-batch, not 0"):
            call()


def test_rules_of_deepspeed():
    assert uniform(10, 4) == [0, 3, 6, 8, 10]
    assert parameters([1, 1, 1, 1, 4], 2) == [0, 4, 5]
    assert all(type(bound) is int for bound in uniform(10, 4) + parameters([1, 1, 1, 1, 4], 2))
