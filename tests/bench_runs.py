"""A run of launch/bench.py as its user starts it, and what any that has ended must have left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

whole_grid = pytest.mark.skipif(
    os.environ.get("DS_RECSYS_FULL_GRID") != "1",
    reason="takes minutes, and its parts are tested by others: DS_RECSYS_FULL_GRID=1 runs it",
)
_SCRIPT = str(Path(__file__).parents[1] / "launch/bench.py")


def bench(*arguments, timeout=240, **keywords):
    """The ended process, with its output as text."""
    command = [sys.executable, _SCRIPT, *map(str, arguments)]
    return subprocess.run(command, timeout=timeout, capture_output=True, text=True, **keywords)


def quick_run(name, file):
    """The result of a quick run that is kept in `file`: whole, with a plot and a table, and shown anew from the file alike."""
    done = bench(name, "--quick", "--json", file, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(file.read_text())
    assert result["quick"] and result["complete"] and result["rows"] and result["figures"]
    assert not [row for row in result["rows"] if "error" in row], result["rows"]
    assert file.with_suffix(".png").exists() and re.search(r"^\| --- \|", done.stdout, flags=re.MULTILINE)
    again = bench(name, "--from", file)
    assert again.returncode == 0 and again.stdout.strip() in done.stdout
    return result
