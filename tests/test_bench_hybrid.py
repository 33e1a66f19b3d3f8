"""launch/bench.py hybrid: its figures as a function of the rows, what it switches off, a smoke run on a cluster."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from bench_runs import quick_run, whole_grid
from benchmarks import hybrid, hybrid_ablation, hybrid_report, hybrid_scaling

from ds_recsys.simulation import network
from ds_recsys.simulation.cgroups import CpuController

obstacle = network.missing() or (None if CpuController.find() else "a cpu controller")
PLAN = {
    "recsys.pipe": 2,
    "recsys.data": 2,
    "recsys.tensor": 1,
    "recsys.compression.method": "int8",
    "recsys.data_parallel.mode": "sync",
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "recsys.partition.bounds": [0, 4, 9],
    "optimizer.params.fused": True,
}


def _step(mode, seconds, *, m=4, items=1682, ratio=1.02, busy=None, repeat=0):
    place = {"kind": "step", "topology": "2x2", "items": items, "ratio": ratio, "mode": mode, "micro_batches": m}
    measured = {"ideal_seconds": seconds} if mode == "ideal" else {"seconds": seconds, "busy": busy}
    return {**place, "repeat": repeat, "seconds": seconds, **measured}


def _cell(single, vanilla, ours, **where):
    return [
        _step("ideal", 1.0, **where),
        _step("ideal", 1.2, **{**where, "m": 16}),
        _step("pipeline", 1.1 * single, **where, busy=0.5),
        *(_step("pipeline", seconds, **{**where, "m": 16}, busy=0.6) for seconds in (0.9 * single, single, 3 * single)),
        _step("data, DDP", 2 * single, **where),
        _step("hybrid, DeepSpeed", vanilla, **where, busy=0.4),
        _step("ours", ours, **where, busy=0.9),
    ]


ROWS = [
    {"kind": "plan", "topology": "2x2", "items": 1682, "ratio": 1.02, "preset": "p", "values": PLAN},
    *_cell(1.4, 1.5, 1.1),
    *_cell(4.0, 3.0, 1.6, ratio=4.06),
    *_cell(2.5, 2.8, 1.25, items=100_000),
    *({**_step(mode, took), "kind": "ablation", "group": 0} for mode, took in (("ours", 1.0), ("compression", 1.5))),
    {"kind": "ablation", "topology": "2x2", "items": 1682, "ratio": 1.02, "mode": "whole", "values": PLAN},
]


def test_figures_are_the_worst_over_the_cells_each_mode_at_its_best():
    figures = hybrid.figures(ROWS)
    assert figures["min_share_of_ideal"] == pytest.approx(1 / 1.6)
    assert figures["min_ratio_to_best_single"] == pytest.approx(1.4 / 1.1)
    single, ours = 1 / 4.0, 1 / 1.6
    assert figures["gap_closed_min"] == pytest.approx((ours - single) / (1 - single))
    assert figures["ratio_to_best_single_where_room"] == pytest.approx(2.0)  # of 4.0 / 1.6 and 2.5 / 1.25
    assert figures["heavy_ratio_to_best_single"] == pytest.approx(2.0)
    assert figures["ratio_to_vanilla_4x"] == pytest.approx(3.0 / 1.6)
    assert figures["busy_ratio_to_best_single"] == pytest.approx(0.9 / 0.6)


def test_ranking_figures_are_compared_in_the_noise_of_the_dense_ones():
    def trained(mode, ndcg, seed):
        return {"kind": "quality", "mode": mode, "method": "none", "seed": seed, "valid": [6.0], "ndcg": ndcg}

    dense = [trained("sync", value, seed) for seed, value in enumerate((0.07, 0.08, 0.09))]
    late = [trained("delayed", value, seed) for seed, value in enumerate((0.07, 0.075, 0.08))]
    rows = [*ROWS, *dense, *late]
    assert hybrid.figures(rows)["ndcg_off_in_seed_noise"] == pytest.approx(0.5)
    assert hybrid.figures(ROWS)["ndcg_off_in_seed_noise"] is None
    assert "| delayed | 6.0000 ± 0.0000 | 0.0750 ± 0.0050 |" in hybrid.table(rows)


def test_in_equal_time_a_slower_mode_has_made_fewer_steps():
    def trained(method, validations):
        row = {"kind": "quality", "mode": "sync", "method": method, "seed": 0, "steps": 40, "valid": [6.0], "ndcg": 0.1}
        return {**row, "valid_ndcg": validations}

    rows = [*ROWS, trained("none", [0.01, 0.02, 0.03, 0.04]), trained("int8", [0.011, 0.021, 0.031, 0.041])]
    table = hybrid.table(rows)  # 1.1 s a step of ours, 1.4 s of the pipeline
    assert "| 2 hosts x 2 devices | 1.02x | pipeline 79% | 0.0314 | 0.0410 |" in table
    assert table.count("| pipeline 79% |") == 1  # no other cell has a plan
    assert "In equal time" not in hybrid.table(ROWS) and "In equal time" not in hybrid.table(rows[:-1])


def test_a_cell_without_ours_counts_for_nothing():
    rows = [*ROWS, _step("ideal", 1.0, ratio=0.25), _step("pipeline", 1.1, ratio=0.25)]
    assert hybrid.figures(rows) == hybrid.figures(ROWS)
    assert hybrid.figures([_step("pipeline", 1.0)])["min_share_of_ideal"] is None


def test_the_table_names_what_was_chosen_and_what_each_part_gives():
    table = hybrid.table(ROWS)
    assert (
        "| 2 hosts x 2 devices | 1,682 | 1.02x | 1.00 | pipeline 1.40 | 1.50 | **1.10** | 91% | 1.27 | 1.36 |" in table
    )
    assert "| 2 hosts x 2 devices | 1,682 | 1.02x | pipe 2 x data 2 x tensor 1, 8 of 4, int8, sync |" in table
    assert "| 2 hosts x 2 devices | 1,682 | 1.02x | compression | 1.50 | 1.50 |" in table


def test_the_plot_is_written(tmp_path):
    hybrid.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_what_is_switched_off_is_what_the_plan_uses():
    spec = SimpleNamespace(hosts=[SimpleNamespace(speeds=(0.4, 0.4))] * 2)
    # its replicas share a host: nothing is summed across
    assert set(hybrid_ablation.without(PLAN, spec)) == {"compression", "overlap", "measured cut", "grid", "fused AdamW"}
    assert "early head" in hybrid_ablation.without({**PLAN, "recsys.pipe": 1}, spec)
    late = {**PLAN, "recsys.pipe": 1, "recsys.data": 4, "recsys.data_parallel.mode": "delayed"}
    assert set(hybrid_ablation.without(late, spec)) == {"compression", "delay", "sums within hosts", "fused AdamW"}
    uneven = hybrid_ablation.without({**late, "recsys.data_shares": [5, 5, 5, 1]}, spec)
    assert uneven["parts by speed"] == {"recsys.data_shares": None}
    slow_link = hybrid_ablation.without({**late, "recsys.compression.owner_shares": [1, 1, 1, 0]}, spec)
    assert slow_link["owners by link"] == {"recsys.compression.owner_shares": None}
    plain = {
        **PLAN,
        "recsys.pipe": 1,
        "recsys.data": 4,
        "recsys.compression.method": "none",
        "optimizer.params.fused": False,
    }
    assert hybrid_ablation.without(plain, spec) == {}
    whole = hybrid_ablation.without(PLAN, spec)["grid"]
    assert whole["recsys.data"] == 4 and whole["train_micro_batch_size_per_gpu"] == 16


def test_scaling_has_the_same_links_for_all_numbers_of_devices(monkeypatch):
    four, eight = ({"rank_seconds": [seconds] * n, "parameters": 1000} for n, seconds in ((4, 4.0), (8, 8.0)))
    assert hybrid_scaling.link_rate(eight, batch=128) == pytest.approx(hybrid_scaling.link_rate(four, batch=64))
    used = []
    monkeypatch.setattr(hybrid_scaling, "_on", lambda *arguments: used.append(arguments[4]) or [])
    monkeypatch.setattr(hybrid_scaling, "Arms", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("ds_recsys.simulation.Cluster", lambda _: contextlib.nullcontext())
    links = {"kind": "scaling", "growth": "weak", "devices": 4, "batch": 64, "mode": "links", "rate": 5.0}
    list(hybrid_scaling.scaling(SimpleNamespace(devices=[8]), [links]))
    assert used == [None, 5.0]  # strong, weak


def test_a_part_shows_what_was_kept_of_the_others_and_only_whole_cells(tmp_path):
    cells = [{**row, "preset": "p"} for row in ROWS[1:4]]
    whole = {"kind": "whole", "topology": "2x2", "items": 1682, "ratio": 1.02, "preset": "p"}
    broken = [_step("ideal", 1.0, items=100_000)]
    parts = [{"kind": "ablation", "topology": "2x2", "items": 1682, "preset": "p"}]
    scaled = [{"kind": "scaling", "growth": "weak", "devices": 2, "batch": 32, "mode": "whole"}]
    trained = [{"kind": "quality", "mode": "sync", "method": "none", "seed": 0, "ranks": 4, "epochs": 2, "ndcg": 0.1}]
    file = tmp_path / "hybrid.json"
    file.write_text(json.dumps({"benchmark": "hybrid", "rows": [*cells, whole, *broken, *parts, *scaled, *trained]}))
    options = SimpleNamespace(
        resume=file, quick=False, part=["quality"], topologies=["2x2"], items=[1682], presets=["p"], seeds=[0], epochs=2
    )
    assert list(hybrid.measure(options)) == [*cells, whole, *parts, *scaled, *trained]


def test_what_has_no_clusters_has_no_plot(tmp_path):
    hybrid.plot([{"kind": "scaling", "growth": "weak", "devices": 2, "batch": 32, "mode": "whole"}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    hybrid.plot(ROWS, tmp_path / "b.png")
    assert (tmp_path / "b.png").exists()


@whole_grid
@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_compares_what_the_rule_chose(tmp_path):
    result = quick_run("hybrid", tmp_path / "hybrid.json")
    (plan,) = [row for row in result["rows"] if row["kind"] == "plan"]
    assert plan["reason"].startswith("parallel auto: pipe")
    values = plan["values"]
    assert values["recsys.pipe"] * values["recsys.data"] * values["recsys.tensor"] == 4
    modes = {row["mode"] for row in result["rows"] if row["kind"] == "step"}
    assert {"ideal", "data, DDP", "pipeline", "ours"} <= modes
    assert result["figures"]["min_share_of_ideal"] > 0
    assert hybrid_report.table(result["rows"])
