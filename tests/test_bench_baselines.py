"""launch/bench.py baselines: the report as a function of the rows, the mailbox, and a smoke run on a real simulated cluster."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import baselines, baselines_report
from benchmarks.mailbox import Mailbox, check, serve

from ds_recsys import UserError
from ds_recsys.simulation import network
from ds_recsys.simulation.cgroups import CpuController

ROOT = Path(__file__).parents[1]
obstacle = network.missing() or (None if CpuController.find() else "a cpu controller")


def step(mode, m, seconds, ratio=1.0, repeat=0, **more):
    place = {"kind": "step", "topology": "2x2", "items": 1682, "mode": mode, "micro_batches": m, "repeat": repeat}
    return {
        **place,
        "seconds": seconds,
        "ratio": ratio,
        "preset": "p",
        "sent_bytes": {"host0": 2e6, "host1": 3e6},
        **more,
    }


def ideal(m, seconds):
    place = {"kind": "step", "topology": "2x2", "items": 1682, "mode": "ideal", "micro_batches": m, "repeat": 0}
    return {**place, "seconds": 4 * seconds, "ideal_seconds": seconds}


SPLIT = {"compute": 0.9, "pipeline": 0.8, "gradients": 0.2, "tensor": 0.0, "optimizer": 0.1, "other": 0.0}
ROWS = [
    {"kind": "calibration", "what": "host0 up", "expected": 100.0, "measured": 97.0},
    ideal(4, 1.0),
    ideal(16, 1.2),
    *(step("pipeline", 4, seconds, repeat=i, split=SPLIT, busy=0.45) for i, seconds in enumerate((2.0, 1.9, 2.1))),
    step("pipeline", 16, 1.5, split=SPLIT, busy=0.45),
    step("data, DDP", 4, 4.0),
    step("data, DDP", 16, 1e9, ratio=4.0),
    step("hybrid, DeepSpeed", 4, 1.6, split=SPLIT, busy=0.45),
]


def test_shares_are_of_the_ideal_at_the_same_number_of_micro_batches_and_the_best_mode_counts():
    figures = baselines.figures(ROWS)
    assert figures["best_single_share_of_ideal"]["2x2, 1,682 items, 1x"] == pytest.approx(1.2 / 1.5)
    assert figures["deepspeed_hybrid_share_of_ideal"] == {"2x2, 1,682 items, 1x": pytest.approx(1 / 1.6)}
    assert figures["calibration_worst"] == pytest.approx(0.03)
    assert figures["spread_max"] == pytest.approx(0.05)


def test_the_table_holds_seconds_and_shares_and_where_the_time_goes():
    table = baselines.table(ROWS)
    assert "| 2 hosts x 2 devices | 1,682 | pipeline | 2.00 (50%) | 1.50 (80%) |" in table
    assert (
        "| 2 hosts x 2 devices | 1,682 | pipeline | 16 | 0.90 | 0.80 | 0.20 | 0.00 | 0.10 | 0.00 | 45% | 3 |" in table
    )


def test_the_plot_is_written(tmp_path):
    baselines.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_an_arm_that_failed_leaves_its_cells_empty():
    rows = [*ROWS, {**step("tensor", 4, 0.0), "error": "RuntimeError: it ended"}]
    assert baselines.figures(rows) == baselines.figures(ROWS)


def test_requests_reach_every_rank_in_order_and_answers_come_back_in_rank_order(tmp_path):
    threads = [
        threading.Thread(
            target=serve, args=(tmp_path, rank, lambda request, rank=rank: {"value": request["n"] * 10 + rank})
        )
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    mail = Mailbox(tmp_path, 3, alive=lambda: None)
    for n in range(4):
        assert mail.ask({"n": n}, 10) == [{"value": n * 10 + rank} for rank in range(3)]
    mail.ask({"stop": True}, 10)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_rank_that_does_not_answer_is_named_and_a_dead_job_is_noticed(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] have not answered"):
        Mailbox(tmp_path / "a", 2, alive=lambda: None).ask({}, 0.2)

    def dead():
        raise RuntimeError("the job has ended")

    with pytest.raises(RuntimeError, match="has ended"):
        Mailbox(tmp_path / "b", 2, alive=dead).ask({}, 60)


def test_a_job_that_ended_is_one_line(tmp_path):
    (tmp_path / "0").write_text("starts\nwants more\n")
    logs = lambda rank: tmp_path / str(rank)  # noqa: E731
    assert check(SimpleNamespace(poll=lambda: None), "the arm", 2) is None
    for status, words in (
        (1, ""),
        (137, ", killed, most often for want of memory: free some, or measure fewer modes at once"),
    ):
        with pytest.raises(UserError) as raised:
            check(SimpleNamespace(poll=lambda status=status: status, log=logs), "the arm", 2)
        assert str(raised.value) == f"the arm ended with status {status}{words} (rank 0: wants more)"


@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_under_the_real_launcher_measures_every_mode(tmp_path):
    file, env = tmp_path / "baselines.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch/bench.py"), "baselines", "--quick", "--json", str(file)]
    done = subprocess.run([*command, "--traces", str(tmp_path)], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert {row["mode"] for row in steps} == {"ideal", "data, DDP", "pipeline"}
    assert not [row for row in steps if "error" in row]
    sent = {row["mode"]: max(row["sent_bytes"].values()) for row in steps if row["micro_batches"] == 4}
    gradients = 4 * steps[0]["parameters"] * 1.5
    assert gradients < sent["data, DDP"] < 1.2 * gradients  # a ring of four sends 2 x 3/4 of them
    assert sent["ideal"] < 0.05 * gradients  # nothing but idle chatter
    traces = list(tmp_path.glob("2x2-1682-pipeline-*.json"))
    assert len(traces) == 2
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert len({event["pid"] for event in events if event["name"].startswith("forward")}) == 4
    assert baselines_report.table(rows)
