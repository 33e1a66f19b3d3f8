"""What `"parallel": "auto"` predicts and chooses, from facts that are written down here."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from ds_recsys import UserError
from ds_recsys.balance.costs import predict as predict_pipeline
from ds_recsys.planner.facts import Facts, LayerFacts, Line, SumFacts
from ds_recsys.planner.links import _beside_compute, pairs_of
from ds_recsys.planner.owners import owner_shares, replica_shares
from ds_recsys.planner.plan import Plan, grids, plans
from ds_recsys.planner.predict import _costs, predict
from ds_recsys.planner.rule import MUST_GAIN, decide

_PARAMETERS = 1_000_000
_LAYERS = 8


def _layer(seconds: float = 0.01, parameters: int = _PARAMETERS) -> LayerFacts:
    """A third of the seconds of a window forward, the rest backward."""
    return LayerFacts(Line(0.0, seconds / 3), Line(0.0, 2 * seconds / 3), 50_000, 200_000, parameters)


def _facts(hosts=(0, 0, 1, 1), *, value_seconds=1e-9, processor=0.0, transfer=1e-10, **changes) -> Facts:
    """Eight equal layers, a twentieth slower on a tensor axis; an int8 sum takes a quarter of fp32's, int4's an eighth."""
    world, layers = len(hosts), {}
    for tensor in (1, 2, 4):
        layers[tensor] = tuple(_layer(0.01 if tensor == 1 else 0.0105 / tensor) for _ in range(_LAYERS))
    sums = {
        "none": SumFacts(value_seconds),
        "int8": SumFacts(value_seconds / 4, processor),
        "int4": SumFacts(value_seconds / 8, processor),
    }
    grid_sums = {(data, tensor): sums for _, data, tensor in grids(hosts, {}) if data > 1}
    values = {
        "slowdowns": (1.0,) * world,
        "layers": layers,
        "sums": grid_sums,
        "transfers": {stride: Line(0.0, transfer) for stride in range(1, world)},
        **changes,
    }
    return Facts(hosts, **values)


def _chosen(facts: Facts, batch: int = 64, **fixed) -> Plan:
    return decide(facts, plans(facts.hosts, batch, 64, fixed)).plan


def test_a_line_goes_through_its_points():
    line = Line.through((4, 1.0), (16, 2.5))
    assert line(4) == pytest.approx(1.0) and line(16) == pytest.approx(2.5)
    assert Line.through((8, 2.0))(16) == pytest.approx(4.0)
    noisy = Line.through((4, 1.0), (16, 0.9))  # less work never takes longer
    assert noisy.each == 0.0 and noisy(16) == pytest.approx(1.0)
    steep = Line.through((4, 1.0), (16, 8.0))
    assert steep.fixed == 0.0 and steep(16) == pytest.approx(8.0)


def test_grids_fill_the_ranks_and_keep_tensor_axes_within_a_host():
    found = set(grids((0, 0, 1, 1), {}))
    assert found == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}
    assert set(grids((0, 0, 1, 1), {"pipe": 2})) == {(2, 2, 1), (2, 1, 2)}
    assert {tensor for _, _, tensor in grids((0, 1, 2, 3), {})} == {1}
    assert {tensor for _, _, tensor in grids((0, 0, 0, 1, 1, 1), {})} == {1, 3}


def test_plans_cut_the_whole_batch():
    found = list(plans((0, 0, 1, 1), 64, 16, {}))
    assert {(plan.pipe, plan.data, plan.tensor) for plan in found} == set(grids((0, 0, 1, 1), {}))
    for plan in found:
        assert plan.micro_batch * plan.micro_batches * plan.data == 64 and plan.micro_batch <= 16
        assert plan.data > 1 or (plan.method, plan.mode) == ("none", "sync")
    assert {plan.micro_batch for plan in plans((0,), 64, 16, {"micro_batch": 32})} == {32}
    assert not list(plans((0, 1), 3, 16, {"data": 2}))


@pytest.mark.parametrize(
    "method, mode, covered",
    [("none", "sync", 0.0), ("int8", "sync", 0.7), ("none", "delayed", 1.28), ("int8", "delayed", 1.28)],
)
def test_a_sum_costs_what_compute_does_not_cover(method, mode, covered):
    facts = _facts(value_seconds=4e-7, optimizer=1e-8)
    forecast = predict(facts, Plan(1, 4, 1, 16, 1, method, mode))
    total = _LAYERS * _PARAMETERS * facts.sums[4, 1][method].seconds
    assert forecast.compute == pytest.approx(1.28)
    assert forecast.communication == pytest.approx(total)
    assert forecast.gradients == pytest.approx(max(0.0, total - covered))
    assert forecast.optimizer == pytest.approx(1e-8 * _LAYERS * _PARAMETERS)
    assert forecast.seconds == pytest.approx(1.28 + forecast.gradients + forecast.optimizer)


@pytest.mark.parametrize(
    "int8_seconds, bucket, exposed",
    [
        (0.8, 1, 0.1),  # the first layer's gradient is final with the backward pass
        (0.8, 2_000_000, 6 * 0.32 / 3 + 0.2 + 0.1 + 0.1 - 8 * 0.32 / 3),  # of two, two, two, one and one
        (0.8, 3_000_000, 5 * 0.32 / 3 + 0.3 + 0.2 + 0.1 - 8 * 0.32 / 3),  # of two, three, two layers and one
        (0.8, 8_000_000, 6 * 0.32 / 3 + 0.4 + 0.2 - 8 * 0.32 / 3),  # of two, four and two
        (0.8, 64_000_000, 0.8),
        (0.8, None, 0.8),
        (1.6, 1, 1.6 - 7 / 8 * 1.28 * 2 / 3),  # the link is never free once the last layer is done
    ],
)
def test_buckets_leave_while_the_backward_pass_goes_on(int8_seconds, bucket, exposed):
    facts = _facts(value_seconds=4 * int8_seconds / (_LAYERS * _PARAMETERS), bucket=bucket)
    forecast = predict(facts, Plan(1, 4, 1, 16, 1, "int8"))
    assert forecast.communication == pytest.approx(int8_seconds)
    assert forecast.gradients == pytest.approx(exposed)


def test_a_last_stage_sums_while_the_others_go_on_but_for_a_tied_table():
    plan = Plan(2, 2, 1, 16, 2, "int8")
    ends = [1] * (_LAYERS - 1) + [2 * _PARAMETERS]
    facts = _facts(value_seconds=4e-7)
    facts = replace(facts, layers={1: tuple(_layer(parameters=count) for count in ends)})
    whole = predict(facts, plan)
    assert whole.communication == pytest.approx(0.2, rel=1e-5) and whole.gradients < 1e-6
    ends[0] = _PARAMETERS  # the table
    tied = replace(facts, layers={1: tuple(_layer(parameters=count) for count in ends)}, tied=_PARAMETERS)
    between = tied.transfers[2](4 * _PARAMETERS)
    assert predict(tied, plan).gradients == pytest.approx(0.1 + between, abs=1e-6)


@pytest.mark.parametrize("change, apart", [({}, True), ({"looked_up": 10_000}, False), ({"bucket": None}, False)])
def test_the_heads_part_of_a_tied_table_leaves_first_and_few_rows_last(change, apart):
    counts = [_PARAMETERS, *[1] * (_LAYERS - 2), _PARAMETERS + 1]
    facts = _facts((0, 1, 2, 3), value_seconds=8e-7, tied=_PARAMETERS, looked_up=100, sent={"int8": 1.0})
    facts = replace(facts, layers={1: tuple(_layer(parameters=count) for count in counts)}, **change)
    forecast = predict(facts, Plan(1, 4, 1, 16, 1, "int8"))
    rows = 100 * 16 * 8e-7 * 4 / 2
    assert forecast.gradients == pytest.approx(rows if apart else 0.2, rel=1e-3)
    assert forecast.communication == pytest.approx(0.2, rel=1e-3)


def test_encoding_is_never_covered():
    facts = _facts(value_seconds=4e-8, processor=5e-9)
    forecast = predict(facts, Plan(1, 4, 1, 16, 1, "int8", "delayed"))
    assert forecast.gradients == pytest.approx(5e-9 * _LAYERS * _PARAMETERS)


def test_a_later_stage_sums_while_earlier_ones_still_compute():
    facts = _facts(value_seconds=4e-6, transfer=0.0)
    facts = replace(facts, layers={1: (_layer(parameters=4), _layer())}, bucket=_PARAMETERS)
    forecast = predict(facts, Plan(2, 2, 1, 16, 2, "int8"))
    assert forecast.plan.bounds == (0, 1, 2)
    assert forecast.gradients == pytest.approx(1.0 - 16 * 0.01 * 2 / 3)


def test_beside_compute_a_sum_may_take_longer_than_by_itself():
    alone = _facts(value_seconds=3.2e-6)  # int8: 6.4 s for 8 million values, in a step of 1.28 s
    both = {method: replace(cost, beside=2 * cost.seconds) for method, cost in alone.sums[4, 1].items()}
    slower = replace(alone, sums={**alone.sums, (4, 1): both})
    late = Plan(1, 4, 1, 16, 1, "int8", "delayed")
    assert predict(alone, late).gradients == pytest.approx(6.4 - 1.28)
    assert predict(slower, late).gradients == pytest.approx(6.4 - 1.28 / 2)  # half as much of it is covered
    # the first bucket of eight is there when the backward pass (.85 s) has gone on for an eighth
    in_time = Plan(1, 4, 1, 16, 1, "int8")
    alone, slower = (replace(facts, bucket=_PARAMETERS) for facts in (alone, slower))
    covered = 7 / 8 * 1.28 * 2 / 3
    assert predict(alone, in_time).gradients == pytest.approx(6.4 - covered)
    assert predict(slower, in_time).gradients == pytest.approx(6.4 - covered / 2)
    assert predict(slower, in_time, zero_stage=1).gradients == predict(alone, in_time, zero_stage=1).gradients


def test_a_sum_is_timed_beside_compute(monkeypatch):
    products, threads, multiply = [], [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(multiply(*args, **kwargs)))

    def work(flat):
        threads.append(threading.current_thread())
        deadline = time.monotonic() + 5
        while len(products) < 3 and time.monotonic() < deadline:
            time.sleep(1e-3)
        flat.add_(1)

    flat = torch.zeros(4)
    _beside_compute(work, 64)(flat)
    assert threads[0] is not threading.current_thread() and len(products) >= 3 and flat.eq(1).all()
    with pytest.raises(ZeroDivisionError):
        _beside_compute(lambda _: 1 / 0, 64)(flat)


def test_looking_ahead_takes_its_time_and_is_what_late_averages_do():
    facts = _facts(optimizer=1e-8, copy=1e-9, ahead=5e-9)
    late, ahead = (predict(facts, Plan(1, 4, 1, 16, 1, "int8", "delayed", look)) for look in (False, True))
    assert ahead.optimizer == pytest.approx((1e-8 + 2e-9 + 5e-9) * _LAYERS * _PARAMETERS)
    assert late.optimizer == pytest.approx((1e-8 + 2e-9) * _LAYERS * _PARAMETERS) and ahead.compute == late.compute
    assert predict(facts, Plan(1, 4, 1, 16, 1, "int8")).optimizer == pytest.approx(1e-8 * _LAYERS * _PARAMETERS)
    assert ahead.plan.values() == {**late.plan.values(), "recsys.data_parallel.look_ahead": True}
    found = list(plans((0, 1), 64, 16, {}))
    assert all(plan.look_ahead == (plan.mode == "delayed") for plan in found)
    assert not any(plan.look_ahead for plan in plans((0, 1), 64, 16, {}, look_ahead=False))


def test_zero_shares_the_optimizer_and_gathers_fp32():
    facts = _facts(value_seconds=4e-8, optimizer=1e-8)
    forecast = predict(facts, Plan(1, 4, 1, 16, 1, "int8"), zero_stage=1)
    assert forecast.optimizer == pytest.approx(1e-8 * _LAYERS * _PARAMETERS / 4)
    assert forecast.gradients == pytest.approx((1e-8 + 4e-8) / 2 * _LAYERS * _PARAMETERS)


def test_stages_are_those_of_the_partitioner():
    facts = _facts(layers={1: (_layer(0.04), *(_layer(0.01) for _ in range(5)))}, tied=0)
    plan = Plan(2, 2, 1, 4, 8)
    forecast = predict(facts, plan)
    assert forecast.plan.bounds == (0, 2, 6)  # 0.05 and 0.04
    step = predict_pipeline(_costs(facts, plan, 0), forecast.plan.bounds, 8).step_seconds
    assert forecast.seconds == pytest.approx(step, rel=0.05)
    assert forecast.pipeline == pytest.approx(forecast.seconds - 8 * 4 * 0.05 - forecast.gradients)


def test_a_tied_table_is_summed_between_the_ends():
    plan = Plan(2, 2, 1, 4, 8)
    one, tied = predict(_facts(transfer=1e-9), plan), predict(_facts(transfer=1e-9, tied=10**7), plan)
    assert tied.seconds - one.seconds == pytest.approx(4e7 * 1e-9)


def test_rows_do_not_travel_as_a_table():
    plan, late = Plan(1, 4, 1, 16, 1), Plan(1, 4, 1, 16, 1, "none", "delayed")
    facts = _facts(value_seconds=4e-8, sparse=_PARAMETERS)
    rest, whole = (_LAYERS - 1) * _PARAMETERS * 4e-8, _LAYERS * _PARAMETERS * 4e-8
    assert predict(facts, plan).communication == pytest.approx(rest)
    assert predict(facts, late).communication == pytest.approx(whole)  # "delayed" makes them dense


def test_fast_links_need_no_compression():
    plan = _chosen(_facts())
    assert (plan.data, plan.method, plan.mode, plan.micro_batches) == (4, "none", "sync", 1)


def test_slow_links_are_answered_by_what_changes_training_least():
    """As sums grow against compute, and no grid without replicas is allowed."""
    answers = [
        _chosen(_facts((0, 1, 2, 3), value_seconds=seconds), data=4) for seconds in (1e-9, 1e-7, 6e-7, 2e-6, 5e-6)
    ]
    ways = [(plan.method, plan.mode) for plan in answers]
    assert ways == [("none", "sync"), ("int8", "sync"), ("int8", "delayed"), ("int4", "delayed"), ("int4", "delayed")]


def test_a_later_way_must_be_a_twentieth_faster():
    facts = _facts((0, 1, 2, 3), value_seconds=7e-9)  # fp32 adds 0.056 s to 1.28 s: 4 %
    assert _chosen(facts, data=4).method == "none"
    more = _facts((0, 1, 2, 3), value_seconds=1.1e-8)
    assert 1.28 / (1.28 + 0.088) < MUST_GAIN
    assert _chosen(more, data=4).method == "int8"


def test_with_links_that_slow_a_pipeline_wins_where_nothing_may_be_changed():
    facts = _facts((0, 1, 2, 3), value_seconds=5e-6)
    plan = decide(facts, plans(facts.hosts, 64, 64, {}, ["none"], ["sync"])).plan
    assert (plan.pipe, plan.data) == (4, 1)
    assert plan.micro_batches > 4  # so that stages are busy


def test_a_model_that_does_not_fit_is_cut():
    facts = _facts(memory_limit=_LAYERS * _PARAMETERS * 16 // 2)
    decision = decide(facts, plans(facts.hosts, 64, 64, {}))
    assert decision.plan.pipe * decision.plan.tensor > 1
    assert "memory" in decision.refused[1, 4, 1]
    with pytest.raises(UserError, match="no way to train on 4 ranks.*memory"):
        decide(_facts(memory_limit=1000), plans(facts.hosts, 64, 64, {}))


def test_a_slow_host_gets_fewer_layers():
    facts = _facts((0, 0, 1, 1), slowdowns=(1.0, 1.0, 3.0, 3.0))
    assert _chosen(replace(facts, shares=(1, 1, 1, 1))).pipe > 1  # with equal parts of the batch
    forecast = predict(facts, Plan(2, 2, 1, 4, 8))
    assert forecast.plan.bounds == (0, 6, 8)
    assert "3.0 times as slow" in decide(facts, [forecast.plan]).describe(facts)


def test_a_slow_replica_gets_fewer_windows():
    facts = _facts((0, 1, 2, 3), slowdowns=(1.0, 1.0, 1.0, 2.0))
    plan = Plan(1, 4, 1, 16, 1)
    forecast, equal = predict(facts, plan), predict(replace(facts, shares=(1, 1, 1, 1)), plan)
    assert sorted(forecast.plan.shares) == [9, 18, 18, 19] and forecast.plan.shares[3] == 9
    assert forecast.compute == pytest.approx(1.28 * 19 / 16) and equal.compute == pytest.approx(2 * 1.28)
    assert forecast.plan.values()["recsys.data_shares"] == list(forecast.plan.shares)
    assert "1 micro-batches of " + "/".join(map(str, forecast.plan.shares)) in str(forecast.plan)
    # every replica is as slow as its slowest stage, and where all are alike nothing is dealt out
    assert predict(facts, Plan(2, 2, 1, 16, 2)).plan.shares in ((21, 11), (22, 10))
    assert predict(replace(facts, slowdowns=(1.0,) * 4), plan).plan.shares == ()
    assert predict(facts, Plan(2, 2, 1, 1, 32)).plan.shares == ()  # a window to each
    assert predict(facts, Plan(1, 4, 1, 16, 1, "none", "local_sgd")).plan.shares == ()
    assert "recsys.data_shares" not in plan.values()
    chosen = _chosen(facts)
    assert chosen.data == 4 and chosen.shares[3] < chosen.shares[0]


def test_a_slow_replica_gets_fewer_still_where_a_step_takes_what_no_window_does():
    facts = _facts((0, 1, 2, 3), slowdowns=(1.0, 1.0, 1.0, 2.0), optimizer=4e-8)  # as long as 4 windows
    plan = Plan(1, 4, 1, 16, 1)
    forecast, equal = predict(facts, plan), predict(replace(facts, shares=(1, 1, 1, 1)), plan)
    assert forecast.plan.shares == (19, 19, 19, 7)
    assert forecast.compute + forecast.optimizer == pytest.approx((19 + 4) * 0.08)  # the slow one: 2 x (7 + 4) x 0.08
    assert equal.compute + equal.optimizer == pytest.approx(2 * (16 + 4) * 0.08)
    encoding = _facts((0, 1, 2, 3), slowdowns=(1.0, 1.0, 1.0, 2.0), value_seconds=2e-6, processor=4e-8)
    assert predict(encoding, replace(plan, method="int8")).plan.shares == (19, 19, 19, 7)
    assert predict(encoding, plan).plan.shares != (19, 19, 19, 7)  # which encodes nothing
    # what a layer takes besides its windows is counted with them, as the forecast does
    line = Line(0.16, 0.0)
    alone = replace(facts, optimizer=0.0, layers={1: (LayerFacts(line, line, 0, 0, _PARAMETERS),)})
    assert predict(alone, plan).plan.shares[3] == 9
    lost = replace(facts, optimizer=4e-7)
    assert predict(lost, plan).plan.shares[3] == 1


def _slowest_link(shares, rates) -> float:
    return max((1 + (len(rates) - 2) * share) / rate for share, rate in zip(shares, rates, strict=True))


@pytest.mark.parametrize(
    "rates, expected",
    [
        ((4, 4, 4, 1), (1 / 3, 1 / 3, 1 / 3, 0)),
        ((1, 1, 1.2), ()),  # as good as equal
        ((9, 1), ()),  # two send each other everything
        ((1, 2, 2), (0, 0.5, 0.5)),
        ((1, 1, 4), (0, 0, 1)),
        ((1, 1, 1, 1.5), (1 / 6, 1 / 6, 1 / 6, 1 / 2)),
    ],
)
def test_a_slow_link_sums_less(rates, expected):
    shares = owner_shares(rates)
    assert shares == pytest.approx(expected, abs=2e-3)
    if shares:
        assert sum(shares) == pytest.approx(1, abs=2e-3)
        assert _slowest_link(shares, rates) < 0.95 * _slowest_link([1 / len(rates)] * len(rates), rates)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_parts_spare_the_slowest_link_more(seed):
    draw = random.Random(seed)
    rates = [draw.uniform(1, 6) for _ in range(draw.randint(3, 7))]
    best = _slowest_link(owner_shares(rates) or [1 / len(rates)] * len(rates), rates)
    for _ in range(500):
        parts = [draw.expovariate(1) * (draw.random() < 0.8) for _ in rates]
        if sum(parts):
            other = _slowest_link([part / sum(parts) for part in parts], rates)
            assert best < 1.01 * other or max(rates) < 1.25 * min(rates)


def test_replicas_share_what_their_host_sums():
    alike = (1.0,) * 6
    assert replica_shares((0, 1, 2, 3), (4, 4, 4, 1), alike, 4, 1) == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0), abs=2e-3)
    assert replica_shares((0, 0, 1, 1, 2, 2), (1, 9, 9), alike, 6, 1) == (0, 0, 0.25, 0.25, 0.25, 0.25)
    assert replica_shares((0, 0, 1, 1, 2, 2), (1, 9, 9), alike, 3, 2) == (0, 0.5, 0.5)
    # the second stage of the first replica has the slow link
    assert replica_shares((0, 1, 2, 3, 4, 5), (9, 9, 9, 1, 9, 9), alike, 3, 1) == (0, 0.5, 0.5)
    assert replica_shares((0, 1, 2, 3), (4, 4, 4, 1), alike, 2, 1) == ()


def test_a_slow_device_sums_less_where_links_leave_a_choice():
    shares = owner_shares((4, 4, 1, 4), (1, 1, 1, 0.5))
    assert shares == pytest.approx((0.48, 0.48, 0, 0.04), abs=2e-3)  # 2 + 5 f over their speed: 4.4 each
    assert owner_shares((4, 4, 1, 4), (1, 1, 1, 0.9)) == pytest.approx((0.359, 0.359, 0, 0.283), abs=2e-3)
    assert owner_shares((1, 1, 4), (1, 1, 0.1)) == (0, 0, 1)  # the links come first
    assert replica_shares((0, 1, 2, 3), (4, 4, 1, 4), (1, 1, 1, 2), 4, 1) == shares


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_all_hosts_meet_in_pairs(count):
    rounds = [pairs_of(count, number) for number in range(count - 1 + count % 2)]
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    for pairs in rounds:
        assert len({one for pair in pairs for one in pair}) == 2 * len(pairs)


def test_unlike_owners_go_with_the_sums_that_they_were_measured_for():
    facts = _facts((0, 1, 2, 3), value_seconds=6e-7)
    cheap = SumFacts(1e-10, owners=(0.5, 0.5, 0.0, 0.0))
    costs = facts.sums[4, 1]
    facts = replace(facts, sums={**facts.sums, (4, 1): {**costs, "int8": replace(costs["int8"], unlike=cheap)}})
    chosen = _chosen(facts, pipe=1)
    assert (chosen.data, chosen.method, chosen.owners) == (4, "int8", cheap.owners)
    assert chosen.values()["recsys.compression.owner_shares"] == [0.5, 0.5, 0.0, 0.0]
    assert "summed in parts of 0.5/0.5/0/0" in str(chosen)
    assert predict(facts, Plan(1, 4, 1, 16, 1, "int4")).plan.owners == ()
    # less on the wire, but more of the device, which late averages do not hide
    busy = replace(costs["int8"], unlike=SumFacts(costs["int8"].seconds / 2, costs["int8"].seconds / 4, cheap.owners))
    facts = replace(facts, sums={**facts.sums, (4, 1): {**costs, "int8": busy}})
    assert predict(facts, Plan(1, 4, 1, 16, 1, "int8")).plan.owners == cheap.owners
    assert predict(facts, Plan(1, 4, 1, 16, 1, "int8", "delayed")).plan.owners == ()
    assert "recsys.compression.owner_shares" not in predict(facts, Plan(1, 4, 1, 16, 1)).plan.values()


def test_a_heavy_head_is_shared_by_the_ranks_of_a_host():
    """Its sum over the data axis and its optimizer's step are what tensor ranks halve."""
    head = _layer(0.05, 50 * _PARAMETERS)
    layers = {t: (*(_layer(0.01 / t) for _ in range(7)), replace(head, forward=Line(0, 0.05 / t))) for t in (1, 2)}
    facts = _facts(layers=layers, value_seconds=1e-8, optimizer=2e-8)
    assert _chosen(facts).tensor == 2


def test_what_is_set_by_hand_stays():
    facts = _facts(value_seconds=2e-7)
    assert _chosen(facts, pipe=2).pipe == 2
    assert _chosen(facts, pipe=1, data=2).tensor == 2
    decision = decide(facts, plans(facts.hosts, 64, 64, {}, ["int8"], ["sync"]))
    assert {way for way in decision.ways if way[0] != "none"} == {("int8", "sync")}


def test_the_reason_names_what_decided():
    facts = _facts((0, 1, 2, 3), value_seconds=6e-7)
    decision = decide(facts, plans(facts.hosts, 64, 64, {"micro_batches": 1}))
    text = decision.describe(facts)
    assert str(decision.plan) in text and "4 ranks on 4 hosts" in text
    for way in ("fp32", "int8", "int8 delayed"):
        assert f"{way} {decision.ways[_way(way)].seconds:.3g} s" in text
    assert "pipe 4 x data 1 x tensor 1" in text


def _way(text: str) -> tuple[str, str]:
    method, _, mode = text.partition(" ")
    return ("none" if method == "fp32" else method), mode or "sync"
