"""launch/bench.py balance: the report as a function of the rows, the trial's bookkeeping, and a smoke run on a cluster."""

import time
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_runs import quick_run, whole_grid
from benchmarks import balance, balance_costs, balance_straggler
from benchmarks.balance_cuts import near_best
from benchmarks.balance_job import best_of, idle_share

from ds_recsys.balance.costs import LayerCost, PipelineCosts, StageCost, predict
from ds_recsys.balance.partition import partition
from ds_recsys.simulation import network
from ds_recsys.simulation.cgroups import CpuController

ROOT = Path(__file__).parents[1]
obstacle = network.missing() or (None if CpuController.find() else "a cpu controller")


def split(compute, waits):
    return {"compute": compute, "pipeline": waits, "gradients": 0.0, "optimizer": 0.1, "other": 0.0}


def cut(part, name, seconds, repeat=0, pipe=4, stages=(0.1, 0.1, 0.1, 0.1), **more):
    measured = {"seconds": seconds, "split": [split(0.8, 0.4)] * 4, "idle": 0.3, "stage_seconds": list(stages)}
    place = {"part": part, "pipe": pipe, "kind": "cut", "cut": name, "repeat": repeat}
    return {**place, "bounds": [0, 8, 15, 22, 30], **measured, **more}


def trial(after, repeat, moved=(15,), pipe=4):
    state = {"split": [split(0.8, 0.4)] * 4, "idle": 0.25}
    move = {"bounds": [0, 9, 13, 21, 30], "bytes": 12e6, "seconds": 0.2, "back": False, "cross_host_bytes": [9e6, 9e6]}
    record = {"bounds": [0, 8, 15, 22, 30], "stage_seconds": [0.1, 0.2, 0.1, 0.1], "step_seconds": 3.0}
    return {
        **{"part": "straggler", "pipe": pipe, "kind": "trial", "repeat": repeat, "change": 9, "moved": list(moved)},
        **{"seconds": [2.0] * 9 + [4.0] * 7 + [2.5] * 11, "moves": [move] * len(moved)},
        **{"before": {"seconds": 2.0, **state}, "after": {"seconds": after, **state}},
        "records": [{"step": 100 + step, **record} for step in range(27)],
    }


def overhead(seconds, cpu, repeat=0, moved=()):
    row = {"part": "overhead", "pipe": 4, "kind": "overhead", "repeat": repeat, "moved": list(moved)}
    return {**row, "seconds": seconds, "cpu_seconds": cpu}


def jitter(moved, changes=20):
    row = {"part": "jitter", "pipe": 4, "kind": "jitter", "start": 0, "jitter": 0.1, "changes": changes}
    return {**row, "seconds": [0.4] * 50, "moved": moved, "cpu_seconds": [0.1] * 50}


def pause(arm, seconds, repeat=0):
    row = {"part": "pause", "pipe": 4, "kind": "pause", "arm": arm, "repeat": repeat, "seconds": seconds}
    return {**row, "bytes": 150e6, "busiest_bytes": 50e6}


ROWS = [
    {"part": "calibration", "pipe": 4, "kind": "calibration", "what": "host0", "expected": 0.4, "measured": 0.39},
    *(cut("straggler", name, seconds, repeat, when="after") for repeat, times in enumerate(((4, 5, 2, 2.5), (8, 9, 4, 4)))
      for name, seconds in zip(("parameters", "uniform", "best", "reached"), times, strict=True)),
    trial(2.6, 0),
    trial(4.1, 1, moved=(16, 20)),
    cut("straggler", "parameters", 2.0, when="before"),
    *(cut(part, name, seconds) for part, times in (("hardware", (3, 4, 2.5, 2)), ("head", (3, 3.5, 3, 3)))
      for name, seconds in zip(("parameters", "uniform", "profile", "best"), times, strict=True)),
    *(cut("split head", name, 2.0, stages=(0.1, 0.1, 0.1, 0.14)) for name in ("parameters", "profile")),
    *(cut("head", name, seconds, pipe=2) for name, seconds in (("parameters", 1.4), ("profile", 1.0), ("best", 1.0))),
    {"part": "head", "pipe": 4, "kind": "share", "head_share": 0.5, "layer_seconds": [1, 1], "parameters": 9},
    overhead([1.0, 1.2, 1.4, 1.6], [0.2, 0.21, 0.21, 0.2]),  # drifts, and nothing else
    overhead([1.0, 1.3, 1.3, 1.0, 1.0, 9.0, 9.0, 1.0], [0.2, 0.21, 0.21, 0.2] * 2, 1, [5]),
    *(jitter([]), jitter([7])),
    *(pause("migrate", 1.0), pause("migrate back", 0.5), pause("reload", 15.0)),
    *({"part": "solver", "pipe": 4, "kind": "solver", "layers": 100, "stages": 16, "seconds": seconds}
      for seconds in (0.03, 0.02, 0.06)),
    {"part": "straggler", "pipe": 2, "kind": "job", "error": "UserError: the ranks ended"},
]  # fmt: skip


def test_what_came_back_is_of_the_throughput_that_a_cut_could_give_back():
    figures = balance.figures(ROWS)
    # in steps a second: static 1/4 and 1/8, best 1/2 and 1/4, adaptive 1/2.5 and 1/4
    recovered = ((1 / 2.5 - 1 / 4) / (1 / 2 - 1 / 4), 1.0)
    assert figures["straggler_recovered"] == pytest.approx(sum(recovered) / 2)
    assert figures["straggler_speedup"] == pytest.approx((4 / 2.5 + 8 / 4) / 2)
    assert figures["straggler_speedup_over_uniform"] == pytest.approx((5 / 2.5 + 9 / 4) / 2)
    of_before = ((1 / 2.5 - 1 / 4) / (1 / 2 - 1 / 4), (1 / 4 - 1 / 8) / (1 / 2 - 1 / 8))
    assert figures["straggler_recovered_of_before"] == pytest.approx(sum(of_before) / 2)


def test_the_steps_to_act_are_those_of_the_slowest_trial_and_a_trial_without_a_move_has_none():
    assert balance.figures(ROWS)["steps_to_act"] == 8
    assert balance.figures([*ROWS, trial(4.0, 0, moved=(5,))])["steps_to_act"] is None
    assert balance.figures([*ROWS, trial(4.0, 0, moved=(5, 11))])["steps_to_act"] == 8


def test_the_other_figures():
    figures = balance.figures(ROWS)
    assert figures["head_speedup"] == pytest.approx(1.4)  # the same layers, two stages
    assert figures["split_head_speedup"] == pytest.approx(1.5)
    assert figures["split_head_imbalance"] == pytest.approx(0.14 / 0.11)
    assert figures["hardware_pipe4"] == pytest.approx(
        {"over parameters": 1.2, "over uniform": 1.6, "over best": 0.8}, rel=1e-6
    )
    assert figures["overhead"] == pytest.approx(0.3 / 2)
    assert figures["overhead_noise"] == pytest.approx(0.3 / 2)  # standard error of 0 and 0.3
    assert (figures["overhead_cpu"], figures["overhead_noise_cpu"]) == pytest.approx((0.05, 0.0))
    assert (figures["overhead_steps"], figures["overhead_moves"]) == (8, 1)
    assert (figures["false_moves"], figures["jittered_steps"]) == (1, 100)
    assert figures["migration_vs_reload"] == pytest.approx(20.0)
    assert figures["migration_mb"] == pytest.approx(150.0)
    wanted = "straggler_recovered straggler_speedup steps_to_act head_speedup split_head_imbalance overhead false_moves"
    assert {*wanted.split(), "migration_vs_reload"} <= figures.keys()


def test_a_jitter_in_which_no_speed_changed_proves_nothing():
    assert balance.figures([jitter([], changes=0)])["false_moves"] is None


def test_every_figure_is_there_after_a_part():
    figures = balance.figures([row for row in ROWS if row["part"] == "pause"])
    assert figures["migration_vs_reload"] and figures["straggler_recovered"] is None and figures["overhead"] is None


def test_what_is_not_measured_again_is_taken_over():
    kept = balance.others(ROWS, ["straggler", "head", "solver"], [4, 2])
    assert {row["part"] for row in kept} == {"hardware", "overhead", "jitter", "pause"}
    kept = balance.others(ROWS, ["straggler", "head", "solver"], [4])
    assert {row["part"] for row in kept if row["pipe"] == 2} == {"straggler", "head"}


def test_the_table_and_the_plot(tmp_path):
    table = balance.table(ROWS)
    assert "| 4 stages, a device at half speed | adaptive |  | 3.35 | 22% | 25% | 0.40 |" in table
    assert "| 4 stages, devices of one speed | parameters | 0-8-15-22-30 | 2.00 | 0% | 30% | 0.40 |" in table
    assert "bounds 0-9-13-21-30, 7 steps after the change; 12.0 MB in 0.20 s" in table
    assert "1 moves in 100 steps" in table and "15.00 s, 20.0 times as long" in table
    assert "100 layers in 16 stages is found in 30 ms, 60 ms at worst" in table
    assert "- failed: straggler, 2 stages, job: UserError: the ranks ended" in table
    balance.plot(ROWS, tmp_path / "all.png")
    balance.plot([row for row in ROWS if row["part"] == "pause"], tmp_path / "none.png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_the_ideal_shares_the_work_out_by_the_devices_speeds():
    # 8 and 4 seconds at speeds 0.5 and 0.25 are 5 core seconds, which both devices together make in 20/3 s
    shares = idle_share([split(8.0, 0.0), split(4.0, 0.0)], [0.5, 0.25], 10.0)
    assert shares == pytest.approx(1 - 20 / 3 / 10)


def test_the_best_cut_has_the_least_median_and_failures_do_not_count():
    rows = [
        cut("head", name, s) for name, s in (("a", 3.0), ("a", 1.0), ("a", 3.0), ("b", 2.0), ("b", 2.0), ("b", 9.0))
    ]
    rows = [{**row, "bounds": [row["cut"]]} for row in rows]
    assert best_of([*rows, {"cut": "c", "error": "e"}]) == ["b"]


def _costs(**more):
    layers = [LayerCost(1.0, 2.0, trainable_bytes=8) for _ in range(7)]
    layers[3] = LayerCost(4.0, 8.0, trainable_bytes=8)
    layers[6] = LayerCost(0.5, 1.0, **more)
    return PipelineCosts(layers, [StageCost(), StageCost(slowdown=2.0), StageCost()])


def test_the_cuts_near_the_best_are_those_of_all_cuts():
    costs = _costs(trainable_bytes=8)
    every = [(0, *inner, 7) for inner in combinations(range(1, 7), 2)]
    seconds = sorted(predict(costs, bounds, 4).step_seconds for bounds in every)
    near = near_best(costs, 4, within=0.5, most=100)
    assert near[0][0] == tuple(partition(costs, 4))
    assert [one for _, one in near] == [one for one in seconds if one <= 1.5 * seconds[0]]
    assert near_best(costs, 4, within=0.5, most=3) == near[:3]


def test_cuts_that_a_pipeline_cannot_have_are_left_out():
    inner = {bounds for bounds, _ in near_best(_costs(trainable_bytes=8), 4, within=99, most=100)}
    joined = {bounds for bounds, _ in near_best(_costs(trainable_bytes=8, joined=True), 4, within=99, most=100)}
    frozen = {bounds for bounds, _ in near_best(_costs(), 4, within=99, most=100)}
    assert joined == frozen == {bounds for bounds in inner if bounds[-2] != 6} != inner
    needed = [LayerCost(1.0, 1.0, trainable_bytes=8, needed=frozenset("a" if n % 2 else "b")) for n in range(6)]
    found = {bounds for bounds, _ in near_best(PipelineCosts(needed, [StageCost()] * 3), 4, within=99, most=100)}
    assert found == {(0, 2, 4, 6)}


class _Pipeline:
    """Moves a layer in the third step after the change of speeds."""

    def __init__(self):
        self.speeds, self.calls, self.set, self._since = [0.4] * 4, [], [], None
        self.facts = {"cuts": {"parameters": [0, 8, 15, 22, 30], "uniform": [0, 8, 16, 23, 30]}}

    def speed(self, speeds):
        self.speeds = list(speeds)
        self.set.append(self.speeds)
        self._since = 0 if len(set(speeds)) > 1 else None

    def cut(self, bounds):
        self.calls.append(("cut", list(bounds)))

    def watch(self, method="adaptive"):
        self.calls.append(("watch", method))

    def unwatch(self):
        return {"records": [], "moves": [{"bounds": [0, 9, 13, 21, 30]}]}

    def costs(self, most):
        return {"cuts": [{"bounds": [0, 7, 14, 21, 30]}]}

    def steps(self, steps, timeline=True):
        time.sleep(0.01)
        moved = [] if self._since is None or not 0 <= 2 - self._since < steps else [2 - self._since]
        if self._since is not None:
            self._since += steps
        row = {"seconds": [9.0 if step in moved else 1.0 for step in range(steps)], "moved": moved}
        return {**row, "split": [split(0.5, 0.5)] * 4, "idle": 0.5}

    def search(self, *_):
        yield {"cut": "a", "bounds": [0, 9, 13, 21, 30], "seconds": 1.0, "predicted": 1.0}

    def compare(self, cuts, repeats, steps, label):
        for name in cuts:
            yield {"cut": name, "bounds": cuts[name], "seconds": 1.0, "repeat": 0, "speeds": list(self.speeds)}


def test_a_trial_slows_one_device_between_two_steps_and_counts_from_there():
    pipeline, options = _Pipeline(), SimpleNamespace(repeats=2, steps=1, within=0.1, cuts=2)
    rows = list(balance_straggler.straggler(pipeline, options))
    found = [row for row in rows if row["kind"] == "trial"]
    assert len(found) == 2
    for one in found:
        assert one["seconds"].index(9.0) == one["moved"][0] == one["change"] + 2
        assert len(one["seconds"]) > one["change"] + 10 and one["after"]["seconds"] == 1.0
    slow = [0.4, 0.2, 0.4, 0.4]
    assert [row["speeds"] == slow for row in rows if row.get("when") == "after"] == [True] * 8
    assert [row["speeds"] == [0.4] * 4 for row in rows if row.get("when") == "before"] == [True] * 4
    assert {row["repeat"] for row in rows if row.get("when") == "after"} == {0, 1}
    reached = [row["bounds"] for row in rows if row["kind"] == "cut" and row["cut"] == "reached"]
    assert reached == [[0, 9, 13, 21, 30]] * 2


def test_jitter_changes_all_speeds_a_little_and_puts_them_back(monkeypatch):
    monkeypatch.setattr(balance_costs, "_JITTER_SECONDS", 0.001)
    pipeline = _Pipeline()
    rows = list(balance_costs.jitter(pipeline, 120))
    assert [len(row["seconds"]) for row in rows] == [50, 50, 20] and sum(row["changes"] for row in rows) > 2
    assert pipeline.speeds == [0.4] * 4 and pipeline.calls[-1] == ("watch", "adaptive")
    assert pipeline.calls[-2] == ("cut", [0, 7, 14, 21, 30])
    drawn = [speed for speeds in pipeline.set[:-1] for speed in speeds]
    assert all(0.36 <= speed <= 0.44 for speed in drawn) and len(set(drawn)) > 8


@whole_grid
@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_under_the_real_launcher(tmp_path):
    rows = quick_run("balance", tmp_path / "balance.json")["rows"]
    kinds = {(row["part"], row["kind"]) for row in rows}
    assert {("straggler", "trial"), ("hardware", "cut"), ("split head", "share"), ("jitter", "jitter")} <= kinds
    slowed = next(row for row in rows if row["kind"] == "cut" and row.get("when") == "after")
    assert sum(slowed["bounds"][1:-1]) and len(slowed["stage_seconds"]) == 2 and 0 < slowed["idle"] < 1
    moved = [row for row in rows if row["kind"] == "pause" and row["arm"] != "reload"]
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in moved)
