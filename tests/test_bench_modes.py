"""launch/bench.py modes: the report as a function of the rows, windows of time, and a smoke run on a cluster."""

import argparse
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from bench_runs import quick_run, whole_grid
from benchmarks import modes, modes_quality, modes_report, modes_speed, quality
from benchmarks.modes_arms import ALONE, BATCH, METHODS, MODES, arm, groups, margin, settings, title
from benchmarks.modes_job import Replicas, summarise
from distributed import distributed

from ds_recsys import load_config
from ds_recsys.simulation import network
from ds_recsys.simulation.cgroups import CpuController

ROOT = Path(__file__).parents[1]
obstacle = network.missing() or (None if CpuController.find() else "a cpu controller")


def window(mode, speed, link=1, situation="even", method="none", group=0, repeat=0, **more):
    row = {"kind": "window", "group": group, "repeat": repeat, "mode": mode, "method": method}
    row |= {"link": link, "situation": situation, "samples_per_s": speed, "step_seconds": 16 / speed, "busy": 0.5}
    return {**row, "dropped": 0, "staleness": 1.5, "bytes_per_sample": 1e5, **more}


def training(mode, seed, loss, ndcg=0.1, method="none", **more):
    row = {"kind": "quality", "mode": mode, "method": method, "seed": seed, "ranks": 4, "epochs": 10, "every": 20}
    row["batch"] = BATCH
    row |= {"steps": 60, "valid": [8.0, 7.0, loss], "ndcg": ndcg, "hit_rate": 0.2, "train_seconds": 9.0}
    return {**row, "staleness": 2.0, **more}


WORKLOAD = {
    **{"kind": "workload", "hosts": 4, "speed": 0.5, "every": 20, "window": 15.0, "stop": 5.0, "batch": BATCH},
    **{"parameters": 250_000, "compute_seconds": 0.05, "rate": 2.4e8},
}
ROWS = [
    WORKLOAD,
    *(window(ALONE, 320, repeat=i) for i in range(3)),  # 0.05 s a step
    *(window("sync", s, repeat=i) for i, s in enumerate((160, 160, 128))),  # 0.1 and 0.125 s
    *(window("delayed", s, repeat=i) for i, s in enumerate((200, 160, 200))),  # 0.08 and 0.1 s
    window("sync", 80, 4),
    window("diloco", 240, 4),
    window("async", 140, situation="half"),
    window("async", 210, situation="stop", dropped=3),
    *(window(mode, s, method="int8", group=1) for mode, s in (("sync", 200), ("delayed", 250))),
    *(window(mode, s, group=1) for mode, s in ((ALONE, 300), ("sync", 100))),
    *(training("sync", seed, loss, ndcg) for seed, loss, ndcg in ((0, 5.0, 0.1), (1, 6.0, 0.2))),
    *(training("diloco", seed, loss, ndcg) for seed, loss, ndcg in ((0, 5.5, 0.09), (1, 6.6, 0.2))),
    training("async", 0, 5.0),
    {**training("delayed", 0, 5.0), "error": "it diverged"},
]


def test_delayed_hides_what_it_saves_of_what_compute_can_cover():
    figures = modes.figures(ROWS)
    # communication is 0.05 s, 0.05 s, 0.075 s, and compute 0.05 s in the three rounds
    assert figures["delayed_hidden"] == pytest.approx(sorted([0.02 / 0.05, 0.0, 0.045 / 0.05])[1])
    assert figures["delayed_hidden_int8"] == pytest.approx((0.08 - 0.064) / (0.08 - 16 / 300))


def test_the_other_figures():
    figures = modes.figures(ROWS)
    assert figures["diloco_speedup_4x"] == pytest.approx(3.0) and figures["diloco_speedup_4x_int8"] is None
    assert figures["diloco_ndcg_ratio"] == pytest.approx((0.9 + 1.0) / 2)
    assert figures["async_share_of_ideal"] == pytest.approx(140 / (320 * 3.5 / 4))
    # stopped for 5 of 20 seconds: a quarter of a quarter is lost
    assert figures["stop_share_of_ideal"] == {"async": pytest.approx(210 / (320 * 15 / 16))}
    assert figures["samples_per_s_ratio_1x"] == {
        "sync": 1.0, "delayed": pytest.approx(1.25), "sync_int8": 2.0, "delayed_int8": 2.5
    }  # fmt: skip
    assert figures["loss_ratio"]["diloco"] == pytest.approx(1.1)
    assert figures["ndcg_seed_noise"] == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize("kinds", [("workload", "window"), ("quality",)])
def test_a_part_has_figures_a_table_and_a_plot(kinds, tmp_path):
    rows = [row for row in ROWS if row["kind"] in kinds]
    figures = modes.figures(rows)
    assert (figures["delayed_hidden"] is None) == (figures["diloco_ndcg_ratio"] is not None) == ("quality" in kinds)
    assert "| sync |" in modes.table(rows)
    modes.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_table(tmp_path):
    table = modes.table(ROWS)
    assert "| each replica alone | 320 (2.25) |" in table
    assert "| DiLoCo |  | 240 (3.00) |  |  |  |  | 6.0500 ± 0.7778 | +10.00% | 0.1450 ± 0.0778 | -5.00% |" in table
    assert "| async |  |  | 140 (0.50) | 210 (0.70) |" in table
    assert "links (240 Mbit/s)" in table and "3 steps are dropped in a window" in table
    assert "failed: delayed, quality: it diverged" in table


def test_loss_is_drawn_over_the_time_that_steps_take():
    seconds, losses = modes_report.curve([training("sync", 0, 6.0), training("sync", 1, 5.0)], 0.1)
    assert seconds == pytest.approx([2.0, 4.0, 6.0]) and losses == [8.0, 7.0, 5.5]


def test_validations_are_compared_at_one_time():
    """Sync takes 0.1 s a step and 6 s in all, delayed 0.05 and 3 s: by then sync is half way from 8 to 7."""
    speeds = [window("sync", 160), window("delayed", 320)]
    slow = {**training("sync", 0, 6.0), "valid_ndcg": [0.02, 0.04, 0.06]}
    table = modes.table([*speeds, slow, {**training("delayed", 0, 5.0), "valid_ndcg": [0.01, 0.02, 0.03]}])
    seconds = slow["steps"] * 0.05
    assert f"|  | loss, 1x, {seconds:.0f} s | NDCG@10, 1x, {seconds:.0f} s |" in table
    assert "| sync | 7.5000 | 0.0300 |" in table and "| delayed | 5.0000 | 0.0300 |" in table


def answer(begin, ends, **more):
    found = {"begin": begin, "ends": ends, "cpu_seconds": 1.0, "wall_seconds": 4.0, "compute_seconds": 1.0}
    return {**found, "dropped": 0, "staleness": 0.0, "parameters": 9, **more}


def test_steps_count_by_the_share_of_them_that_lies_in_the_window():
    # of the first replica's third step half lies in the window, of the other's second a quarter
    answers = [answer(1.0, [2.0, 3.0, 7.0]), answer(1.0, [4.0, 8.0])]
    row = summarise(answers, 4.0, [0.5, 0.25], samples_per_step=8, sent=800)
    assert row["steps"] == [2.5, 1.25] and row["samples_per_s"] == pytest.approx(8 * 3.75 / 4)
    assert row["step_seconds"] == pytest.approx(2 / (3.75 / 4))
    assert row["cpu_share"] == pytest.approx((1 / 6 / 0.5 + 1 / 7 / 0.25) / 2) and row["busy"] == 0.25
    assert row["bytes_per_sample"] == 800 / (8 * (5 + 2 * 2))
    dropped = summarise([{**answers[0], "dropped": 1}, answers[1]], 4.0, [0.5, 0.25], 8, 0)
    assert dropped["samples_per_s"] == pytest.approx(8 * 2.75 / 4)


def test_arms_and_their_jobs():
    known = groups(list(MODES), list(METHODS))
    assert [len(group) for group in known] == [4, 4, 5, 4, 5]
    assert {("sync", "int8"), ("delayed", "int8")} < set(known[2])  # they are compared
    assert all(group[:2] == [(ALONE, "none"), ("sync", "none")] for group in known)
    assert len({arm(*one) for group in known for one in group}) == len(
        {title(*one) for group in known for one in group}
    )
    assert margin("async", 20) is margin(ALONE, 20) is None
    assert margin("diloco", 20) > 20 and margin("delayed", 20) > 2


def test_settings_are_those_of_the_mode_and_the_compressor():
    config = ROOT / "ds_configs/quickstart.json"
    found = settings(config, "diloco", "int8", 4, 20)
    assert found["recsys.data_parallel.mode"] == "diloco" and found["recsys.data_parallel.every"] == 20
    assert found["recsys.compression.method"] == "int8" and found["recsys.pipe"] == 1
    assert not [
        key for key in settings(config, "sync", "none", 4, 20) if "data_parallel" in key or "compression" in key
    ]
    assert settings(config, ALONE, "none", 4, 20)["recsys.data_parallel.every"] > 100_000
    for mode in (ALONE, *MODES):
        found = load_config(config, overrides=settings(config, mode, "int8", 4, 20, batch=BATCH))
        assert found.train_batch_size == BATCH


class _Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def test_replicas_that_wait_for_each_other_end_at_one_step(tmp_path, monkeypatch):
    from benchmarks import modes_rank

    monkeypatch.setattr(modes_rank, "time", clock := _Clock())
    first, second = (modes_rank.LastStep(tmp_path / "last", rank, 3, 10.0) for rank in range(2))
    assert not first.taken(4) and not second.taken(5)
    clock.now = 10.0
    assert not second.taken(6) and not second.taken(7)  # only the first one decides
    assert not first.taken(5)
    assert [second.taken(steps) for steps in (7, 8)] == [first.taken(steps) for steps in (7, 8)] == [False, True]
    free = modes_rank.LastStep(tmp_path / "free", 1, None, 11.0)
    assert not free.taken(9) and (setattr(clock, "now", 11.0) or free.taken(0))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return quality.small(tmp_path_factory.mktemp("bench-modes"))


@pytest.mark.parametrize("mode", [ALONE, *MODES])
@distributed(data=2)
def test_a_window_ends_in_every_mode_and_a_slow_replica_holds_up_only_those_that_wait(mode, small, tmp_path):
    from benchmarks.modes_rank import Replica

    config, log = small
    overrides = settings(config, mode, "none", 2, 3, str(log))
    replica = Replica(load_config(config, overrides=overrides), tmp_path, margin(mode, 3))
    step, steps = replica.arm.step, []

    def slow():
        """The second replica takes four times as long, however fast the machine is."""
        begin = time.monotonic()
        result = step()
        time.sleep(3 * dist.get_rank() * (time.monotonic() - begin))
        return result

    for number, seconds in enumerate((0.2, 1.0)):
        replica.arm.step = slow if number else step
        found = replica({"window": number, "seconds": seconds, "warmup": 1})
        both = [None, None]
        dist.all_gather_object(both, len(found["ends"]))
        steps.append(both)
    assert found["wall_seconds"] > found["compute_seconds"] > 0 and (tmp_path / "window1.began").exists()
    slowed = steps[1]
    if mode in ("async", ALONE):
        assert slowed[0] > 1.5 * slowed[1] > 0, steps
    else:
        assert slowed[0] == slowed[1] > 0 and steps[0][0] == steps[0][1], steps
    assert (found["staleness"] > 0) == (mode == "async") and found["ends"][-1] - found["begin"] >= 1.0
    begins = [None, None]
    dist.all_gather_object(begins, found["begin"])
    assert begins[0] == begins[1]


class _Mail:
    """Replicas whose window begins after a moment."""

    def __init__(self, folder):
        self.folder = folder

    def ask(self, request, patience):
        time.sleep(0.05)
        (self.folder / f"window{request['window']}.began").touch()
        time.sleep(request["seconds"] + 0.1)
        return [answer(0.0, [request["seconds"]])] * 2


def test_a_replica_is_stopped_in_the_middle_of_its_window_and_goes_on(tmp_path):
    sent = []
    cluster = SimpleNamespace(
        link_bytes=lambda: {}, signal=lambda rank, name: sent.append((rank, name, time.monotonic()))
    )
    replicas = Replicas(cluster, tmp_path, tmp_path)
    replicas._mail["a"] = _Mail(tmp_path)
    begin = time.monotonic()
    row = replicas.window("a", 0.4, [1.0, 1.0], 8, stopped=0.3)
    assert [one[:2] for one in sent] == [(1, "stop"), (1, "continue")]
    assert sent[0][2] - begin >= 0.24 and 0.3 <= row["stopped_seconds"] < 0.6
    assert sent[1][2] - begin < 0.05 + 0.7 + 0.1
    sent.clear()
    replicas.window("a", 0.1, [1.0, 1.0], 8)
    assert not sent and threading.active_count() < 20


def test_a_replica_goes_on_where_its_job_has_ended(tmp_path):
    sent = []
    cluster = SimpleNamespace(link_bytes=lambda: {}, signal=lambda rank, name: sent.append(name))
    replicas = Replicas(cluster, tmp_path, tmp_path)

    def ask(request, patience):
        (tmp_path / f"window{request['window']}.began").touch()
        time.sleep(0.2)
        raise RuntimeError("the arm ended")

    replicas._mail["a"] = SimpleNamespace(folder=tmp_path, ask=ask)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="ended"):
        replicas.window("a", 0.1, [1.0, 1.0], 8, stopped=60.0)
    assert sent == ["stop", "continue"] and time.monotonic() - begin < 30


def test_resuming_takes_over_trainings_and_whole_groups_that_fit(tmp_path, monkeypatch):
    arms = groups(["sync", "async"], ["none"])[0]
    cells = [
        (*one, *cell) for one in arms for cell in modes_speed.CELLS if one[0] != ALONE or cell == modes_speed.CELLS[0]
    ]
    rows = [window(mode, 100, link, situation, method) for mode, method, link, situation in cells]
    assert modes_speed._whole(rows, 0, arms, 1) == rows
    assert modes_speed._whole(rows, 0, arms, 2) is None and modes_speed._whole(rows[1:], 0, arms, 1) is None
    assert modes_speed._whole([*rows[1:], {**rows[0], "error": "e"}], 0, arms, 1) is None
    assert modes_speed._whole([*rows, window("delayed", 100)], 0, arms, 1) is None  # another group

    trained, file = [], tmp_path / "result.json"
    kept = [WORKLOAD, training("sync", 0, 5.0), training("async", 0, 5.0, ranks=2), training("sync", 1, 5.0, error="e")]
    file.write_text(json.dumps({"benchmark": "modes", "rows": kept}))
    monkeypatch.setattr(
        modes_quality, "train", lambda config, row, *_: trained.append((row["mode"], row["seed"])) or row
    )
    options = argparse.Namespace(part="quality", modes=["async"], methods=["none"], seeds=[0, 1], ranks=4, epochs=10)
    vars(options).update(every=20, quick=False, resume=str(file), data=None, run_dir="runs")
    found = list(modes.measure(options))
    assert found[:2] == kept[:2] and trained == [("async", 0), ("sync", 1), ("async", 1)]


@whole_grid
@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_under_the_real_launcher(tmp_path):
    result = quick_run("modes", tmp_path / "modes.json")
    rows = result["rows"]
    found = [row for row in rows if row["kind"] == "window"]
    assert len(found) == 1 + 3 * 4 and all(row["samples_per_s"] > 0 for row in found)
    assert all(row["stopped_seconds"] >= 1 for row in found if row["situation"] == "stop")
    assert {row["mode"] for row in rows if row["kind"] == "quality"} == {"sync", "diloco", "async"}
    speeds = {(row["mode"], row["link"], row["situation"]): row["bytes_per_sample"] for row in found}
    assert speeds["sync", 1, "even"] > 2 * speeds["diloco", 1, "even"] > 10 * speeds[ALONE, 1, "even"]
    assert result["figures"]["async_share_of_ideal"] > 0 and result["figures"]["diloco_ndcg_ratio"] is not None
