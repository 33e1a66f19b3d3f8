"""Layer costs told apart from slow devices, and when a move is decided, verified and taken back."""

import random
from statistics import fmean, median

import pytest

from ds_recsys.balance.costs import LayerCost, PipelineCosts, StageCost, predict
from ds_recsys.balance.decide import Decider, Rule, best_cut
from ds_recsys.balance.estimate import LayerTimes, estimate
from ds_recsys.balance.partition import partition

_KINDS = ["table", *["block"] * 8, "head"]
_WORK = [0.1, *[1.0] * 8, 4.0]
_BOUNDS = [0, 3, 6, 8, 10]


def _measured(slowdowns, bounds=_BOUNDS, noise=0.0, generator=None):
    stage_of = [s for s in range(4) for _ in range(bounds[s], bounds[s + 1])]
    times = {}
    for layer, stage in enumerate(stage_of):
        total = _WORK[layer] * slowdowns[stage] * (1 + noise * (generator.uniform(-1, 1) if generator else 0))
        times[layer] = LayerTimes(total / 3, 2 * total / 3)
    stages = [sum(times[n].total for n in range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    return times, stages


@pytest.mark.parametrize("slowdowns", [[1, 1, 1, 1], [1, 2, 1, 1], [2, 1, 4, 1.5]])
def test_slow_devices_and_costly_layers_are_told_apart(slowdowns):
    times, stages = _measured(slowdowns)
    found = estimate(times, _KINDS, _BOUNDS, stages)
    assert found.slowdowns == pytest.approx(slowdowns)
    assert [layer.total for layer in found.layers] == pytest.approx(_WORK)
    assert found.layers[9].backward == pytest.approx(2 * found.layers[9].forward)


def test_a_device_that_slows_after_the_layers_were_sampled():
    times, stages = _measured([1, 1, 1, 1])
    found = estimate(times, _KINDS, _BOUNDS, [stages[0], 2 * stages[1], stages[2], stages[3]])
    assert found.slowdowns == pytest.approx([1, 2, 1, 1])
    assert [layer.total for layer in found.layers] == pytest.approx(_WORK)


def test_a_stage_without_a_kind_in_common_counts_as_the_reference():
    times, stages = _measured([1, 2, 1, 1], bounds := [0, 4, 6, 9, 10])
    found = estimate(times, _KINDS, bounds, stages)
    assert found.slowdowns == pytest.approx([1, 2, 1, 1])
    assert found.layers[9].total == pytest.approx(4.0)


def test_layers_of_almost_no_time_do_not_compare_devices():
    """Four little ones, and two of them beside two large ones of another kind: what the little ones take is noise."""
    kinds, bounds = ["small"] * 6 + ["large"] * 2, [0, 4, 8]
    seconds = [2e-4] * 4 + [1e-4] * 2 + [3e-2] * 2  # as if the first device had half the speed
    times = {n: LayerTimes(one / 2, one / 2) for n, one in enumerate(seconds)}
    found = estimate(times, kinds, bounds, [8e-4, 6.02e-2])
    assert found.slowdowns == pytest.approx([1, 1])
    larger = [one if n < 6 else 2e-4 for n, one in enumerate(seconds)]
    times = {n: LayerTimes(one / 2, one / 2) for n, one in enumerate(larger)}
    assert estimate(times, kinds, bounds, [8e-4, 6e-4]).slowdowns == pytest.approx([2, 1])


def test_a_stage_of_almost_no_work_is_not_taken_for_a_slow_device():
    """An embedding alone, at half again what it takes as a layer: that is what each micro-batch costs beside its layers."""
    kinds, bounds = ["embedding", *["block"] * 9], [0, 1, 4, 7, 10]
    times = {n: LayerTimes(one / 2, one / 2) for n, one in enumerate([4e-3] + [3e-2] * 9)}
    found = estimate(times, kinds, bounds, [6e-3, 9e-2, 18e-2, 9e-2])
    assert found.slowdowns == pytest.approx([1, 1, 2, 1])
    assert estimate(times, kinds, [0, 2, 4, 7, 10], [6.8e-2, 6e-2, 9e-2, 9e-2]).slowdowns == pytest.approx([2, 1, 1, 1])


def _costs(slowdowns, work=_WORK):
    layers = [LayerCost(w / 3, 2 * w / 3, trainable_bytes=1) for w in work]
    return PipelineCosts(layers, [StageCost(slowdown=s) for s in slowdowns])


def _run(decider, slowdowns_at, steps, bounds, noise=0.0, pause=1.0, jump=lambda step, seconds: seconds):
    """Steps of a simulated pipeline that moves as it is told; returns the decisions."""
    generator, decisions = random.Random(0), []
    for step in range(steps):
        slowdowns = [s * (1 + noise * generator.uniform(-1, 1)) for s in slowdowns_at(step)]
        costs = _costs(slowdowns)
        seconds = jump(step, predict(costs, bounds, 16).step_seconds)
        if decider.verifying:
            decision = decider.verify(step, seconds)
        else:
            decision = decider.decide(step, costs, bounds, 16, seconds, steps - step, lambda _: pause)
        if decision:
            decisions.append(decision)
            bounds = list(decision.bounds)
    return decisions, bounds


def test_a_straggler_is_acted_on_after_as_many_measurements_as_patience_says():
    best = partition(_costs([1, 1, 1, 1]), 16)
    decisions, bounds = _run(Decider(), lambda step: [1, 2 if step >= 10 else 1, 1, 1], 60, best)
    assert [d.step for d in decisions] == [12]
    assert bounds == partition(_costs([1, 2, 1, 1]), 16)
    assert decisions[0].predicted_gain == pytest.approx(
        predict(_costs([1, 2, 1, 1]), best, 16).step_seconds - predict(_costs([1, 2, 1, 1]), bounds, 16).step_seconds
    )


def test_where_nothing_is_to_be_had_it_looks_now_and_then_and_at_once_when_a_step_gets_slower(monkeypatch):
    looks, best = [], partition(_costs([1, 1, 1, 1]), 16)
    monkeypatch.setattr("ds_recsys.balance.decide.best_cut", lambda *given: looks.append(given) or best_cut(*given))
    slow = lambda step: [1, 1.04 if step >= 20 else 1, 1.5 if step >= 43 else 1, 1]  # noqa: E731
    decider, at = Decider(Rule(rest=10, evidence=100)), []
    for step in range(50):
        costs, seen = _costs(slow(step)), len(looks)
        decider.decide(step, costs, best, 16, predict(costs, best, 16).step_seconds, 1000, lambda _: 0.0)
        at += [step] * (len(looks) - seen)
    assert at == [0, 10, 20, 30, 40, *range(43, 50)]  # and at every step while there is a promise


def test_jitter_moves_nothing():
    even = [0, 4, 7, 9, 10]  # as good as any, and one stage at the pace of the slowest instead of three
    assert _run(Decider(), lambda _: [1, 1, 1, 1], 500, even, noise=0.1) == ([], even)


def _smoothed(rule, speeds_at, steps=500, micro_batches=8):
    """Moves in a pipeline of a table, 27 blocks and a head, whose stages' times are medians over five steps."""
    generator, decider, recent, moves = random.Random(1), Decider(rule), [], []
    work = [0.1, *[1.0] * 27, 1.0]
    bounds = best = tuple(partition(_costs([1, 1, 1, 1], work), micro_batches))
    for step in range(steps):
        slow = [fmean(1 / speed for speed in draws) for draws in zip(*speeds_at(step, generator), strict=True)]
        recent = [*recent, slow][-5:]
        costs = _costs([median(stage) for stage in zip(*recent, strict=True)], work)
        seconds = predict(_costs(slow, work), bounds, micro_batches).step_seconds
        if decider.verifying:
            decision = decider.verify(step, seconds)
        else:
            decision = decider.decide(step, costs, bounds, micro_batches, seconds, steps - step, lambda _: 0.1)
        if decision:
            moves.append((step, decision.bounds == best))
            bounds, recent = decision.bounds, []
    return moves


def _jittered(step, generator):
    """Each device's speed is another one at every step, by up to a fifth."""
    return [[generator.uniform(0.8, 1.2) for _ in range(4)]]


def test_jitter_of_smoothed_times_moves_nothing_where_patience_alone_lets_it():
    """The windows of successive measurements overlap, so that one chance gain promises itself several times in a row."""
    assert len(_smoothed(Rule(evidence=0.0, rest=1), _jittered, steps=300)) > 2
    assert _smoothed(Rule(rest=1), _jittered, steps=300) == _smoothed(Rule(), _jittered, steps=300) == []


def test_a_small_gain_is_taken_when_it_lasts():
    slower = lambda step, _: [[1, 0.75 if step >= 10 else 1, 1, 1]]  # noqa: E731
    moves = _smoothed(Rule(), slower, steps=100)
    assert len(moves) == 1 and 16 < moves[0][0] < 40


def test_a_gain_that_the_steps_left_do_not_win_back_is_not_taken():
    best = partition(_costs([1, 1, 1, 1]), 16)
    decisions, _ = _run(Decider(), lambda _: [1, 2, 1, 1], 20, best, pause=1e4)
    assert decisions == []


def test_a_move_that_does_not_keep_its_promise_is_taken_back():
    best = partition(_costs([1, 1, 1, 1]), 16)
    slow = predict(_costs([1, 2, 1, 1]), best, 16).step_seconds
    decider = Decider(Rule(cooldown=10))
    decisions, bounds = _run(decider, lambda _: [1, 2, 1, 1], 15, best, jump=lambda step, seconds: slow)
    assert [d.back for d in decisions] == [False, True] and bounds == best
    assert decisions[1].step == decisions[0].step + 5 and decider.realised == pytest.approx(0)


def test_nothing_moves_during_the_cooldown():
    best = partition(_costs([1, 1, 1, 1]), 16)
    rule = Rule(cooldown=30, verify=2)
    decisions, _ = _run(Decider(rule), lambda step: [2 if step >= 8 else 1, 2 if step < 8 else 1, 1, 1], 80, best)
    assert len(decisions) == 2 and decisions[1].step - decisions[0].step >= 30


def test_moves_that_are_taken_back_become_rarer():
    best = partition(_costs([1, 1, 1, 1]), 16)
    slow = predict(_costs([1, 2, 1, 1]), best, 16).step_seconds
    rule = Rule(cooldown=5, patience=1, evidence=0, verify=1)
    decisions, _ = _run(Decider(rule), lambda _: [1, 2, 1, 1], 80, best, jump=lambda step, seconds: slow)
    assert [d.step for d in decisions if not d.back] == [0, 11, 32, 73]


def test_a_cut_that_cannot_gain_enough_is_not_searched_for(monkeypatch):
    """No cut goes below what all devices together would take if layers could be cut anywhere."""
    costs, good = _costs([1, 1, 1, 1], [1.0] * 12), (0, 3, 6, 9, 12)
    monkeypatch.setattr("ds_recsys.balance.decide.partition", lambda *_: pytest.fail("searched"))
    assert best_cut(costs, good, 16, 0.05) == (good, 0.0)
    monkeypatch.undo()
    assert best_cut(costs, (0, 1, 6, 9, 12), 16, 0.05)[0] == good
    assert best_cut(costs, (0, 1, 6, 9, 12), 16, 0.6) == ((0, 1, 6, 9, 12), 0.0)


def test_a_failed_move_is_not_tried_again_at_once():
    best = partition(_costs([1, 1, 1, 1]), 16)
    decider, steps = Decider(Rule(cooldown=15)), []
    for step in range(40):
        costs = _costs([1, 2, 1, 1])
        seconds = predict(costs, best, 16).step_seconds
        if decider.decide(step, costs, best, 16, seconds, 100, lambda _: 1.0):
            steps.append(step)
            decider.failed(step)
    assert steps == [2, 19, 36]
