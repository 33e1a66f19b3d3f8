"""The contestants of `bench.py head`: one process per tensor rank, stepped by order, so that their turns can be interleaved."""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

# The fastest of 32, 64, 128, 256 and all positions at head.py's shapes; the default here is chunks of one position.
_TORCH_CHUNK = {256: 128, 512: 512, 4096: 128}
_COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
]


def obstacle(name: str, place: dict) -> str | None:
    """Why a peer cannot run there."""
    if name in ("naive", "torch") and place["tensor"] > 1:
        return "not tensor-parallel"
    needed, free = 3 * 4 * place["positions"] * place["items"] / 1e9, _proc("/proc/meminfo", "MemAvailable") / 1e9
    if name == "naive" and needed > 0.8 * free:  # scores, their log-softmax and the gradient of one of them
        return f"{needed:.0f} GB of scores, {free:.0f} GB are free"
    return None


class Peer:
    """The processes, one a tensor rank, that run one peer at one shape."""

    def __init__(self, name: str, place: dict, threads: int, store: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "deepspeed.sequence.linear_cross_entropy", "ds_recsys"])
        self._pipes, self._processes = [], []
        for rank in range(place["tensor"]):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(name, place, rank, threads, store, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def ready(self) -> None:
        for pipe in self._pipes:
            pipe.recv()

    def step(self) -> dict:
        """One forward and backward on all ranks; times and memory of the slowest and the largest."""
        for pipe in self._pipes:
            pipe.send("step")
        ranks = [pipe.recv() for pipe in self._pipes]
        largest = {key: max(row[key] for row in ranks) for key in ("forward_s", "backward_s", "peak_extra_gb")}
        return {**ranks[0], **largest}

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(name: str, place: dict, rank: int, threads: int, store: str, pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches every process; the parent ends this one
    import torch
    import torch.distributed as dist

    from ds_recsys.head.shard import HeadShard, rows_of
    from ds_recsys.topology import TensorAxis, init_distributed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # from DeepSpeed's gathers
    torch.set_num_threads(threads)
    positions, width, items, tensor = (place[key] for key in ("positions", "hidden", "items", "tensor"))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tensor))
    init_distributed(init_method=f"file://{store}", rank=rank, world_size=tensor)
    counts = _count_collectives(dist)
    start, stop = rows_of(items, tensor, rank)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator).requires_grad_()
    target = torch.randint(items, (positions,), generator=generator)
    generator.manual_seed(1 + rank)
    weight = torch.randn(stop - start, width, generator=generator).mul_(width**-0.5).requires_grad_()
    axis = TensorAxis(dist.group.WORLD if tensor > 1 else None, tensor, rank)
    loss = _loss(name, hidden, target, HeadShard(weight, items, start, axis=axis))
    pipe.send("ready")
    while pipe.recv() == "step":
        hidden.grad = weight.grad = None
        counts.clear()
        baseline = _reset_peak()
        if tensor > 1:
            dist.barrier()
        begin = time.perf_counter()
        value = loss()
        middle = time.perf_counter()
        value.backward()
        end = time.perf_counter()
        extra = _proc("/proc/self/status", "VmHWM") - baseline - weight.grad.nbytes - hidden.grad.nbytes
        row = {"forward_s": middle - begin, "backward_s": end - middle, "peak_extra_gb": max(0, extra) / 1e9}
        pipe.send({**row, "loss": value.item(), "collectives": dict(counts), "threads": threads})
        del value


def _loss(name: str, hidden, target, head):
    """The step of one peer: () -> the summed loss."""
    import torch
    import torch.nn.functional as F

    from ds_recsys.head.linear_cross_entropy import linear_cross_entropy

    if name == "ours":
        return lambda: linear_cross_entropy(hidden, target, head)
    if name == "naive":
        return lambda: F.cross_entropy(hidden @ head.weight.T, target, reduction="sum")
    if name == "torch":
        chunk = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=_TORCH_CHUNK.get(len(hidden), len(hidden)), chunking_method=None
        )
        return lambda: F.linear_cross_entropy(hidden, head.weight, target, reduction="sum", options=chunk)
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy

    bounds = {"vocab_start_index": head.first_row, "vocab_end_index": head.first_row + len(head.weight)}
    keywords = {"tp_group": head.axis.group, **bounds} if head.axis.size > 1 else {}
    keywords["chunk_size"] = 64 if name == "deepspeed_chunked" else None
    return lambda: vocab_parallel_linear_cross_entropy(hidden, head.weight, target, reduction="sum", **keywords)


def _count_collectives(dist) -> Counter:
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    return counts


def _reset_peak() -> int:
    """Give freed memory back to the system, start the high-water mark anew; bytes in use now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _proc("/proc/self/status", "VmRSS")


def _proc(file: str, key: str) -> int:
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
