"""The cluster file, link presets, CPU quotas and log lines: what needs no cluster."""

import errno
import json
import os
from pathlib import Path

import pytest

from ds_recsys import UserError
from ds_recsys.simulation import (
    PRESETS,
    Event,
    Job,
    Link,
    Reading,
    calibration,
    cgroups,
    cores,
    load_spec,
    logs,
    state,
    units,
)
from ds_recsys.simulation.cgroups import CpuController, quota_us

_ROOT = Path(__file__).parents[1]


def _one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_hosts_of_a_file(tmp_path):
    (tmp_path / "cluster.yaml").write_text(
        "hosts:\n"
        "  - {count: 2, devices: 1, speed: 0.4, link: 250mbit}\n"
        "  - {name: slow, devices: 2, speed: [0.4, 0.2], link: {up: 100mbit, down: null}}\n"
        "  - {count: 2, name: far, link: null}\n"
        "  - {}\n"
        "link: 1.5gbit\n"
        "events:\n"
        "  - {after: 40, rank: 2, signal: stop}\n"
        "  - {after: 30, host: slow, device: 1, speed: 0.1}\n"
        "  - {after: 35, host: host0, link: 60mbit}\n"
    )
    spec = load_spec(tmp_path / "cluster.yaml")
    assert [host.name for host in spec.hosts] == ["host0", "host1", "slow", "far0", "far1", "host5"]
    assert [host.speeds for host in spec.hosts] == [(0.4,), (0.4,), (0.4, 0.2), (1.0,), (1.0,), (1.0,)]
    links = [Link(250e6, 250e6), Link(250e6, 250e6), Link(100e6, None), Link(), Link(), Link(1.5e9, 1.5e9)]
    assert [host.link for host in spec.hosts] == links
    assert spec.world_size == 7
    assert spec.events == (
        Event(30, host="slow", device=1, speed=0.1),
        Event(35, host="host0", link=Link(60e6, 60e6)),
        Event(40, rank=2, signal="stop"),
    )
    (tmp_path / "cluster.json").write_text(json.dumps({"hosts": [{"count": 2}]}))
    assert load_spec(tmp_path / "cluster.json").world_size == 2


def test_ranks_are_numbered_as_the_deepspeed_launcher_does():
    spec = load_spec({"hosts": [{"devices": 1}, {"devices": 2}, {"devices": 3}]})
    places = [(host.name, device) for host, device in spec.ranks]  # LOCAL_RANK = rank modulo the host's devices
    assert places == [("host0", 0), ("host1", 1), ("host1", 0), ("host2", 0), ("host2", 1), ("host2", 2)]


@pytest.mark.parametrize(
    "data, names",
    [
        ({}, "cluster: hosts"),
        ({"hosts": {}}, "hosts: expected a list"),
        ({"hosts": [{"cout": 2}]}, "hosts[0]: unknown key 'cout'"),
        ({"hosts": [{"count": 0}]}, "hosts[0].count: 0"),
        ({"hosts": [{"devices": 1.5}]}, "hosts[0].devices: 1.5"),
        ({"hosts": [{"speed": 1.5}]}, "0.01 to 1"),
        ({"hosts": [{"speed": "fast"}]}, "'fast' is no number"),
        ({"hosts": [{"speed": float("nan")}]}, "hosts[0].speed"),
        ({"hosts": [{"devices": 2, "speed": [0.5]}]}, "1 speeds for 2 devices"),
        ({"hosts": [{"name": "A b"}]}, "hosts[0].name: 'A b'"),
        ({"hosts": [{"name": "a"}, {"name": "a"}]}, "a is used twice"),
        ({"hosts": [{"count": 251}]}, "at most 250"),
        ({"hosts": [{"link": "250mbps"}]}, "hosts[0].link: '250mbps' is no link rate"),
        ({"hosts": [{"link": True}]}, "hosts[0].link"),
        ({"hosts": [{"link": "10bit"}]}, "1 Mbit/s to 100 Gbit/s"),
        ({"hosts": [{"link": {"up": "1gbit"}}]}, "give both up and down"),
        ({"hosts": [{}], "link": {"preset": "8b"}}, "link.preset: no '8b'; there are 8b-16xa100-25gbe"),
        ({"hosts": [{}, {}], "link": {"preset": "8b-16xa100-25gbe"}}, "gradient_bytes"),
        (
            {"hosts": [{}], "link": {"preset": "8b-16xa100-25gbe", "gradient_bytes": 1e6, "compute_seconds": 1}},
            "one device exchanges no gradient",
        ),
        (
            {"hosts": [{}, {}], "link": {"preset": "8b-16xa100-25gbe", "gradient_bytes": 1e6, "compute_seconds": 0}},
            "compute_seconds: 0 is not above 0",
        ),
        ({"hosts": [{}], "events": [{"after": 1, "rank": 0}]}, "events[0]: give after with"),
        ({"hosts": [{}], "events": [{"after": -1, "rank": 0, "signal": "kill"}]}, "events[0].after"),
        ({"hosts": [{}], "events": [{"after": 1, "rank": 1, "signal": "kill"}]}, "ranks 0 to 0, not 1"),
        ({"hosts": [{}], "events": [{"after": 1, "rank": 0, "signal": "hup"}]}, "stop, continue, kill"),
        (
            {"hosts": [{}], "events": [{"after": 1, "host": "b", "link": "1gbit"}]},
            "events[0].host: no host is called 'b'",
        ),
        ({"hosts": [{}], "events": [{"after": 1, "host": "host0", "device": 1, "speed": 1}]}, "devices 0 to 0, not 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(data, names):
    with pytest.raises(UserError) as error:
        load_spec(data)
    assert names in _one_line(error)


def test_unreadable_files(tmp_path):
    for name, text in (("broken.yaml", "hosts: [\n"), ("broken.json", "{"), ("list.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
    for name in ("broken.yaml", "broken.json", "list.yaml", "absent.yaml"):
        with pytest.raises(UserError) as error:
            load_spec(tmp_path / name)
        assert name in _one_line(error)


def test_rates():
    assert units.parse_rate("250mbit") == 250e6
    assert units.parse_rate("1.5 Gbit") == 1.5e9
    assert units.parse_rate("1e9") == units.parse_rate(1e9) == 1e9
    assert [units.format_rate(rate) for rate in (None, 61.35e6, 2e9)] == ["unlimited", "61.35 Mbit/s", "2 Gbit/s"]


def test_presets_and_their_arithmetic():
    ratios = [round(preset.ratio, 2) for preset in PRESETS.values()]
    assert list(PRESETS) == ["8b-16xa100-25gbe", "8b-16xa100-100gbe", "8b-16xa100-400gbe"]
    assert ratios == [4.06, 1.02, 0.25]
    slow = PRESETS["8b-16xa100-25gbe"]
    # by hand: 30 GB through 3.125 GB/s; 48e9 FLOPs x 6144 tokens on 124.8 TFLOP/s
    assert slow.communication_seconds == pytest.approx(9.6)
    assert slow.compute_seconds == pytest.approx(2.363, abs=1e-3)
    assert all(figure in slow.describe() for figure in ("9.6 s", "2.36 s", "ratio 4.06"))
    # four devices, 27 MB of gradient, 1.3 s of compute: a ring's 40.5 MB take 4.06 x 1.3 s
    rate = slow.rate(27e6, 1.3, 4)
    assert 40.5e6 * 8 / rate == pytest.approx(slow.ratio * 1.3)
    link = {"preset": slow.name, "gradient_bytes": "27e6", "compute_seconds": 1.3}
    spec = load_spec({"hosts": [{"count": 2, "devices": 2}], "link": link})
    assert spec.hosts[0].link == Link(rate, rate)


@pytest.mark.parametrize("speed", [0.01, 0.03, 0.1, 0.4, 1.0])
def test_quotas_give_the_speed_and_are_ones_the_kernel_takes(speed):
    period, quota = quota_us(speed)
    assert quota / period == pytest.approx(speed, rel=1e-3)
    assert quota >= 1_000 and 10_000 <= period <= 1_000_000


def test_devices_are_spread_over_the_cores():
    assert cores.assign([0.1, 0.45, 1.0], {0: 0.0, 1: 0.0}) == [1, 1, 0]
    assert cores.assign([0.4] * 4, {2: 0.0, 5: 0.0}) == [2, 5, 2, 5]
    assert cores.assign([0.5], {0: 0.4, 1: 0.0}) == [1]  # another cluster is on core 0


def test_cores_that_other_clusters_use_count_as_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "folder", lambda: tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert cores.load() == {0: 0.0, 1: 0.0}
    hosts = [{"name": "a", "speed": [0.4, 0.2]}, {"name": "b", "speed": [0.3]}]
    state.create({"spec": {"hosts": hosts}, "cores": {"a": [0, 1], "b": [0]}})
    assert cores.load() == {0: pytest.approx(0.7), 1: pytest.approx(0.2)}


def test_the_rank_that_failed_first_is_the_one_named(tmp_path, capsys):
    run = Job("x.1", tmp_path, tmp_path, ["a"], 3)
    run.run({}, [], [], stream=False)
    run.wait()
    run.failure = run._status = None
    common = {"host": "a", "device": 0}
    run._find_failure(
        {
            0: {**common, "rank": 0, "status": 1, "ended": 20.0},
            1: {**common, "rank": 1, "status": -9, "ended": 10.0},
            2: {**common, "rank": 2, "status": 0, "ended": 5.0},
        }
    )
    assert run.failure.startswith("rank 1 (device 0 of a) was ended by SIGKILL") and run._status == 137


def test_cgroup_v1_in_a_fake_folder(tmp_path):
    mount = tmp_path / "a b"
    group = mount / "dsr-x" / "host0" / "device0"
    group.mkdir(parents=True)
    (tmp_path / "mounts").write_text(
        f"tmpfs /run tmpfs rw 0 0\ncgroup {str(mount).replace(' ', chr(92) + '040')} cgroup rw,cpu,cpuacct 0 0\n"
    )
    controller = CpuController.find(tmp_path / "mounts")
    assert controller == CpuController(mount, 1)
    for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"):
        (group / name).touch()
    assert controller.create(group) == group
    controller.set_speed(group, 0.4)
    controller.prefer(group)
    assert (group / "cpu.cfs_period_us").read_text() == "10000"
    assert (group / "cpu.cfs_quota_us").read_text() == "4000"
    assert (group / "cpu.shares").read_text() == "262144"


def test_cgroup_v2_in_a_fake_folder(tmp_path, monkeypatch):
    folders = [tmp_path / "v2", tmp_path / "v2/dsr-x", tmp_path / "v2/dsr-x/host0", tmp_path / "v2/dsr-x/host0/device0"]
    for folder in folders:
        folder.mkdir()
        for name in ("cgroup.subtree_control", "cpu.max", "cpu.weight"):
            (folder / name).touch()
    (folders[0] / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "mounts").write_text(f"cgroup /cg/memory cgroup rw,memory 0 0\ncgroup2 {folders[0]} cgroup2 rw 0 0\n")
    controller = CpuController.find(tmp_path / "mounts")
    assert controller == CpuController(folders[0], 2)
    (folders[0] / "cgroup.subtree_control").write_text("cpu memory\n")  # on already: left alone
    group = controller.create(folders[-1])
    controls = [(folder / "cgroup.subtree_control").read_text() for folder in folders]
    assert controls == ["cpu memory\n", "+cpu", "+cpu", ""]  # none in the group that will hold processes
    controller.set_speed(group, 0.05)
    assert (group / "cpu.max").read_text() == "1000 20000"
    controller.prefer(folders[1])
    assert (folders[1] / "cpu.weight").read_text() == "10000"

    def busy(path, text):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (folders[0] / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(cgroups, "write", busy)
    with pytest.raises(UserError, match="Device or resource busy.*--loopback"):
        controller.create(folders[1])


def test_no_cpu_controller(tmp_path):
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2/cgroup.controllers").write_text("memory\n")
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path / 'v2'} cgroup2 rw 0 0\n")
    assert CpuController.find(tmp_path / "mounts") is None


def test_report_of_a_calibration():
    readings = [Reading("host0 up", 250e6, 248e6, "bit/s"), Reading("host0 device 0", 0.4, 0.3, "core")]
    assert [reading.ok for reading in readings] == [True, False]
    lines = calibration.report(readings).splitlines()
    assert lines[1].split() == ["host0", "up", "250", "Mbit/s", "248", "Mbit/s", "0.992", "ok"]
    assert lines[2].endswith("0.750  more than 5% off")


def test_a_followed_log_shows_whole_lines_and_the_state_of_a_progress_bar(tmp_path, capsys):
    path = tmp_path / "rank0.log"
    follower = logs.Follower(path, "[a rank 0] ")
    follower.step()  # not there yet
    with open(path, "ab", buffering=0) as log:
        log.write(b"one\nhal")
        follower.step()
        assert capsys.readouterr().out == "[a rank 0] one\n"
        log.write(b"f\n\r 10%\r 20%")
        follower.step()
        assert capsys.readouterr().out == "[a rank 0] half\n[a rank 0]  20%\n"
        log.write(b"\r 30%")
        follower.step()
        assert capsys.readouterr().out == ""  # at most one line a second
        log.write(b"\r100%\nend")
        follower.step(last=True)
        assert capsys.readouterr().out == "[a rank 0] 100%\n[a rank 0] end\n"
    assert logs.last_lines(path, 2) == ["100%", "end"]


@pytest.mark.parametrize("path", sorted((_ROOT / "ds_configs").glob("cluster_*.yaml")), ids=lambda path: path.name)
def test_shipped_cluster_files(path):
    spec = load_spec(path)
    assert spec.world_size == 4
    assert f"launch/cluster.py run ds_configs/{path.name}" in path.read_text()
