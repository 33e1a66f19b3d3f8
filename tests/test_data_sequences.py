"""k-core, splits, windows and their cache."""

import multiprocessing
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_recsys.data import Interactions, ReadReport, build_windows, global_time, k_core, leave_one_out, sequences
from ds_recsys.errors import UserError


def log_of(histories: list[list[int]], times: list[list[int]] | None = None) -> Interactions:
    """Users 0, 1, ... with these histories of model indices; every item up to the largest exists."""
    count = max(map(max, histories))
    return Interactions(
        users=[f"u{u}" for u in range(len(histories))],
        items=[f"i{i}" for i in range(1, count + 1)],
        titles=[f"title {i}" for i in range(1, count + 1)],
        offsets=np.cumsum([0, *map(len, histories)]),
        sequence=np.concatenate(histories).astype(np.int32),
        timestamps=None if times is None else np.concatenate(times),
        report=ReadReport("test"),
    )


logs = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=23), min_size=1, max_size=12).map(log_of)


# --- k-core ---------------------------------------------------------------------------------------------------------


def test_k_core_cascades():
    # Item 3 has one interaction; without it user 1 has one left; without that item 2 has one; and so on to nothing.
    x = log_of([[1, 1, 1], [2, 3], [2, 4, 4]])
    core = k_core(x, 2)
    assert core.users == ["u0", "u2"] and core.items == ["i1", "i4"] and core.titles == ["title 1", "title 4"]
    assert core.sequence.tolist() == [1, 1, 1, 2, 2] and core.offsets.tolist() == [0, 3, 5]
    assert k_core(x, 0) is x
    with pytest.raises(UserError, match="min_count=4"):
        k_core(x, 4)


@settings(deadline=None, max_examples=60)
@given(logs, st.integers(2, 4))
def test_k_core_is_the_largest_fixpoint(x, k):
    kept = [(u, int(i)) for u in range(x.num_users) for i in x.history(u)]
    while True:  # one bad user or item at a time
        bad = next((p for p in kept if min(sum(q[0] == p[0] for q in kept), sum(q[1] == p[1] for q in kept)) < k), None)
        if bad is None:
            break
        drop_user = sum(q[0] == bad[0] for q in kept) < k
        kept = [q for q in kept if (q[0] != bad[0] if drop_user else q[1] != bad[1])]
    if not kept:
        with pytest.raises(UserError):
            k_core(x, k)
        return
    core = k_core(x, k)
    assert [(u, i) for u in core.users for i in core.history_of(u)] == [(f"u{u}", f"i{i}") for u, i in kept]


# --- splits ---------------------------------------------------------------------------------------------------------


def test_leave_one_out():
    x = log_of([[1, 2, 3, 4], [5, 6], [7], [8, 9, 1]])
    split = leave_one_out(x)
    assert split.train_stop.tolist() == [2, 6, 7, 8]
    assert [a.tolist() for a in split.targets("valid")] == [[0, 3], [2, 8]]
    assert [a.tolist() for a in split.targets("test")] == [[0, 3], [3, 9]]
    assert "leave-one-out" in split.describe() and split.hash[:12] in split.describe()
    assert split.hash == leave_one_out(x).hash != leave_one_out(log_of([[1, 2, 3, 4], [5, 6, 7]])).hash


def test_global_time():
    x = log_of([[1, 2, 3, 4, 5], [6, 7], [8, 9, 1]], [[0, 1, 2, 6, 9], [6, 8], [0, 8, 8]])
    # Ten times 0 0 1 2 6 6 8 8 8 9: the newest two are an 8 and the 9, and the tie at 8 is not cut.
    split = global_time(x, valid_fraction=0.4, test_fraction=0.2)
    assert split.train_stop.tolist() == [3, 5, 8] and split.valid_stop.tolist() == [4, 6, 8]
    assert split.test_stop.tolist() == [5, 7, 10]
    users, positions = split.targets("valid")
    assert users.tolist() == [0] and x.sequence[positions].tolist() == [4], "user 1 has no history before its target"
    users, positions = split.targets("test")
    assert users.tolist() == [0, 1, 2] and x.sequence[positions].tolist() == [5, 7, 9]
    with pytest.raises(UserError, match="needs timestamps"):
        global_time(log_of([[1, 2]]))
    with pytest.raises(UserError, match="leaves nothing to train on"):
        global_time(log_of([[1, 2, 3]], [[5, 5, 5]]))
    with pytest.raises(UserError, match="must leave a part"):
        global_time(x, valid_fraction=0.5, test_fraction=0.5)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9).map(sorted), min_size=2, max_size=9))
def test_global_time_never_trains_on_the_future(times):
    x = log_of([list(range(1, len(t) + 1)) for t in times], times)
    try:
        split = global_time(x, valid_fraction=0.25, test_fraction=0.25)
    except UserError:
        return
    parts = [
        np.concatenate([x.timestamps[a:b] for a, b in zip(first, last, strict=True)])
        for first, last in (
            (x.offsets[:-1], split.train_stop),
            (split.train_stop, split.valid_stop),
            (split.valid_stop, split.test_stop),
        )
    ]
    assert sum(map(len, parts)) == len(x)
    assert parts[0].max() < min(parts[1], key=int, default=99) and max(parts[1], default=-1) < parts[2].min()


# --- windows --------------------------------------------------------------------------------------------------------


def test_windows_by_example(tmp_path):
    x = log_of([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3], [4]])
    split = leave_one_out(x)  # user 0 trains on 1..8, user 1 on one item only
    rows = build_windows(x, split, max_length=3, cache_dir=tmp_path)
    assert [r["items"] for r in rows] == [[5, 6, 7, 8], [2, 3, 4, 5], [1, 2]] and rows["context"][:] == [0, 0, 0]
    rows = build_windows(x, split, max_length=3, stride=2, cache_dir=tmp_path)
    assert [r["items"] for r in rows] == [[5, 6, 7, 8], [3, 4, 5, 6], [1, 2, 3, 4]] and rows["context"][:] == [1, 1, 0]
    rows = build_windows(x, split, max_length=3, recent_only=True, cache_dir=tmp_path)
    assert [r["items"] for r in rows] == [[5, 6, 7, 8]] and rows["user"][:] == [0] and rows["context"][:] == [0]
    with pytest.raises(UserError, match="no user has two training"):
        build_windows(log_of([[1, 2, 3]]), leave_one_out(log_of([[1, 2, 3]])), max_length=3, cache_dir=tmp_path)
    for wrong in ({"max_length": 0}, {"stride": 4}, {"stride": 2, "recent_only": True}):
        with pytest.raises(UserError):
            build_windows(x, split, **{"max_length": 3, **wrong}, cache_dir=tmp_path)


@settings(deadline=None, max_examples=150)
@given(logs, st.integers(1, 8), st.data())
def test_windows_supervise_each_position_once(x, max_length, data):
    stride = data.draw(st.none() | st.integers(1, max_length))
    split = leave_one_out(x)
    if (split.train_stop - x.offsets[:-1]).max() < 2:
        return
    table = sequences._window_table(x, split, max_length, stride or max_length, recent_only=False)
    seen = {u: [] for u in range(x.num_users)}
    for row in table.to_pylist():
        u, items, context = row["user"], row["items"], row["context"]
        history = x.sequence[x.offsets[u] : split.train_stop[u]].tolist()
        end = len(history) - len(seen[u])  # newest window first: the supervised positions grow downwards
        fresh = len(items) - 1 - context
        assert 2 <= len(items) <= max_length + 1 and fresh >= 1
        assert items == history[end - len(items) : end], "a run of the history that ends where the newer one began"
        full = len(items) == max_length + 1
        assert full or end == len(items), "only the oldest window is short"
        seen[u] += range(end - 1, end - 1 - fresh, -1)
    for u, positions in seen.items():
        count = int(split.train_stop[u] - x.offsets[u])
        assert positions == list(range(count - 1, 0, -1))


def test_windows_are_mapped_and_cached(tmp_path, monkeypatch):
    builds = []
    table = sequences._window_table
    monkeypatch.setattr(sequences, "_window_table", lambda *a: builds.append(a) or table(*a))
    x = log_of([[1, 2, 3, 4, 5, 6]])

    def build(log=x, **options):
        return build_windows(log, leave_one_out(log), **{"max_length": 3, "cache_dir": tmp_path, **options})

    first, again = build(), build()
    assert len(builds) == 1 and first[:] == again[:] and first._fingerprint == again._fingerprint
    assert [f["filename"] for f in first.cache_files] == [str(p) for p in tmp_path.glob("windows-*.arrow")]
    others = [
        build(log_of([[1, 2, 3, 4, 6, 5]])),
        build(log_of([[1, 2, 3, 4, 5, 6, 6]])),
        build(max_length=2),
        build(stride=1),
        build(recent_only=True),
    ]
    assert len(builds) == 6 and len({other._fingerprint for other in [first, *others]}) == 6
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    x = log_of([[1, 2, 3, 4, 5, 6]])
    monkeypatch.setattr(sequences.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build_windows(x, leave_one_out(x), max_length=3, cache_dir=tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob("*.partial"))
    assert len(build_windows(x, leave_one_out(x), max_length=3, cache_dir=tmp_path)) == 1


def test_a_damaged_cache_is_named(tmp_path):
    x = log_of([[1, 2, 3, 4, 5, 6]])
    build_windows(x, leave_one_out(x), max_length=3, cache_dir=tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{path}: the cached windows are damaged .*delete the file"):
        build_windows(x, leave_one_out(x), max_length=3, cache_dir=tmp_path)


def test_concurrent_builds_make_one_file(tmp_path, monkeypatch):
    x = log_of([list(range(1, 30)), list(range(5, 50))])
    table = sequences._window_table

    def slow(*args):
        with open(tmp_path / "builds", "a") as file:
            file.write("x")
        time.sleep(0.3)
        return table(*args)

    monkeypatch.setattr(sequences, "_window_table", slow)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()

    def build():
        barrier.wait(20)
        windows = build_windows(x, leave_one_out(x), max_length=5, cache_dir=tmp_path)
        results.put((windows._fingerprint, windows["items"][:]))

    ranks = [context.Process(target=build) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=20) for _ in ranks]
    for rank in ranks:
        rank.join(20)
        assert rank.exitcode == 0
    assert found[0] == found[1] == found[2]
    assert (tmp_path / "builds").read_text() == "x", "one rank builds, the others wait"
