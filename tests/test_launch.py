"""The scripts under the real launchers: train, evaluate, kill, resume, export, recommend."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_runs import whole_grid
from logs import config, write_log

_ROOT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent


def _environment(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**environment, "PATH": f"{_BIN}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def _start(tmp_path, command):
    return subprocess.Popen(
        [*map(str, command)],
        env=_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _run(tmp_path, launcher, *arguments, expect=0):
    return _run_script(tmp_path, [*launcher, str(_ROOT / "launch/train.py"), *arguments], expect)


def _run_script(tmp_path, command, expect=0):
    process = _start(tmp_path, command)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (process.returncode == 0) == (expect == 0), output
    return output


def _free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def _deepspeed(ranks, port=None):
    return [str(_BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(port or _free_port())]


def _losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """One whole run on pipe 2 x data 2 under the deepspeed launcher: (folder, arguments, output)."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "config.json").write_text(json.dumps(config(checkpoint={"every_steps": 5})))
    arguments = ["--deepspeed_config", folder / "config.json", "--data", write_log(folder / "log.csv")]
    return folder, arguments, _run(folder, _deepspeed(4), *arguments, "--run_dir", folder / "whole")


def test_report_of_a_whole_run(unbroken):
    folder, _, output = unbroken
    metrics = json.loads((folder / "whole" / "metrics.json").read_text())
    assert metrics["trained"]["NDCG@10"] > metrics["untrained"]["NDCG@10"]
    assert {"popularity", "item_knn", "untrained", "trained"} <= metrics.keys()
    assert re.search(r"\| trained +\| 0\.\d{4}", output) and "leave-one-out" in output
    assert (folder / "whole" / "training.png").stat().st_size > 5000


def test_killed_rank_then_resume_gives_the_same_losses(unbroken):
    folder, arguments, _ = unbroken
    _kill_and_resume(folder, arguments, folder / "whole", folder / "broken")


@pytest.mark.parametrize("stage", [pytest.param(0, marks=whole_grid), 1])
def test_killed_rank_then_resume_gives_the_same_losses_with_compressed_gradients(unbroken, stage):
    folder, arguments, _ = unbroken
    compressed = {"recsys.compression.method": "int4", "recsys.compression.min_elements": 100}
    changes = {"zero_optimization.stage": stage, **compressed}
    arguments = [*arguments, *(word for key, value in changes.items() for word in ("--set", f"{key}={value}"))]
    whole = folder / f"compressed-{stage}"
    output = _run(folder, _deepspeed(4), *arguments, "--run_dir", whole)
    assert "gradient compression: int4" in output and (whole / "compression.json").exists()
    assert _losses(whole) != _losses(folder / "whole")
    _kill_and_resume(folder, arguments, whole, folder / f"compressed-broken-{stage}")


def _kill_and_resume(folder, arguments, whole, broken):
    script = [*_deepspeed(4), _ROOT / "launch/train.py"]
    process = _start(folder, [*script, *arguments, "--run_dir", broken])
    pids, log = [], broken / "log.jsonl"
    for line in process.stdout:
        pids += map(int, re.findall(r"process (\d+) spawned", line))
        if len(pids) == 4:
            break
    deadline = time.monotonic() + 120
    while not list((broken / "checkpoints").glob("step_*5/manifest.json")):  # mid-way: after step 5 or 15
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(pids[2], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert max(_losses(broken), default=0) < max(_losses(whole))
    _run(folder, _deepspeed(4), *arguments, "--run_dir", broken, "--resume")
    assert _losses(broken) == _losses(whole)
    assert log.exists()


def test_resume_with_nothing_to_resume_is_an_error(unbroken):
    folder, arguments, _ = unbroken
    output = _run(folder, _deepspeed(4), *arguments, "--run_dir", folder / "none", "--resume", expect=2)
    assert "error: " in output and "no checkpoint to resume" in output and "Traceback" not in output


def test_resume_with_another_batch_is_refused(unbroken):
    folder, arguments, _ = unbroken
    more = ["--set", "train_batch_size=32", "--run_dir", folder / "whole", "--resume"]
    output = _run(folder, _deepspeed(4), *arguments, *more, expect=2)
    assert "train_batch_size 16" in output and "train_batch_size 32" in output and "Traceback" not in output


@whole_grid
def test_a_tensor_parallel_run_goes_on_and_is_evaluated_on_other_grids(unbroken):
    """Trained on pipe 2 x tensor 2, resumed on data 2, evaluated on tensor 2, exported from both checkpoints."""
    from ds_recsys import Recommender

    folder, arguments, _ = unbroken
    run = folder / "tensor"
    arguments = [*arguments, "--set", "recsys.checkpoint.keep_last=null"]
    grid = ["--set", "recsys.tensor=2", "--set", "recsys.training.epochs=2"]
    _run(folder, _deepspeed(4), *arguments, "--run_dir", run, *grid)
    steps = len(_losses(run))
    _run(folder, _deepspeed(2), *arguments, "--run_dir", run, "--set", "recsys.pipe=1", "--resume")
    losses = _losses(run)
    assert len(losses) == 2 * steps and losses[2 * steps] < losses[1]
    output = _run_script(
        folder,
        [
            *_deepspeed(2),
            str(_ROOT / "launch/evaluate.py"),
            run / "export",
            *arguments[:4],
            "--json",
            folder / "figures",
        ]
        + ["--set", "recsys.pipe=1", "--set", "recsys.tensor=2", "--set", "recsys.model.config=null"],
    )
    assert "NDCG@10" in output
    figures, trained = json.loads((folder / "figures").read_text()), json.loads((run / "metrics.json").read_text())
    assert figures["NDCG@10"] == pytest.approx(trained["trained"]["NDCG@10"], abs=1e-6)
    for tag in (f"step_{steps:08d}", f"step_{2 * steps:08d}"):
        _run_script(folder, [sys.executable, _ROOT / "launch/export.py", run, folder / tag, "--checkpoint", tag])
        assert Recommender.from_pretrained(folder / tag).recommend(["i3", "i4"], k=3)


def test_a_model_without_tensor_plan_is_one_line(unbroken):
    folder, arguments, _ = unbroken
    model = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    more = ["--set", "recsys.pipe=1", "--set", "recsys.tensor=2", "--set", f"recsys.model.config={json.dumps(model)}"]
    output = _run(folder, _deepspeed(2), *arguments, "--run_dir", folder / "mamba", *more, expect=2)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "mamba" in lines[0] and "tensor" in lines[0] and "Traceback" not in output


def test_export_loads_and_recommends(unbroken):
    folder, arguments, _ = unbroken
    from ds_recsys import Recommender

    recommender = Recommender.from_pretrained(folder / "whole" / "export")
    found = recommender.recommend(["i3", "i4", "i5", "i6"], k=5)
    assert "i7" in [item.item for item in found], found
    assert found[0].title == f"Item number {found[0].item[1:]}"
    subprocess.run(
        [sys.executable, _ROOT / "launch/export.py", folder / "whole", folder / "again", "--checkpoint"], check=True
    )
    assert Recommender.from_pretrained(folder / "again").recommend(["i3", "i4"], k=3)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_other_launchers_train_the_same(unbroken, launcher):
    folder, arguments, _ = unbroken
    command = {
        "torchrun": ["torchrun", "--nproc_per_node", "4", "--master_port", _free_port()],
        "accelerate": [
            "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "4",
            "--main_process_port",
            _free_port(),
        ],
    }[launcher]
    command[0] = str(_BIN / command[0])
    _run(folder, command, *arguments, "--run_dir", folder / launcher, "--set", "recsys.training.epochs=1")
    whole = _losses(folder / "whole")
    for step, loss in _losses(folder / launcher).items():
        if step <= 1:  # the schedule depends on the length of the run
            assert loss == pytest.approx(whole[step], abs=1e-6)


def test_mistake_is_one_line_before_any_process_group(unbroken):
    folder, arguments, _ = unbroken
    output = _run(folder, _deepspeed(3), *arguments, expect=2)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "3" in lines[0] and "pipe" in lines[0] and "Traceback" not in output


def test_a_taken_port_is_one_line(unbroken):
    folder, arguments, _ = unbroken
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = _run(folder, _deepspeed(2, port), *arguments, "--run_dir", folder / "taken", expect=2)
    assert f"127.0.0.1:{port}" in output and "--master_port" in output and "Traceback" not in output
