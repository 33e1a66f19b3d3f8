"""One rank of a comparison of all-reduces: keeps the arms of a group ready and times them in turns.

The deepspeed launcher starts it on every device: compression_rank.py FOLDER, where FOLDER/job.json is {"values": n}.
Requests: {"do": "make", "method", "options"} -> a checked arm; {"do": "run", "method"} -> seconds; {"do": "drop"} -> no arms.

All ranks reduce the same random values times a power of two of their own, and the sum is a power of two times those values. A
compressor whose output is as large as its input, and which sends again what it once decoded without a further loss, as all here
do, then has to leave exactly the error that it has on one rank: that is what `check` asks for.
"""

import argparse
import json
import math
import os
import sys
import traceback
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.compression_arms import AllReduce, BFloat16Hook, Compressed, PowerSGDHook, Values, chosen
from benchmarks.compression_methods import AUTO, DENSE
from benchmarks.mailbox import serve

_HOOKS = {"ddp_bf16": BFloat16Hook, "ddp_powersgd": PowerSGDHook}


def check(arm: AllReduce, values: Values, method: str, options: dict) -> dict:
    """Reduce once without a residual: {"relative_error", "expected_error", "limit", "bits"}, and "wrong" if it is.

    The errors are squared. expected_error: the compressor's own on one rank, where that is known. limit: what the error must
    not exceed. bits: a checksum, to compare the ranks by.
    """
    arm.load()
    arm.seconds()
    error, lost = values.errors(arm.total)
    expected, limit = _expected(values, method, options, lost)
    found = {
        "relative_error": error,
        "expected_error": expected,
        "limit": limit,
        "bits": zlib.crc32(arm.total.numpy()),
    }
    if not error <= limit:
        found["wrong"] = f"{method}: the relative squared error {error:.3g} is above {limit:.3g}"
    elif expected is not None and abs(error - expected) > 0.05 * expected + 1e-12:
        found["wrong"] = f"{method}: the relative squared error is {error:.4g}, one rank's alone {expected:.4g}"
    return found


def _expected(values: Values, method: str, options: dict, lost: float) -> tuple[float | None, float]:
    """(expected error, limit). PowerSGD has no error of its own on one rank, but projects, so that it leaves what it lost."""
    if method == DENSE:
        return None, 1e-12
    if method == "ddp_bf16":
        return None, 2.0**-14  # rounded in each step of the ring
    if "powersgd" in method:
        return lost, 0.999
    if method == AUTO:
        return None, 0.999
    from ds_recsys.comm.compressors import compressor

    known = {key: value for key, value in options.items() if key not in ("method", "hierarchical")}
    own = compressor(options["method"], **known)
    result = torch.empty_like(values.mine)
    for mine, out in zip(values.split(values.mine), values.split(result), strict=True):
        out.copy_(mine if mine.dim() < 2 else own.decompress(own.compress(mine.flatten()), mine.numel()).view_as(mine))
    limit = max(own.contraction(math.prod(shape)) for _, shape in values.tensors)
    return values.errors(result * values.total)[0], limit


class Rank:
    """Answers the requests."""

    def __init__(self, values: int):
        self._values = Values(values, dist.get_rank(), dist.get_world_size())
        self._buffer = torch.empty(values)
        self._arms: dict[str, AllReduce] = {}

    def __call__(self, request: dict) -> dict:
        if request["do"] == "drop":
            self._arms.clear()
            return {}
        method = request["method"]
        if request["do"] == "make":
            return self._checked(method, request["options"])
        arm = self._arms[method]
        arm.load()
        before = arm.bytes_sent
        seconds = arm.seconds()
        return {"seconds": seconds, "bytes": arm.bytes_sent - before}

    def _checked(self, method: str, options: dict) -> dict:
        try:
            arm = self._arms[method] = self._make(method, options)
            return {**check(arm, self._values, method, options), "choice": arm.choice}
        except Exception as error:  # on all ranks alike: the comparison goes on without this arm
            traceback.print_exc()
            return {"wrong": f"{type(error).__name__}: {error}"}

    def _make(self, method: str, options: dict) -> AllReduce:
        if method == DENSE:
            return AllReduce(self._values, self._buffer)
        if method in _HOOKS:
            return _HOOKS[method](self._values, self._buffer)
        if method == AUTO:
            return chosen(self._values, self._buffer)
        return Compressed(self._values, self._buffer, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    serve(folder, int(os.environ["RANK"]), Rank(job["values"]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
