"""What the calibration runs inside a host: a TCP sender, a TCP receiver, a busy loop. The standard library alone."""

import json
import os
import socket
import sys
import time

_RAMP_SECONDS = 0.1
_TIMEOUT_SECONDS = 10.0
_GAP_SECONDS = 0.0005  # the process was off its core


def receive(seconds: str) -> None:
    """Print the port, then the payload rate in bit/s over `seconds` after the ramp."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.settimeout(_TIMEOUT_SECONDS)
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        connection.settimeout(_TIMEOUT_SECONDS)
        buffer = bytearray(1 << 20)
        begin = time.monotonic() + _RAMP_SECONDS
        while (first := time.monotonic()) < begin:
            connection.recv_into(buffer)
        received, now = 0, first
        while now - first < float(seconds):
            received += connection.recv_into(buffer)
            now = time.monotonic()
    print(json.dumps(received * 8 / (now - first)))


def send(address: str, port: str) -> None:
    """Send to the receiver until it hangs up."""
    data = bytes(1 << 20)
    with socket.create_connection((address, int(port)), _TIMEOUT_SECONDS) as connection:
        try:
            while True:
                connection.sendall(data)
        except OSError:
            pass


def busy(core: str, start: str, seconds: str) -> None:
    """Spin on `core` from the time `start` on, print CPU time over wall time.

    A quota gives its share once a period. To count whole periods, both ends are moments at which the process got its
    core back.
    """
    os.sched_setaffinity(0, {int(core)})
    time.sleep(max(0.0, float(start) - time.monotonic()))
    begin = last = time.monotonic()
    marks = [(begin, time.process_time())]
    while last - begin < float(seconds):
        now = time.monotonic()
        if now - last > _GAP_SECONDS:
            marks.append((now, time.process_time()))
        last = now
    if len(marks) < 4:
        marks.append((last, time.process_time()))
    else:
        marks = marks[1:]
    (wall0, cpu0), (wall1, cpu1) = marks[0], marks[-1]
    print(json.dumps((cpu1 - cpu0) / (wall1 - wall0)))


def enter(group: str) -> None:
    """Move this process into the control group whose cgroup.procs file that is."""
    descriptor = os.open(group, os.O_WRONLY)
    os.write(descriptor, str(os.getpid()).encode())
    os.close(descriptor)


if __name__ == "__main__":
    enter(sys.argv[2])
    {"receive": receive, "send": send, "busy": busy}[sys.argv[1]](*sys.argv[3:])
