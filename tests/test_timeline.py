"""Self times, spans, clocks, link counters and names of the timeline, without an engine."""

import pytest

from ds_recsys.method_hook import MethodHook
from ds_recsys.timeline.clock import DeviceClock
from ds_recsys.timeline.links import LinkCounter, parse
from ds_recsys.timeline.recorder import Recorder, Span, self_times, spans
from ds_recsys.timeline.step_times import StepTimes
from ds_recsys.timeline.summary import RankTimes, Summary
from ds_recsys.timeline.trace import _name, joined


class _Script:
    """A clock that says what it is told."""

    def __init__(self, *moments):
        self._moments = list(moments)

    def begin(self):
        pass

    def now(self):
        return self._moments.pop(0)


def _nested():
    recorder = Recorder(_Script(0.0, 1.0, 3.0, 6.5, 9.0, 10.0))
    recorder.begin()
    recorder.enter("compute", ("forward", 0))
    recorder.enter("tensor", ("all_reduce", 8, "tensor"))
    recorder.leave()
    recorder.leave()
    marks, _ = recorder.end()
    return marks, marks.moments


def test_a_nested_span_is_not_time_of_the_span_around_it():
    times = self_times(*_nested())
    assert times == {"compute": 4.5, "tensor": 3.5, "other": 2.0, "pipeline": 0, "gradients": 0, "optimizer": 0}


def test_spans_nest():
    found = [(span.label[0], span.start, span.end) for span in spans(*_nested())]
    assert found == [("step", 0.0, 10.0), ("forward", 1.0, 9.0), ("all_reduce", 3.0, 6.5)]


def test_a_blocking_collective_is_one_span_and_an_asynchronous_one_two():
    launch, wait = ("send", 8, "pipeline"), ("wait for", "send", 8, "pipeline")

    def labels(gap):
        found = [Span(launch, "pipeline", 0.0, 1.0), Span(wait, "pipeline", 1.0 + gap, 2.0)]
        return [(span.label, span.end) for span in joined(found)]

    assert labels(gap=1e-6) == [(launch, 2.0)]
    assert labels(gap=0.5) == [(launch, 1.0), (wait, 2.0)]


class _Event:
    """A device event: it has passed once the device has come so far."""

    device, made = 0.0, 0

    def __init__(self, enable_timing):
        assert enable_timing
        _Event.made += 1

    def record(self, stream):
        stream.append(self)
        self.time = float(len(stream))

    def query(self):
        return self.time <= _Event.device

    def synchronize(self):
        _Event.device = max(_Event.device, self.time)

    def elapsed_time(self, later):
        assert self.query() and later.query(), "read before the device has passed it"
        return (later.time - self.time) * 1000


def test_device_clock_reads_events_only_once_they_have_passed():
    stream = []
    clock = DeviceClock(_Event, lambda: stream)
    clock.begin()
    moments = [clock.now() for _ in range(4)]
    assert not clock.ready(moments[-1])
    _Event.device = 4.0
    assert clock.ready(moments[-1])
    assert clock.seconds(moments) == [0.0, 1.0, 2.0, 3.0]
    again = [clock.now() for _ in range(4)]
    assert _Event.made == 4, "the events of a step that was read serve the next one"
    clock.wait(again[-1])
    assert clock.seconds(again) == [0.0, 1.0, 2.0, 3.0]


def test_links_without_the_loopback():
    table = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 1000000    4800    0    0    0     0          0         0  1000000    4800    0    0    0     0       0          0
  eth0: 70 10 0 0 0 0 0 0 30 20 0 0 0 0 0 0
  eth1:5000000 10 0 0 0 0 0 0 2 20 0 0 0 0 0 0
"""
    assert parse(table) == (32, 5000070)


def test_links_grow_and_a_system_without_them_says_nothing(tmp_path):
    counter = LinkCounter(tmp_path / "missing")
    assert counter.read() is None
    counter.close()
    table = tmp_path / "dev"
    table.write_text("a\nb\neth0: 1 0 0 0 0 0 0 0 2 0\n")
    counter = LinkCounter(table)
    assert counter.read() == (2, 1)
    table.write_text("a\nb\neth0: 9 0 0 0 0 0 0 0 8 0\n")
    assert counter.read() == (8, 9)
    counter.close()


@pytest.mark.parametrize(
    "label, name",
    [
        (("forward", 2), "forward 2"),
        (("reduce gradients",), "reduce gradients"),
        (("all_reduce", 1_200_000, "gradients"), "all_reduce 1.2 MB (data)"),
        (("wait for", "recv", 512, "pipeline"), "wait for recv 512 B (pipe)"),
        (("barrier", 0, "tensor"), "barrier (tensor)"),
    ],
)
def test_names_in_the_trace(label, name):
    assert _name(*label) == name


class _Engine:
    def step(self, value):
        return value + 1


def _twice(method, value):
    return 2 * method(value)


def _thrice(method, value):
    return 3 * method(value)


@pytest.mark.parametrize("first", [0, 1])
def test_hooks_nest_and_come_off_in_any_order(first):
    engine, other = _Engine(), _Engine()
    hooks = [MethodHook(engine, "step", _twice), MethodHook(engine, "step", _thrice)]
    assert engine.step(1) == 12 and other.step(1) == 2
    hooks[first].remove()
    assert engine.step(1) == (6 if first == 0 else 4)
    hooks[1 - first].remove()
    assert engine.step(1) == 2
    assert vars(engine) == {}


def test_a_hook_gives_back_what_the_object_held_itself():
    engine = _Engine()
    engine.step = own = lambda value: value
    hook = MethodHook(engine, "step", _twice)
    assert engine.step(1) == 2
    hook.remove()
    assert engine.step is own


def test_busy_share():
    zeros = dict.fromkeys(("pipeline", "gradients", "tensor", "optimizer"), 0.0)
    assert StepTimes(1, 0.0, 2.0, compute=0.5, other=1.5, **zeros).busy == 0.25


def test_of_many_ranks_the_busiest_and_the_idlest_are_shown():
    def rank(number):
        times = dict.fromkeys(("pipeline", "gradients", "tensor", "optimizer", "other"), 0.0)
        times = {"compute": float(number), **times}
        return RankTimes(f"rank {number}", 5, 100.0, times, 0.1, {}, None)

    ranks = [rank(number) for number in (3, 1, 0, 2, 8, 4, 5, 7, 6)]
    text = Summary(100.0, 0.1, ranks[0].times, {}, [(2e6, 1e6)], ranks).describe()
    assert [line.split("  ")[0] for line in text.splitlines()[2:4]] == ["rank 0", "rank 8"]
    assert text.splitlines()[-1] == "host 0: 2.000 MB sent, 1.000 MB received a step"
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1
