"""Interleaved repeats: the order, what an arm that fails costs, the spread."""

import sys
import time

import pytest
from benchmarks.repeats import groups, interleaved, median, spread


class _Arms(dict):
    """Arms that note their turn; those named in `broken` raise at their n-th call."""

    def __init__(self, names, **broken):
        self.order = []
        super().__init__({name: self._arm(name, broken.get(name)) for name in names})

    def _arm(self, name, fails_at):
        def call():
            self.order.append(name)
            if self.order.count(name) == fails_at:
                raise ValueError(f"{name} is broken")
            return {"call": len(self.order)}

        return call


def test_arms_take_turns_in_a_rotating_order():
    arms = _Arms("ABC")
    rows = list(interleaved(arms, 4, warmup=0))
    assert "".join(arms.order) == "ABCBCACABABC"
    assert rows[3] == {"arm": "B", "repeat": 1, "call": 4} and len(rows) == 12


def test_the_warm_up_is_dropped():
    arms = _Arms("AB")
    rows = list(interleaved(arms, 2))
    assert len(arms.order) == 6 and [row["arm"] for row in rows] == ["A", "B", "B", "A"]
    assert [row["call"] for row in rows] == [3, 4, 5, 6]


def test_rows_come_as_they_are_measured():
    arms = _Arms("AB")
    turns = interleaved(arms, 2, warmup=0)
    next(turns)
    assert arms.order == ["A"]


def test_an_arm_that_raises_loses_only_itself(capsys):
    arms = _Arms("ABC", B=2)
    rows = list(interleaved(arms, 3, warmup=0))
    assert [row for row in rows if row["arm"] == "B"] == [
        {"arm": "B", "repeat": 0, "call": 2},
        {"arm": "B", "repeat": 1, "error": "ValueError: B is broken"},
    ]
    assert all([row["repeat"] for row in rows if row["arm"] == name] == [0, 1, 2] for name in "AC")
    assert arms.order.count("B") == 2 and "Traceback" in capsys.readouterr().err


def test_an_arm_that_raises_in_the_warm_up_is_reported(capsys):
    rows = list(interleaved(_Arms("AB", B=1), 2, warmup=1))
    assert {"arm": "B", "repeat": -1, "error": "ValueError: B is broken"} in rows and len(rows) == 3


def test_ctrl_c_passes_through():
    def interrupted():
        raise KeyboardInterrupt

    turns = interleaved({"A": lambda: {}, "B": interrupted}, 2, warmup=0)
    assert next(turns)["arm"] == "A"
    with pytest.raises(KeyboardInterrupt):
        next(turns)


def test_an_arm_that_has_used_its_time_is_not_repeated():
    arms = {"slow": lambda: time.sleep(0.06) or {}, "fast": lambda: {}}
    rows = list(interleaved(arms, 5, warmup=0, budget_s=0.1))
    counts = [sum(row["arm"] == name for row in rows) for name in arms]
    assert counts == [2, 5]
    rows = list(interleaved(arms, 2, warmup=1, budget_s=0.0))
    assert [row["arm"] for row in rows] == ["slow", "fast"], "every arm has one repeat"


def test_progress_is_a_bar_on_a_terminal_and_rare_lines_elsewhere(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for _ in interleaved({"A": lambda: now.__setitem__(0, now[0] + 6) or {}}, 4, warmup=0, progress="label"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["label: 2 of 4 runs, last A, 12 s left", "label: 4 of 4 runs, last A, 0 s left"]
    list(interleaved(_Arms("A"), 2, progress=None))
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(interleaved(_Arms("AB", A=2), 3, warmup=0, progress="label"))
    assert "label: 100%" in capsys.readouterr().err.replace("\r", "\n")


def test_median_and_spread():
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert spread([1.0, 2.0, 1.2]) == pytest.approx(0.5 / 1.2) and spread([-1.0, -2.0, -1.2]) == spread([1.0, 2.0, 1.2])
    assert spread([4.0]) == 0.0 and spread(iter([1.0, 1.0])) == 0.0


def test_groups_leave_out_what_was_not_measured():
    rows = [{"a": 1, "b": 2, "x": 1}, {"a": 1, "b": 2, "x": 2}, {"a": 1, "error": "e"}, {"a": 1, "skipped": "s"}]
    assert groups(rows, "a", "b") == {(1, 2): rows[:2]}
