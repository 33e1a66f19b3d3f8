"""launch/bench.py compression: the report as a function of the rows, the check of every sum, and a smoke run."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_runs import whole_grid
from benchmarks import (
    compression,
    compression_links,
    compression_rank,
    compression_training,
    compression_training_report,
)
from benchmarks.compression_arms import AllReduce, BFloat16Hook, Compressed, PowerSGDHook, Values
from benchmarks.compression_methods import DENSE, HIERARCHY, METHODS, OURS, TITLES, rounds, title
from distributed import distributed

from ds_recsys.simulation import network
from ds_recsys.simulation.cgroups import CpuController

ROOT = Path(__file__).parents[1]
obstacle = network.missing() or (None if CpuController.find() else "a cpu controller")


def run(method, seconds, link="1gbit", topology="4x1", repeat=0, sent=30e6, **more):
    rate = compression_links.LINKS[link]
    wire = sent * 8 / rate if rate else None
    return {
        **{"kind": "run", "topology": topology, "link": link, "group": 0, "speed": 0.5, "method": method},
        **{"repeat": repeat, "seconds": seconds, "bytes": sent, "interface_bytes": sent, "wire_seconds": wire},
        **{"wire_fraction": wire and wire / seconds, **more},
    }


def check(method, error, **more):
    place = {"kind": "check", "topology": "4x1", "link": "1gbit", "group": 0, "method": method}
    return {**place, "relative_error": error, "expected_error": error, "limit": 1.0, "choice": None, **more}


RUNS = [
    *(run("dense", seconds, repeat=i, sent=150e6) for i, seconds in enumerate((1.25, 1.3, 2.5))),
    *(run("int8", seconds, repeat=i) for i, seconds in enumerate((0.3, 0.325, 0.75))),
    run("int4", 0.2, sent=15e6),
    *(run(name, seconds, link) for link, times in (("100mbit", (10.0, 1.4)), ("10gbit", (0.5, 0.5)))
      for name, seconds in zip(("dense", "int4"), times, strict=True)),
    *(run(name, seconds, link) for link, auto in (("10gbit", 0.505), ("loopback", 0.49))
      for name, seconds in (("dense", 0.5), ("auto", auto))),
    *(run(name, seconds, topology="2x2") for name, seconds in (
        ("dense", 1.3), ("int8_flat", 0.6), ("int8_hierarchical", 0.4), ("int4_flat", 0.4), ("int4_hierarchical", 0.3))),
]  # fmt: skip
ROWS = [
    *({"kind": "kernel", "method": "int8", "values": 9, "repeat": i, "gb_per_s": v} for i, v in enumerate((6, 7, 9))),
    {"kind": "kernel", "method": "int4", "values": 9, "repeat": 0, "gb_per_s": 5.5},
    {"kind": "kernel", "method": "topk", "values": 9, "repeat": 0, "gb_per_s": 1.5},
    check("int8", 5e-5),
    check("int8", 7e-5, link="100mbit"),
    check("auto", 1e-15, choice="fp32, for 4 values"),
    *RUNS,
]


def test_the_figures_have_the_names_of_the_claims_and_pair_each_time_with_the_dense_one_of_its_round():
    figures = compression.figures(ROWS)
    assert figures == {
        "int8_vs_dense_1gbit": pytest.approx(0.25),  # the median of 0.24, 0.25, 0.3; the medians' ratio is the same
        "int4_vs_dense_1gbit": pytest.approx(0.16),
        "int8_wire_fraction_1gbit": pytest.approx(0.24 / 0.325),
        "int4_wire_fraction_1gbit": pytest.approx(0.6),
        "int4_vs_dense_100mbit": pytest.approx(0.14),
        "hierarchical_speedup": pytest.approx(4 / 3),  # the lower one of int8 and int4
        "auto_vs_dense_fast": pytest.approx(1.01),
        "quantise_gb_per_s": 5.5,
    }


def test_a_slow_round_is_compared_with_itself():
    rows = [run("dense", s, repeat=i) for i, s in enumerate((1.0, 3.0, 1.0))]
    rows += [run("auto", s, repeat=i) for i, s in enumerate((1.5, 3.0, 0.5))]
    assert compression.figures(rows)["auto_vs_dense_fast"] is None
    ratio = compression.compression_report.ratios(rows)
    assert ratio["4x1", "1gbit", "auto"] == pytest.approx(1.0)
    assert ratio["4x1", "1gbit", "dense"] == 1.0


def test_each_group_of_arms_is_compared_with_its_own_dense_one():
    rows = [run("dense", 1.0), run("int8", 0.5), run("dense", 2.0, group=1), run("int4", 0.5, group=1)]
    ratio = compression.compression_report.ratios(rows)
    assert (ratio["4x1", "1gbit", "int8"], ratio["4x1", "1gbit", "int4"]) == (0.5, 0.25)


def test_the_tables_show_times_shares_wire_fractions_errors_choices_and_failures():
    failed = {**check("sign", 0), "error": "sign: the ranks' results differ"}
    table = compression.table([*ROWS, failed])
    assert "| int8 | 30.0 | 7e-05 |  | 0.325 (0.250), 0.74 |  |  |" in table
    assert "| int8, hierarchical | 30.0 | 0 | 0.400 (0.308), 0.60 |" in table
    assert "| int8 | 7.0 |" in table and '"auto" on 4 hosts x 1 rank, 1 Gbit/s: fp32' in table
    assert "sign: the ranks' results differ" in table


def test_a_failed_arm_leaves_only_its_own_cells_empty():
    place = {"kind": "run", "topology": "4x1", "link": "1gbit", "group": 0, "speed": 0.5, "repeat": 3}
    rows = [*ROWS, *({**place, "method": method, "error": "RuntimeError: it ended"} for method in (DENSE, "sign"))]
    assert "sign" not in compression.table(ROWS) and "it ended" in compression.table(rows)
    assert compression.figures(rows) == compression.figures(ROWS)


def test_the_plot_is_written(tmp_path):
    compression.plot(ROWS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_every_method_has_a_dense_one_beside_it_and_a_name():
    groups = rounds([*METHODS, DENSE])
    assert [name for group in groups for name in group if name != DENSE] == list(METHODS)
    assert all(group[0] == DENSE and len(group) <= 5 for group in groups)
    assert len({title(name) for name in (*METHODS, *HIERARCHY)}) == len(METHODS) + len(HIERARCHY)
    assert set(TITLES) <= {DENSE, *METHODS}


def test_the_options_are_those_of_the_configuration():
    from ds_recsys.config.compression import Compression

    for options in {**OURS, **HIERARCHY}.values():
        Compression(**options)


def test_values_are_the_same_on_all_ranks_times_powers_of_two_whose_sum_is_one():
    ranks = [Values(2_500_000, rank, 4) for rank in range(4)]
    total = sum(values.mine for values in ranks)
    for values in ranks:
        assert torch.equal(values.mine * values.total, total)
        assert values.errors(total) == (0.0, 0.0)
    assert ranks[0].tensors == [("weight0", (1000, 1000)), ("weight1", (1000, 1000)), ("rest", (500_000,))]
    wrong, lost = ranks[0].errors(total * 0.5)
    assert (wrong, lost) == (pytest.approx(0.25), pytest.approx(0.75))


@distributed(data=4)
def test_a_dense_sum_and_those_of_torchs_hooks_are_right():
    values = _values()
    buffer = torch.empty_like(values.mine)
    kinds = {DENSE: AllReduce, "ddp_bf16": BFloat16Hook, "ddp_powersgd": PowerSGDHook}
    arms = {name: kind(values, buffer) for name, kind in kinds.items()}
    mine = values.mine.clone()
    for _ in range(2):
        for name, arm in arms.items():
            found = compression_rank.check(arm, values, name, {})
            assert "wrong" not in found, found
    assert torch.equal(values.mine, mine)  # no arm has changed what it was given
    assert arms[DENSE].bytes_sent == 2 * 2 * 3 * values.mine.numel() * 4 // 4


@distributed(data=4)
def test_every_compressor_of_ours_leaves_the_error_that_it_has_on_one_rank():
    values = _values()
    buffer = torch.empty_like(values.mine)
    for name, options in OURS.items():
        if name == "auto":
            continue
        found = compression_rank.check(Compressed(values, buffer, options), values, name, options)
        assert "wrong" not in found, (name, found)


@distributed(data=2)
def test_a_rank_that_is_left_out_a_wrong_scale_and_a_zero_are_noticed():
    values = _values()
    for method in ("int8", "topk", "sign", "powersgd"):
        for damage in (_OneRankOnly, _Twice, _Zero):
            arm = damage(values, torch.empty_like(values.mine), OURS[method])
            found = compression_rank.check(arm, values, method, OURS[method])
            assert "wrong" in found, (method, damage)


class _OneRankOnly(Compressed):
    def reduce(self):
        self.total.mul_(0 if torch.distributed.get_rank() == 1 else 1)
        super().reduce()


class _Twice(Compressed):
    def reduce(self):
        super().reduce()
        self.total.mul_(1.5)


class _Zero(Compressed):
    def reduce(self):
        super().reduce()
        self.total.zero_()


def _values():
    return Values(1_300_000, torch.distributed.get_rank(), torch.distributed.get_world_size())


def quality(method, seed, loss, ndcg=0.1, **more):
    return {
        **{"kind": "quality", "method": method, "seed": seed, "ranks": 4, "epochs": None, "steps": 50},
        **{"train_seconds": 9.0, "valid_loss": loss, "train_loss": 2 * loss, "ndcg": ndcg, "hit_rate": 0.2},
        **{"loss_bin": 20, "losses": [7.0, 6.0, 5.0], **more},
    }


def step(method, seconds, repeat=0, group=0, sent=2e5):
    row = {"arm": method, "repeat": repeat, "seconds": seconds, "sent_bytes": {"host0": 10 * sent, "host1": 0}}
    return compression_training._step_row(row, group, 16)


TRAINED = [
    {"kind": "workload", "hosts": 4, "parameters": 250_000, "compute_seconds": 0.05, "rate": 2.4e8},
    *(step("dense", seconds, repeat=i, sent=1.5e6) for i, seconds in enumerate((0.1, 0.2))),
    *(step("int8", seconds, repeat=i) for i, seconds in enumerate((0.05, 0.08))),
    *(quality("dense", seed, loss, 0.11 + 0.01 * seed) for seed, loss in enumerate((5.0, 6.0))),
    *(quality("int8", seed, loss) for seed, loss in enumerate((5.05, 6.06))),
    {"kind": "quality", "method": "sign", "seed": 0, "error": "it diverged"},
]


def test_the_training_figures_pair_seeds_and_rounds():
    assert compression.figures(TRAINED) == {
        "ndcg_dense": pytest.approx(0.115),
        "ndcg_int8": pytest.approx(0.1),
        "loss_ratio_int8": pytest.approx(1.01),
        "train_loss_ratio_int8": pytest.approx(1.01),
        "ndcg_seed_noise": pytest.approx(0.01 / 2**0.5),
        "samples_per_s_ratio_int8": pytest.approx(2.25),
    }


def test_the_training_table_and_plot(tmp_path):
    table = compression.table(TRAINED)
    assert "| int8 | 260 | 2.25 | 0.200 | 5.5550 ± 0.7142 | +1.00% | +1.00% | 0.1000 ± 0.0000 |" in table
    assert "links of 240 Mbit/s" in table and "it diverged" in table
    compression.plot(TRAINED, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_losses_are_thinned_and_drawn_at_the_step_they_end_at():
    assert compression_training.thin([1, 2, 3, 4, 6], 2) == [1.5, 3.5, 6]
    steps, losses = compression_training_report.curve([quality("a", 0, 1), quality("a", 1, 1, losses=[5, 4, 3])], 2)
    assert (steps, losses) == ([40, 50], [5.5, 4.5])


def test_dense_communication_takes_as_long_as_compute_on_the_chosen_link():
    rate = compression_training.link_rate(250_000, 0.05, 4)
    assert rate * 0.05 / 8 == pytest.approx(1.5 * 1e6)  # a ring of four sends 1.5 times the gradients


def test_a_method_is_plain_data_parallelism_with_its_compression():
    found = compression_training.settings(ROOT / "ds_configs/quickstart.json", "topk_int8", 4)
    assert found["train_micro_batch_size_per_gpu"] == 4 and found["zero_optimization.stage"] == 0
    assert found["recsys.compression.method"] == "topk" and found["recsys.compression.values"] == "int8"
    dense = compression_training.settings(ROOT / "ds_configs/quickstart.json", DENSE, 2)
    assert dense["train_micro_batch_size_per_gpu"] == 8 and not [key for key in dense if "compression" in key]


def test_resuming_takes_over_whole_trainings_that_fit(tmp_path, monkeypatch):
    file, trained = tmp_path / "result.json", []
    rows = [quality("dense", 0, 5.0), quality("int8", 0, 5.0, ranks=2), {**quality("dense", 1, 0), "error": "e"}]
    file.write_text(json.dumps({"benchmark": "compression", "rows": rows}))
    monkeypatch.setattr(compression_training, "_speed", lambda *_: iter(()))
    monkeypatch.setattr(
        compression_training, "_train", lambda config, method, seed, options: trained.append((method, seed)) or {}
    )
    options = argparse.Namespace(
        quick=False, methods=["int8", "auto"], seeds=[0, 1], ranks=4, epochs=None, resume=str(file), part="training"
    )
    found = list(compression.measure(options))
    assert found == [rows[0], {}, {}, {}]
    assert trained == [("int8", 0), ("dense", 1), ("int8", 1)]


def _quick(tmp_path, *arguments):
    file, env = tmp_path / "compression.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch/bench.py"), "compression", "--quick", "--json", str(file), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(file.read_text())


@whole_grid
@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_of_the_communication_under_the_real_launcher(tmp_path):
    result = _quick(tmp_path)
    rows = result["rows"]
    assert not [row for row in rows if "error" in row]
    runs = {(row["link"], row["method"]): row for row in rows if row["kind"] == "run"}
    assert {method for _, method in runs} == {"dense", "int8", "int4", "auto", "ddp_powersgd"}
    assert {link for link, _ in runs} == {"1gbit", "loopback"}
    sent = runs["1gbit", "dense"]["interface_bytes"] / runs["1gbit", "dense"]["bytes"]
    assert 1 < sent < 1.05
    assert 0.25 < runs["1gbit", "int8"]["interface_bytes"] / runs["1gbit", "dense"]["interface_bytes"] < 0.27
    assert result["figures"]["int8_vs_dense_1gbit"] > 0


@whole_grid
@pytest.mark.skipif(obstacle is not None, reason=f"a simulated cluster needs {obstacle}")
def test_a_smoke_run_of_the_training_under_the_real_launcher(tmp_path):
    rows = _quick(tmp_path, "--part", "training")["rows"]
    assert not [row for row in rows if "error" in row]
    assert {(row["kind"], row.get("method")) for row in rows} == {
        ("workload", None), ("step", "dense"), ("step", "int8"), ("quality", "dense"), ("quality", "int8")
    }  # fmt: skip
    trained = [row for row in rows if row["kind"] == "quality"]
    assert [len(row["losses"]) for row in trained] == [1, 1] and all(row["ndcg"] >= 0 for row in trained)
