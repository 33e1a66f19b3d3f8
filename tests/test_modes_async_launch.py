"""Mode "async" in the Trainer under the real launcher: a whole run, a killed replica in both settings, resuming."""

import json
import os
import signal
import time

import pytest
from logs import config, write_log
from test_launch import _BIN, _ROOT, _deepspeed, _free_port, _losses, _run, _start

_TRAIN = _ROOT / "launch/train.py"
_STEPS = 300  # a hundred between two checkpoints: longer than this test takes to look


def _config(on_lost="stop", pipe=1, steps=_STEPS, validations=0):
    values = config(
        pipe=pipe,
        data_parallel={"mode": "async", "on_lost": on_lost, "max_staleness": 50, "send_every": 2},
        compression={"method": "int8", "min_elements": 100},
        training={"steps": steps, "eval_every_epochs": validations},
        checkpoint={"every_steps": _STEPS // 3, "every_epochs": 0},
    )
    values["zero_optimization"] = {"stage": 0}
    return values


def _arguments(folder, values, name):
    (folder / f"{name}.json").write_text(json.dumps(values))
    log = folder / "log.csv"
    return ["--deepspeed_config", folder / f"{name}.json", "--data", log, "--run_dir", folder / name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("async-launch")
    write_log(folder / "log.csv")
    return folder


def test_a_whole_run_learns_and_is_exported(folder):
    from ds_recsys import Recommender

    arguments = _arguments(folder, _config(pipe=2, steps=60, validations=8), "whole")
    output = _run(folder, _deepspeed(4), *arguments)
    metrics = json.loads((folder / "whole" / "metrics.json").read_text())
    assert metrics["trained"]["NDCG@10"] > metrics["untrained"]["NDCG@10"]
    figures = json.loads((folder / "whole" / "data_parallel.json").read_text())
    assert figures["progress"] >= 60 and figures["messages"] > 5 and figures["lost"] == []
    assert "data-parallel mode: async" in output
    assert Recommender.from_pretrained(folder / "whole" / "export").recommend(["i3", "i4"], k=3)


def _checkpoints(run):
    return sorted(path.parent.name for path in run.glob("checkpoints/step_*/manifest.json"))


def _wait_for(condition, process, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def _two_hosts(folder, arguments):
    """A launcher for each of two hosts, which have a replica each: one that ends does not end the other."""
    (folder / "hostfile").write_text("host0 slots=1\nhost1 slots=1\n")
    port = _free_port()
    both = ["--hostfile", folder / "hostfile", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    return [_start(folder, [_BIN / "deepspeed", *both, "--node_rank", host, _TRAIN, *arguments]) for host in range(2)]


@pytest.mark.parametrize("on_lost", ["stop", "continue"])
def test_a_lost_host_and_resuming(folder, on_lost):
    name = f"lost-{on_lost}"
    run, arguments = folder / name, _arguments(folder, _config(on_lost), name)
    hosts = _two_hosts(folder, arguments)
    try:
        _wait_for(lambda: _checkpoints(run), hosts[0])
        before, written = _checkpoints(run), len(_losses(run))
        assert before == [f"step_{_STEPS // 3:08d}"], "the run was faster than this test"
        # steps are logged by twenties: the replicas are between two checkpoints now, where nobody waits for anybody
        _wait_for(lambda: len(_losses(run)) > written, hosts[0])
        os.killpg(hosts[1].pid, signal.SIGKILL)
        output, _ = hosts[0].communicate(timeout=400)
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if on_lost == "stop":
        assert hosts[0].returncode != 0 and len(errors) == 1, output
        assert "lost" in errors[0] and "--resume" in errors[0] and "Traceback" not in output
        at = max(_losses(run), default=0)
        _run(folder, _deepspeed(2), *arguments, "--resume")
        assert max(_losses(run)) > at and (run / "export").exists()
        return
    assert hosts[0].returncode == 0 and errors == [], output
    assert output.count("replica 1 is lost") == 1
    assert _checkpoints(run)[-1] > before[-1]
    assert (run / "export" / "config.json").exists() and (run / "metrics.json").exists()
    figures = json.loads((run / "data_parallel.json").read_text())
    assert figures["lost"] == [1] and figures["progress"] >= _STEPS
