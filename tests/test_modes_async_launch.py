"""Mode "async" in the Trainer under the real launcher: a whole run, a killed replica in both settings, resuming."""

import json
import os
import signal

import pytest
from logs import config, write_log
from test_launch import _BIN, _ROOT, _deepspeed, _free_port, _losses, _run, _start

_TRAIN = _ROOT / "launch/train.py"
_STEPS = 120


def _config(on_lost="stop", pipe=1, steps=_STEPS, validations=0):
    values = config(
        pipe=pipe,
        threads_per_rank=1,  # the two hosts of a test share one
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


_DYING = """
import os, signal
from ds_recsys import Trainer
from ds_recsys.callbacks import Callback

class Dies(Callback):
    steps = 0

    def on_step_end(self, trainer, loss):
        self.steps += bool(list(trainer.run_dir.glob("checkpoints/step_*/manifest.json")))
        if self.steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = Trainer({config!r}, data={data!r}, run_dir={run!r}, callbacks=[Dies()])
trainer.evaluate("test")
trainer.train()
"""


def _two_hosts(folder, run, arguments):
    """A launcher for each of two hosts, which have a replica each: one that ends does not end the other.

    The second dies a few steps after the first checkpoint: long before the next, where they would wait for each other.
    """
    (folder / "hostfile").write_text("host0 slots=1\nhost1 slots=1\n")
    values = {"config": str(folder / f"{run.name}.json"), "data": str(folder / "log.csv"), "run": str(run)}
    (folder / "dying.py").write_text(_DYING.format(**values))
    port = _free_port()
    both = ["--hostfile", folder / "hostfile", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
    scripts = [[_TRAIN, *arguments], [folder / "dying.py"]]
    return [_start(folder, [_BIN / "deepspeed", *both, "--node_rank", i, *script]) for i, script in enumerate(scripts)]


@pytest.mark.parametrize("on_lost", ["stop", "continue"])
def test_a_lost_host_and_resuming(folder, on_lost):
    name = f"lost-{on_lost}"
    run, arguments = folder / name, _arguments(folder, _config(on_lost), name)
    hosts = _two_hosts(folder, run, arguments)
    try:
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
    assert int(_checkpoints(run)[-1].removeprefix("step_")) > _STEPS // 2  # the first was at a third
    assert (run / "export" / "config.json").exists() and (run / "metrics.json").exists()
    figures = json.loads((run / "data_parallel.json").read_text())
    assert figures["lost"] == [1] and figures["progress"] >= _STEPS
