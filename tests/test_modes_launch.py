"""Modes under the deepspeed launcher: each trains to its report, and a killed replica ends the run with one clear line."""

import json
import os
import re
import signal
import time

import pytest
from logs import config, write_log
from test_launch import _ROOT, _deepspeed, _losses, _run, _start

_MODES = {
    "delayed": {"mode": "delayed"},
    "local_sgd": {"mode": "local_sgd", "every": 4},
    "diloco": {"mode": "diloco", "every": 6, "fragments": 2, "overlap_steps": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes-launch")
    write_log(folder / "log.csv")
    return folder


def _arguments(folder, mode, name=None, **recsys):
    values = config(data_parallel=_MODES[mode], compression={"method": "int8", "min_elements": 100}, **recsys)
    values["zero_optimization"] = {"stage": 0}
    path = folder / f"{name or mode}.json"
    path.write_text(json.dumps(values))
    return ["--deepspeed_config", path, "--data", folder / "log.csv", "--run_dir", folder / (name or mode)]


@pytest.mark.parametrize("mode", _MODES)
def test_a_whole_run(folder, mode):
    output = _run(folder, _deepspeed(4), *_arguments(folder, mode), "--baselines")
    figures = json.loads((folder / mode / "metrics.json").read_text())
    assert figures["trained"]["NDCG@10"] > figures["untrained"]["NDCG@10"]
    assert f"data-parallel mode: {mode}" in output and "as int8" in output and "Traceback" not in output
    assert json.loads((folder / mode / "data_parallel.json").read_text())["sent_bytes"] > 0


def test_a_killed_replica_ends_the_run_in_one_line_and_it_resumes(folder):
    training = {"training": {"epochs": 6}, "checkpoint": {"every_steps": 5}}
    whole, broken = (_arguments(folder, "diloco", name, **training) for name in ("whole", "broken"))
    _run(folder, _deepspeed(4), *whole, "--baselines")
    script = [*_deepspeed(4), _ROOT / "launch/train.py"]
    process = _start(folder, [*script, *broken, "--baselines"])
    pids = []
    for line in process.stdout:
        pids += map(int, re.findall(r"process (\d+) spawned", line))
        if len(pids) == 4:
            break
    deadline = time.monotonic() + 120
    while not list((folder / "broken" / "checkpoints").glob("step_*5/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(pids[2], signal.SIGKILL)
    begin = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - begin < 30
    lines = set(re.findall(r"error: .*", output))
    assert lines and all("lost another rank" in line and "--resume" in line for line in lines), output
    assert "Traceback" not in output, output
    _run(folder, _deepspeed(4), *broken, "--baselines", "--resume")
    assert _losses(folder / "broken") == _losses(folder / "whole")
