"""The harness of launch/bench.py on a benchmark that measures nothing, and the real benchmarks' quick runs."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import benchmarks
import pytest
from bench_runs import bench, quick_run, whole_grid
from benchmarks import harness, plots

from ds_recsys.errors import UserError

_ROOT = Path(__file__).parents[1]
_ON_A_CLUSTER = ("balance", "baselines", "compression", "hybrid", "modes")  # in files of their own
_LONG = ("timeline",)
_SCRIPT = str(_ROOT / "launch/bench.py")


def _fake(rows=({"value": 1.0}, {"value": 3.0}), raises=None):
    """A benchmark with these rows; then it raises. `calls` counts its measurements."""
    calls = []

    def measure(options):
        calls.append(options)
        yield from ({**row} for row in rows)
        if raises:
            raise raises

    def plot(rows, path):
        with plots.drawing(path) as axes:
            axes[0, 0].plot([row["value"] for row in rows])

    return SimpleNamespace(
        HELP="nothing",
        arguments=lambda parser: None,
        measure=measure,
        figures=lambda rows: {"total": sum(row["value"] for row in rows)},
        table=lambda rows: harness.markdown(["value"], [[row["value"]] for row in rows]),
        plot=plot,
        calls=calls,
    )


def _options(*arguments):
    parser = argparse.ArgumentParser()
    harness.arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


@pytest.fixture
def root(tmp_path):
    """A checkout whose README has a place for the fake benchmark's result."""
    (tmp_path / harness.RESULTS).mkdir(parents=True)
    (tmp_path / "README.md").write_text("Before.\n<!-- bench:fake -->\nold\n<!-- /bench:fake -->\nBehind.\n")
    return tmp_path


def test_a_measurement_is_kept_and_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/bench.py", "fake", "--json", "a b.json"])
    file = tmp_path / "new" / "fake.json"
    harness.run("fake", _fake(), _options("--json", file))
    result = json.loads(file.read_text())
    kept = "benchmark command quick complete seconds commit dirty machine figures rows".split()
    assert list(result) == kept
    assert result["rows"] == [{"value": 1.0}, {"value": 3.0}] and result["figures"] == {"total": 4.0}
    assert result["complete"] and not result["quick"]
    assert result["command"] == "python launch/bench.py fake --json 'a b.json'"
    assert {"cpu", "cores", "memory_gb", "kernel", "python", "torch", "deepspeed"} == result["machine"].keys()
    assert 0.1 < result["machine"]["memory_gb"] < 1e5
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| value |\n| --- |\n| 1.0 |\n| 3.0 |" in printed and "total: 4" in printed
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".part"] == []


def test_a_kept_result_is_shown_anew_without_measuring(tmp_path, capsys):
    file = tmp_path / "fake.json"
    harness.run("fake", _fake(), _options("--json", file))
    file.with_suffix(".png").unlink()
    before = json.loads(file.read_text())
    benchmark = _fake()
    benchmark.figures = lambda rows: {"count": len(rows)}
    capsys.readouterr()
    harness.run("fake", benchmark, _options("--from", file))
    assert not benchmark.calls and file.with_suffix(".png").exists()
    assert "count: 2" in capsys.readouterr().out
    assert json.loads(file.read_text()) == {**before, "figures": {"count": 2}}


def test_ctrl_c_keeps_the_rows_so_far(tmp_path, capsys):
    file = tmp_path / "fake.json"
    with pytest.raises(SystemExit) as stopped:
        harness.run("fake", _fake(raises=KeyboardInterrupt()), _options("--json", file))
    assert stopped.value.code == 130 and "2 rows" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert result["complete"] is False and len(result["rows"]) == 2
    assert harness.run("fake", _fake(), _options("--from", file))["figures"] == {"total": 4.0}
    benchmark = _fake()
    benchmark.figures = lambda rows: {"third": rows[2]}
    with pytest.raises(UserError, match="incomplete"):
        harness.run("fake", benchmark, _options("--from", file))


def test_a_crash_keeps_the_rows_so_far(tmp_path):
    file = tmp_path / "fake.json"
    with pytest.raises(RuntimeError, match="lost"):
        harness.run("fake", _fake(raises=RuntimeError("lost")), _options("--json", file))
    result = json.loads(file.read_text())
    assert result["complete"] is False and len(result["rows"]) == 2


def test_nothing_measured_is_one_line(tmp_path):
    rows = [{"error": "UserError: needs root"}, {"skipped": "too large"}]
    with pytest.raises(UserError, match="fake: nothing was measured; UserError: needs root"):
        harness.run("fake", _fake(rows), _options())
    with pytest.raises(UserError, match="no rows"):
        harness.run("fake", _fake([]), _options())


def test_the_readme_shows_a_kept_result(root):
    harness.run("fake", _fake(), _options("--readme"), root)
    readme, file = (root / "README.md").read_text(), root / harness.RESULTS / "fake.json"
    assert readme.startswith("Before.\n<!-- bench:fake -->\n| value |\n") and "old" not in readme
    assert readme.endswith("<!-- /bench:fake -->\nBehind.\n")
    assert "\n\n![fake](launch/benchmarks/results/fake.png)\n" in readme
    assert re.search(
        rf"\n\n`python .*` on .*, {os.cpu_count()} cores, \d+ GB, commit \w+( with changes)?\.\n<!--", readme
    )
    assert harness.block("fake", _fake(), json.loads(file.read_text()), root) in readme
    harness.run("fake", _fake(), _options("--readme", "--from", file), root)
    assert (root / "README.md").read_text() == readme
    file.with_suffix(".png").unlink()
    assert "![" not in harness.block("fake", _fake(), json.loads(file.read_text()), root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--readme", "--quick"], "--readme takes no quick run"),
        (["--readme", "--json", "elsewhere.json"], "name a file there"),
        (
            ["--readme", "--json", "{root}/launch/benchmarks/results/other.json"],
            "README.md has no <!-- bench:other -->",
        ),
        (["--readme", "--from", "{root}/launch/benchmarks/results/quick.json"], "takes no quick run"),
        (["--readme", "--from", "{root}/launch/benchmarks/results/half.json"], "takes no incomplete run"),
        (["--from", "{root}/none.json"], "cannot read .*none.json: No such file"),
        (["--from", "{root}/README.md"], "is not a result"),
        (["--from", "{root}/list.json"], "is not a result"),
        (["--from", "{root}/launch/benchmarks/results/head.json"], "holds a result of `head`, not of `fake`"),
        (["--from", "a", "--json", "b"], "leave out --json"),
        (["--from", "a", "--quick"], "leave out --json and --quick"),
        (["--json", "{root}/README.md/fake.json"], "cannot write .*README.md"),
    ],
)
def test_a_mistake_is_one_line_before_measuring(root, arguments, message):
    results = root / harness.RESULTS
    for stem, values in {"quick": {"quick": True}, "half": {"complete": False}, "head": {"benchmark": "head"}}.items():
        result = {"benchmark": "fake", "quick": False, "complete": True, "rows": [], **values}
        (results / f"{stem}.json").write_text(json.dumps(result))
    (root / "list.json").write_text("[]")
    benchmark = _fake()
    with pytest.raises(UserError, match=message) as error:
        harness.run("fake", benchmark, _options(*(part.format(root=root) for part in arguments)), root)
    assert not benchmark.calls and "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_its_changes(tmp_path):
    def git(*command):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True)

    assert harness.commit(tmp_path) == {"commit": None, "dirty": None}
    git("init")
    (tmp_path / "README.md").write_text("a")
    (tmp_path / "code.py").write_text("a")
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}", harness.commit(tmp_path)["commit"])
    (tmp_path / "README.md").write_text("b")
    (tmp_path / harness.RESULTS).mkdir(parents=True)
    (tmp_path / harness.RESULTS / "fake.json").write_text("{}")
    assert harness.commit(tmp_path)["dirty"] is False
    (tmp_path / "more.py").write_text("a")
    assert harness.commit(tmp_path)["dirty"] is True
    (tmp_path / "more.py").unlink()
    (tmp_path / "code.py").write_text("b")
    assert harness.commit(tmp_path)["dirty"] is True


def test_the_readme_is_what_its_results_give():
    """No figure stands between markers that the command does not give."""
    readme = (_ROOT / "README.md").read_text()
    for stem in re.findall(r"^<!-- bench:(\S+) -->$", readme, flags=re.MULTILINE):
        result = harness.load(_ROOT / harness.RESULTS / f"{stem}.json")
        benchmark = benchmarks.load(result["benchmark"])
        assert result["complete"] and not result["quick"]
        assert json.loads(json.dumps(benchmark.figures(result["rows"]))) == result["figures"], stem
        shown = f"<!-- bench:{stem} -->\n{harness.block(stem, benchmark, result)}<!-- /bench:{stem} -->"
        again = f"python launch/bench.py {result['benchmark']} --from {harness.RESULTS}/{stem}.json --readme"
        assert shown in readme, again


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=whole_grid if name in _LONG else ())
        for name in benchmarks.NAMES
        if name not in _ON_A_CLUSTER
    ],
)
def test_quick_run(name, tmp_path):
    quick_run(name, tmp_path / f"{name}.json")


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_help_needs_no_heavy_import(name):
    done = bench(name, "--help", timeout=30, env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0 and "--quick" in done.stdout
    assert not re.search(r"\| +(torch|deepspeed|transformers|matplotlib)$", done.stderr, flags=re.MULTILINE)


def test_a_users_mistake_is_one_line():
    for arguments, message in ((["quality"], "needs a config"), (["quality", "--quick", "a.json"], "leave out CONFIG")):
        done = bench(*arguments, timeout=30)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_training_leaves_no_process(name, tmp_path):
    command = [sys.executable, _SCRIPT, "quality", "--quick", "--set", "recsys.training.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = []
    try:
        for line in process.stdout:  # both ranks are there
            if "steps of" in line:
                break
        ranks = _descendants(process.pid)
        assert len(ranks) >= 4, "the launcher, its own launcher, two ranks"
        process.send_signal(getattr(signal, name))
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 130 and "interrupted: 0 rows" in output
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in ranks):
            assert time.monotonic() < deadline, [pid for pid in ranks if _alive(pid)]
            time.sleep(0.1)
    finally:
        for pid in filter(_alive, [process.pid, *ranks]):
            os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [below for child in found for below in _descendants(child)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
