"""Runs one rank under the deepspeed launcher: enters its device's control group and core, keeps its log, notes how it ended.

Started as a file of its own, with the standard library alone, so that it costs next to nothing. Its parent half stays
outside the device's group, and records the exit status, which the launcher keeps to itself.
"""

import json
import os
import signal
import sys
import time


def main(job_file: str) -> int:
    with open(job_file) as file:
        job = json.load(file)
    rank, device, host = os.environ["RANK"], int(os.environ["LOCAL_RANK"]), os.environ["DS_RECSYS_HOST"]
    pid = os.fork()
    if pid == 0:
        try:
            _become(job, rank, job["groups"][host][device], job["cores"][host][device])
        except BaseException as error:  # this half must never return
            print(f"cannot start rank {rank}: {error}", file=sys.stderr, flush=True)
            os._exit(127)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they reach the other half too, whose end is to be recorded
    record = {"rank": int(rank), "host": host, "device": device, "pid": pid, "started": _started(pid)}
    _write(job, rank, record)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _write(job, rank, {**record, "status": status, "ended": time.monotonic()})
    return status if status >= 0 else 128 - status


def _become(job, rank, group, core):
    if group:
        descriptor = os.open(group, os.O_WRONLY)
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)
        os.sched_setaffinity(0, {core})
    log = os.open(os.path.join(job["log_dir"], f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a simulated device is a share of a CPU core
    os.execvp(job["command"][0], job["command"])


def _started(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _write(job, rank, record):
    path = os.path.join(job["state_dir"], f"rank{rank}.json")
    with open(path + ".draft", "w") as file:
        json.dump(record, file)
    os.rename(path + ".draft", path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
