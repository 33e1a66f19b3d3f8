"""What a moment is: the host's clock where the host computes, an event on the device's stream where a device does."""

import time

from deepspeed.accelerator import get_accelerator


class HostClock:
    """Moments of `time.perf_counter`: with gloo on CPU a call returns when its work is done."""

    now = staticmethod(time.perf_counter)

    def begin(self) -> None:
        """A step begins."""

    def ready(self, moment: float) -> bool:
        return True

    def wait(self, moment: float) -> None:
        """The moment is past."""

    def seconds(self, moments: list[float]) -> list[float]:
        """Seconds from the first moment to each."""
        return [moment - moments[0] for moment in moments]


class DeviceClock:
    """Moments of the stream that the step began on, as events that are read once they have passed.

    Recording one does not wait for the device. Work on other streams counts only where this stream waits for it.

    Args:
        event: the device's event class, as `torch.cuda.Event`.
        current_stream: returns the stream that is current, as `torch.cuda.current_stream`.
    """

    def __init__(self, event, current_stream):
        self._event, self._current_stream = event, current_stream
        self._stream, self._free = None, []

    def begin(self) -> None:
        """A step begins: its moments are those of the stream that is current now."""
        self._stream = self._current_stream()

    def now(self):
        event = self._free.pop() if self._free else self._event(enable_timing=True)
        event.record(self._stream)
        return event

    def ready(self, moment) -> bool:
        """Whether the device has passed it."""
        return moment.query()

    def wait(self, moment) -> None:
        moment.synchronize()

    def seconds(self, moments: list) -> list[float]:
        """Seconds from the first moment to each; the moments are used up."""
        passed = [moments[0].elapsed_time(moment) / 1000 for moment in moments]
        self._free.extend(moments)
        return passed


def clock_of_this_device() -> HostClock | DeviceClock:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return HostClock()
    return DeviceClock(accelerator.Event, accelerator.current_stream)
