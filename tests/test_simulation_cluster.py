"""Real simulated clusters: what is enforced, how jobs run and end, and that nothing is left of them.

They need root, iproute2 and a cpu controller, and are skipped with the reason where that lacks.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_recsys import UserError
from ds_recsys.simulation import Cluster, job, load_spec, operate, processes, state
from ds_recsys.simulation.teardown import group_name

_ROOT = Path(__file__).parents[1]
_CLI = [sys.executable, str(_ROOT / "launch/cluster.py")]

# A rank that is hard to clean up: a shared-memory file, and a process in a session of its own whose parent is gone.
_STUBBORN = """
import os, sys, time
open("/dev/shm/ds_recsys_test_" + os.environ["DS_RECSYS_CLUSTER"], "w").close()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print("here", os.environ["RANK"], flush=True)
time.sleep(float(sys.argv[1]))
if os.environ["RANK"] == "2":
    print("the last words", flush=True)
    sys.exit(3)
time.sleep(600)
"""

_ALL_REDUCE = """
import json, os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.full((250_000,), float(dist.get_rank()))
dist.all_reduce(value)
keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_RECSYS_HOST", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "EXTRA")
found = {key: os.environ.get(key) for key in keys}
print("\\r10%\\r20%")
print(json.dumps({**found, "sum": value[0].item(), "argv": sys.argv[1:], "shm": os.listdir("/dev/shm")}))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def machine():
    try:
        with Cluster(load_spec({"hosts": [{}]})):
            pass
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def stubborn(tmp_path):
    (tmp_path / "stubborn.py").write_text(_STUBBORN)
    return str(tmp_path / "stubborn.py")


def _spec(hosts=2, devices=1, speed=0.5, **more):
    return load_spec({"hosts": [{"count": hosts, "devices": devices, "speed": speed, "link": "200mbit"}], **more})


def _left(cluster_id: str) -> list[str]:
    """What the machine still has of a cluster."""
    found = [str(path) for path in Path("/run/netns").glob(f"dsr-{cluster_id}*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/{group_name(cluster_id)}*")]
    found += [str(path) for path in Path("/dev/shm").glob(f"*{cluster_id}*")]
    found += [str(path) for path in state.folder().glob(cluster_id)]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
    found += [line for line in links.splitlines() if cluster_id in line]
    return found + [f"process {pid}" for pid in processes.find(processes.CLUSTER_MARK, cluster_id, [])]


def _until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def _accurate(cluster, attempts=3):
    """Readings of a calibration; again when one is off, for a machine that does other work too."""
    for _ in range(attempts):
        readings = cluster.check()
        if all(reading.ok for reading in readings):
            break
    return cluster.report(readings), readings


def test_rates_and_speeds_are_those_of_the_file(machine):
    hosts = [{"speed": 0.1, "link": "50mbit"}, {"speed": 0.45, "link": "2gbit"}, {"speed": 1.0}]
    hosts[2]["link"] = {"up": "300mbit", "down": None}
    with Cluster(load_spec({"hosts": hosts})) as cluster:
        table, readings = _accurate(cluster)
        assert all(reading.ok for reading in readings), table
        assert {reading.what for reading in readings if reading.unit == "bit/s"} == {
            "host0 up", "host0 down", "host1 up", "host1 down", "host2 up",
        }  # fmt: skip
        sent, received = cluster.link_bytes()["host1"]
        assert sent > 2e9 / 8 * 0.2 and received > 2e9 / 8 * 0.2
        sent, received = cluster.link_bytes()["host2"]
        assert sent > 300e6 / 8 * 0.2 and received < sent / 10
    assert not _left(cluster.id)


def test_links_and_speeds_change_live_from_here_and_from_another_process(machine):
    with Cluster(_spec()) as cluster:
        cluster.set_link("host0", up=20e6)
        cluster.set_link("host1", up=None, down=None)
        cluster.set_speed("host0", 0, 0.2)
        done = subprocess.run(
            [*_CLI, "set", cluster.id, "host0", "--down", "60mbit"], capture_output=True, text=True, check=True
        )
        assert done.stdout == "host0: up 20 Mbit/s, down 60 Mbit/s; device speeds 0.2\n"
        assert cluster.id in operate.table() and "host1: up unlimited" in operate.table()
        table, readings = _accurate(cluster)
        expected = {reading.what: reading.expected for reading in readings if "busy" not in reading.what}
        assert expected == {"host0 up": 20e6, "host0 down": 60e6, "host0 device 0": 0.2, "host1 device 0": 0.5}
        assert all(reading.ok for reading in readings), table
        for wrong in (
            {"host": "host9", "link": "1gbit"},
            {"host": "host0", "device": 1, "speed": 0.5},
            {"host": "host0"},
        ):
            with pytest.raises(UserError):
                operate.change(cluster.id, **wrong)
    assert not _left(cluster.id)


def test_two_clusters_side_by_side(machine):
    with Cluster(_spec()) as outer:
        with Cluster(_spec()) as inner:
            assert inner.id != outer.id
            inner.set_link("host0", up=10e6, down=10e6)
            inner.set_speed("host0", 0, 0.1)
            table, readings = _accurate(outer)  # the same addresses, but its own rates and speeds
            assert all(reading.ok for reading in readings), table
        assert not _left(inner.id)
        assert operate.clean() == "nothing to remove"
        assert {"host0", "host1"} == outer.link_bytes().keys()
    assert not _left(outer.id)


def test_a_job_on_two_hosts_with_two_devices(machine, tmp_path, capsys):
    (tmp_path / "script.py").write_text(_ALL_REDUCE)
    events = [{"after": 0, "host": "host1", "link": "100mbit"}, {"after": 0, "rank": 3, "signal": "continue"}]
    with Cluster(_spec(devices=2, events=events)) as cluster:
        before = cluster.link_bytes()
        arguments = ["a b", "--", "--set", "x=$HOME"]
        run = cluster.start([tmp_path / "script.py", *arguments], log_dir=tmp_path / "logs", env={"EXTRA": "more"})
        assert run.poll() is None
        assert run.wait(120) == run.poll() == 0
        after = cluster.link_bytes()
        assert state.load(cluster.id)["spec"]["hosts"][1]["link"] == {"up": 100e6, "down": 100e6}
    ring = 2 * 3 / 4 * 1e6  # bytes that cross each link in each direction, by arithmetic
    for host in after:
        for way in (0, 1):
            assert 0.9 * ring < after[host][way] - before[host][way] < 1.5 * ring
    printed = capsys.readouterr().out
    for rank in range(4):
        found = json.loads(run.log(rank).read_text().splitlines()[-1])
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % 2),
            "WORLD_SIZE": "4",
            "DS_RECSYS_HOST": f"host{rank // 2}",
        }
        assert place.items() <= found.items()
        assert (found["sum"], found["argv"], found["EXTRA"]) == (6.0, arguments, "more")
        assert (found["shm"], found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ([], "1", "")
        assert f"[host{rank // 2} rank {rank}] 20%\n" in printed
    assert "[event]" in printed and "rank 3: continue" in printed
    assert not _left(cluster.id)


def test_a_rank_that_fails_ends_the_job_and_is_named(machine, stubborn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_GRACE_SECONDS", 1.0)
    with Cluster(_spec(devices=2)) as cluster:
        run = cluster.start([stubborn, "1"], log_dir=tmp_path / "logs", stream=False)
        assert run.wait(60) == 3
        assert not processes.find(processes.JOB_MARK, run.name, [])  # ended with the job, before the cluster
        error = capsys.readouterr().err
        assert "error: rank 2 (device 0 of host1) ended with exit status 3" in error and "| the last words" in error
        assert run.failure in error
        with pytest.raises(UserError, match="rank 2 has ended"):
            run.signal(2, signal.SIGSTOP)
    assert not _left(cluster.id)


def test_a_launcher_that_fails_is_named(machine, stubborn, tmp_path, capsys):
    with Cluster(_spec(hosts=1)) as cluster:
        run = cluster.start([stubborn, "600"], log_dir=tmp_path, env={"DS_ACCELERATOR": "abacus"})
        assert run.wait(60) == 1
    assert "the launcher of host0 ended with exit status 1" in run.failure
    assert f"{tmp_path}/launcher-host0.log" in run.failure and "abacus" in capsys.readouterr().err
    assert not _left(cluster.id)


def test_a_rank_is_stopped_continued_and_killed(machine, stubborn, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_GRACE_SECONDS", 1.0)
    with Cluster(_spec()) as cluster:
        first = cluster.start([stubborn, "600"], log_dir=tmp_path / "first", stream=False)
        second = cluster.start([stubborn, "600"], log_dir=tmp_path / "second", stream=False)
        with pytest.raises(UserError, match="rank 1 has not started yet"):
            first.signal(1, signal.SIGSTOP)
        with pytest.raises(UserError, match="ranks 0 to 1"):
            first.signal(2, signal.SIGSTOP)
        _until(lambda: first.started() and second.started())
        pid = json.loads((first.folder / "rank1.json").read_text())["pid"]

        def status():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

        group = f"{group_name(cluster.id)}/host1-device0/job1\n"  # it is known before it enters it
        _until(lambda: group in Path(f"/proc/{pid}/cgroup").read_text())
        first.signal(1, signal.SIGSTOP)
        _until(lambda: status() == "T")
        operate.send(cluster.id, 1, "continue")
        _until(lambda: status() != "T")
        first.signal(1, signal.SIGKILL)
        assert first.wait(60) == 128 + signal.SIGKILL
        assert "rank 1 (device 0 of host1) was ended by SIGKILL" in first.failure
        assert second.poll() is None  # the other job goes on
        with pytest.raises(TimeoutError):
            second.wait(0.1)
        second.stop()
        assert second.wait() == second.poll() == 143 and second.failure is None
        assert not processes.find(processes.JOB_MARK, second.name, [])
    assert not _left(cluster.id)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_nothing_is_left_when_the_owner_is_interrupted_or_killed(machine, stubborn, tmp_path, number, status):
    (tmp_path / "cluster.json").write_text('{"hosts": [{"speed": 1, "link": "1gbit"}]}')
    command = [*_CLI, "run", "--no_check", "--log_dir", tmp_path, tmp_path / "cluster.json", stubborn, "600"]
    with open(tmp_path / "out", "w") as out:
        owner = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd="/", start_new_session=True)
    _until(lambda: (tmp_path / "rank0.log").exists() and "here" in (tmp_path / "rank0.log").read_text())
    cluster_id = (tmp_path / "out").read_text().split()[1].rstrip(":")
    assert _left(cluster_id)
    os.killpg(owner.pid, number)  # as a terminal does
    assert owner.wait(30) == status, (tmp_path / "out").read_text()
    _until(lambda: not _left(cluster_id), 15)
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_what_a_killed_owner_and_a_killed_reaper_leave_is_cleaned(machine):
    code = (
        "import os, signal\nfrom ds_recsys.simulation import Cluster, load_spec, reaper\nreaper.start = lambda _: None\n"
        "cluster = Cluster(load_spec({'hosts': [{}, {}]})).__enter__()\n"
        "print(cluster.id, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    cluster_id = done.stdout.strip()
    assert _left(cluster_id)
    assert cluster_id in operate.clean()
    assert not _left(cluster_id)


def _without_rights(folder: Path, prefix: list[str], *arguments):
    """cluster.py behind `prefix`, which takes rights away; skips where the machine does not let it."""
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip(f"no `{prefix[0]}` here")
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"`{' '.join(prefix)}`: {probe.stderr.strip()}")
    environment = {**os.environ, "TMPDIR": str(folder), "HOME": str(folder)}
    command = [*prefix, *_CLI, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd="/")


# A user namespace without a mapping: no user's rights, but the files of whoever runs the tests stay readable.
_OTHER_USER = ["unshare", "--user"] if os.geteuid() == 0 else []


def test_without_root_one_line_names_what_lacks(tmp_path):
    (tmp_path / "cluster.json").write_text('{"hosts": [{}]}')
    done = _without_rights(tmp_path, _OTHER_USER, "check", tmp_path / "cluster.json")
    line = "error: a simulated cluster needs root; --loopback runs without link rates and device speeds\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_root_without_its_capabilities_gets_one_line(machine, tmp_path):
    (tmp_path / "cluster.json").write_text('{"hosts": [{}]}')
    before = state.ids()
    done = _without_rights(tmp_path, ["setpriv", "--bounding-set=-all"], "check", tmp_path / "cluster.json")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--loopback" in done.stderr, done.stderr
    assert set(state.ids()) <= set(before)


def test_loopback_without_root(tmp_path):
    (tmp_path / "cluster.json").write_text('{"hosts": [{"count": 2, "link": "1gbit", "speed": 0.5}]}')
    (tmp_path / "script.py").write_text(_ALL_REDUCE)
    options = ["run", "--loopback", "--log_dir", tmp_path / "logs", tmp_path / "cluster.json", tmp_path / "script.py"]
    done = _without_rights(tmp_path, _OTHER_USER, *options, "x y")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loopback: link rates and device speeds are not enforced" in done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"logs/rank{rank}.log").read_text().splitlines()[-1])
        assert (found["RANK"], found["LOCAL_RANK"], found["sum"], found["argv"]) == (str(rank), "0", 1.0, ["x y"])
        assert f"[host{rank} rank {rank}] " in done.stdout
    cluster_id = done.stdout.split()[1].rstrip(":")
    assert not processes.find(processes.CLUSTER_MARK, cluster_id, [])
    assert not list(tmp_path.glob(f"ds_recsys-*/{cluster_id}"))
