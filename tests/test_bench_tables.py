"""Figures and tables of the benchmarks, as functions of rows."""

from benchmarks import head, quality


def _head_row(peer, tensor=1, positions=256, forward=1.0, backward=2.0, repeat=0, **more):
    place = {"peer": peer, "positions": positions, "hidden": 64, "items": 1_000_000, "tensor": tensor}
    measured = {"forward_s": forward, "backward_s": backward, "peak_extra_gb": 0.03, "loss": 1.0}
    reduces = 0 if tensor == 1 else 3 if peer == "ours" else 513
    return {**place, "repeat": repeat, **measured, "collectives": {"all_reduce": reduces}, "threads": 1, **more}


def _skipped(peer, reason, key="skipped", **place):
    row = _head_row(peer, **place)
    return {name: row[name] for name in ("peer", "positions", "hidden", "items", "tensor")} | {key: reason}


def test_head():
    rows = [_head_row("ours", forward=f, repeat=i) for i, f in enumerate((1.0, 1.2, 3.0))]
    rows += [_head_row("deepspeed", forward=12.0), _skipped("naive", "49 GB of scores, 24 GB are free")]
    rows += [_head_row("ours", tensor=2), _head_row("deepspeed", tensor=2, forward=2.5)]
    rows += [_skipped("naive", "not tensor-parallel", tensor=2)]
    figures = head.figures(rows)
    assert figures["forward_speedup_vs_deepspeed"] == 2.5 and figures["all_reduces_per_step"] == 3
    assert figures["step_time_vs_fastest_peer"] == 3.0 / 4.5 and figures["peak_extra_gb"] == 0.03
    lines = head.table(rows).splitlines()
    assert lines[0].startswith("| positions, hidden size, items | tensor | ours | DeepSpeed | naive | all-reduces")
    reason, first = "49 GB of scores, 24 GB are free", "256, 64, 1,000,000"
    assert lines[2] == f"| {first} | 1 | **1.20 + 2.00** | 12.00 + 2.00 | {reason} |  | 30 MB | 1 to 3, ± 31 % |"
    assert lines[3] == "|  | 2 | **1.00 + 2.00** | 2.50 + 2.00 |  | 3 / 513 | 30 MB | 1 |"


def test_head_without_a_peer_or_without_us(tmp_path):
    """Rows of an interrupted run, or of --peers, still make a table and a plot."""
    alone = [_head_row("ours"), _skipped("deepspeed", "EOFError: ", key="error")]
    assert head.figures(alone)["forward_speedup_vs_deepspeed"] is None and "EOFError" in head.table(alone)
    others = [_head_row("torch"), _skipped("ours", "EOFError: ", key="error", positions=512)]
    assert set(head.figures(others).values()) == {None} and "**1.00 + 2.00**" in head.table(others)
    head.plot(others, tmp_path / "head.png")
    assert (tmp_path / "head.png").stat().st_size > 5000


def _quality_row(seed, hit):
    names = ("HR@5", "NDCG@5", "MRR", "coverage@5")
    trained, popularity = dict.fromkeys(names, hit), dict.fromkeys(names, 0.1)
    row = {"config": "c", "seed": seed, "ranks": 2, "popularity": popularity, "trained": trained}
    return {**row, "protocol": "leave-one-out", "seconds": {"train": 60.0 + seed}}


def test_quality(tmp_path):
    rows = [_quality_row(0, 0.2), _quality_row(1, 0.4)]
    assert round(quality.figures(rows)["trained"]["HR@5"]["spread"], 4) == 0.1414  # of the sample
    table = quality.table(rows)
    assert "| trained | 0.3000 ± 0.1414 |" in table and "| popularity | 0.1000 | 0.1000 |" in table
    assert "c, mean ± standard deviation over seeds 0, 1; training took 60, 61 s on 2 ranks; leave-one-out." in table
    assert "c, seed 0; training took 60 s" in quality.table(rows[:1])
    quality.plot(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000
