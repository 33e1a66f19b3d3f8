"""`bench.py head`: the item head's cross-entropy against its peers, on CPU, every peer in processes of its own.

Peers: `naive`, F.cross_entropy of all scores; `deepspeed`, its vocab_parallel_linear_cross_entropy with its defaults;
`deepspeed_chunked`, the same with large chunks (only with --peers); `torch`, F.linear_cross_entropy in chunks. Only
DeepSpeed's is tensor-parallel too. The processes of one shape take turns, in an order that rotates.
"""

import ctypes
import gc
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

_SHAPES = [(256, 64, 1_000_000), (512, 1024, 262_144), (4096, 64, 1_000_000)]  # positions, hidden size, items
_QUICK = [(32, 32, 20_000), (128, 16, 20_000)]
# The fastest of 32, 64, 128, 256 and all positions at these shapes; the default here is chunks of one position.
_TORCH_CHUNK = {256: 128, 512: 512, 4096: 128}
_PEERS = ["ours", "naive", "deepspeed", "torch"]
_COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all",
]


def head(options) -> dict:
    """Forward and backward time, memory and collectives of the item head's cross-entropy against its peers."""
    os.environ.update(OMP_NUM_THREADS=str(options.threads), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    rows = []
    for shape in _QUICK if options.quick else _SHAPES:
        for tensor in (1, 2):
            rows += _measure(shape, tensor, options)
            print(_table([row for row in rows if _place(row) == (*shape, tensor)]), flush=True)
    figures = _figures(rows)
    print("\n".join(f"{name}: {value:.3g}" for name, value in figures.items()))
    if options.json:
        _plot(rows, Path(options.json).with_suffix(".png"))
    return {"rows": rows, "figures": figures}


def arguments(command) -> None:
    command.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    command.add_argument("--threads", type=int, default=1, help="of every process")
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--seconds", type=float, default=12.0, help="a peer that has used these is not repeated")
    command.add_argument("--peers", nargs="+", choices=[*_PEERS, "deepspeed_chunked"], default=_PEERS)


def _measure(shape: tuple[int, int, int], tensor: int, options) -> list[dict]:
    """Rows of all peers at one shape, every one run in turn until it has its repeats or has used its time."""
    place = dict(zip(("positions", "hidden", "items", "tensor"), (*shape, tensor), strict=True))
    peers, rows = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in options.peers:
                reason = _obstacle(name, shape, tensor)
                if reason:
                    rows.append({"peer": name, **place, "skipped": reason})
                else:
                    peers[name] = _Peer(name, shape, tensor, options.threads, f"{scratch}/{name}")
            for peer in peers.values():
                peer.ready()
            for repeat in range(2 if options.quick else options.repeats):
                order = [name for name in peers if repeat == 0 or peers[name].used < options.seconds]
                for name in order[repeat % max(len(order), 1) :] + order[: repeat % max(len(order), 1)]:
                    rows.append({"peer": name, **place, "repeat": repeat, **peers[name].step()})
        finally:
            for peer in peers.values():
                peer.stop()
    losses = [row["loss"] for row in rows if "loss" in row]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise RuntimeError(f"the peers' losses differ at {place}: {min(losses)} to {max(losses)}")
    return rows


def _obstacle(name: str, shape, tensor: int) -> str | None:
    positions, _, items = shape
    if name in ("naive", "torch") and tensor > 1:
        return "not tensor-parallel"
    needed, free = 3 * 4 * positions * items / 1e9, _proc("/proc/meminfo", "MemAvailable") / 1e9
    if name == "naive" and needed > 0.8 * free:  # scores, their log-softmax and the gradient of one of them
        return f"its {needed:.0f} GB of scores exceed the {free:.0f} GB available"
    return None


class _Peer:
    """The processes, one a tensor rank, that run one peer at one shape."""

    def __init__(self, name, shape, tensor, threads, store):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "deepspeed", "deepspeed.sequence.linear_cross_entropy", "ds_recsys"])
        self.used, self._pipes, self._processes = 0.0, [], []
        for rank in range(tensor):
            here, there = context.Pipe()
            arguments = (name, shape, tensor, rank, threads, store, there)
            process = context.Process(target=_work, args=arguments, daemon=True)
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
        self.used += max(row["forward_s"] + row["backward_s"] for row in ranks)
        largest = {key: max(row[key] for row in ranks) for key in ("forward_s", "backward_s", "peak_extra_gb")}
        return {**ranks[0], **largest}

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(name, shape, tensor, rank, threads, store, pipe) -> None:
    import torch
    import torch.distributed as dist

    from ds_recsys.head.shard import HeadShard, rows_of
    from ds_recsys.topology import TensorAxis, init_distributed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # from DeepSpeed's gathers
    torch.set_num_threads(threads)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tensor))
    init_distributed(init_method=f"file://{store}", rank=rank, world_size=tensor)
    counts = _count_collectives(dist)
    positions, width, items = shape
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


def _place(row: dict) -> tuple[int, int, int, int]:
    return row["positions"], row["hidden"], row["items"], row["tensor"]


def _medians(rows: list[dict]) -> dict:
    """(place, peer) -> medians over repeats."""
    groups = {}
    for row in rows:
        if "skipped" not in row:
            groups.setdefault((_place(row), row["peer"]), []).append(row)
    return {
        key: {
            "forward": statistics.median(row["forward_s"] for row in group),
            "backward": statistics.median(row["backward_s"] for row in group),
            "step": statistics.median(row["forward_s"] + row["backward_s"] for row in group),
            "peak": max(row["peak_extra_gb"] for row in group),
            "collectives": max(sum(row["collectives"].values()) for row in group),
            "all_reduces": max(row["collectives"].get("all_reduce", 0) for row in group),
        }
        for key, group in groups.items()
    }


def _figures(rows: list[dict]) -> dict:
    medians = _medians(rows)
    places = list(dict.fromkeys(_place(row) for row in rows))
    ours = {place: medians[place, "ours"] for place in places}
    against = {
        p: medians[p, "deepspeed"]["forward"] / ours[p]["forward"] for p in places if (p, "deepspeed") in medians
    }
    fastest = {p: min(m["step"] for (q, peer), m in medians.items() if q == p and peer != "ours") for p in places}
    largest = max(place[0] * place[2] for place in places)
    return {
        "forward_speedup_vs_deepspeed": min(ratio for p, ratio in against.items() if p[2] / p[1] >= 256),
        "step_time_vs_fastest_peer": max(ours[p]["step"] / fastest[p] for p in places),
        "all_reduces_per_step": max(m["all_reduces"] for m in ours.values()),
        "peak_extra_gb": max(m["peak"] for p, m in ours.items() if p[0] * p[2] == largest),
    }


def _table(rows: list[dict]) -> str:
    positions, hidden, items, tensor = _place(rows[0])
    lines = [f"\nN {positions}, H {hidden}, V {items:,}, tensor {tensor}"]
    lines.append(f"{'':18} {'forward s':>10} {'backward s':>10} {'peak GB':>8} {'collectives':>11} {'repeats':>7}")
    for (_, peer), m in _medians(rows).items():
        repeats = sum(row["peer"] == peer for row in rows)
        times = f"{m['forward']:10.3f} {m['backward']:10.3f} {m['peak']:8.3f}"
        lines.append(f"{peer:18} {times} {m['collectives']:11} {repeats:7}")
    lines += [f"{row['peer']:18} skipped: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n".join(lines)


def _plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    medians = _medians(rows)
    places = list(dict.fromkeys(place for place, _ in medians))
    peers = list(dict.fromkeys(peer for _, peer in medians))
    figure, axes = plt.subplots(2, len(places), figsize=(2.6 * len(places), 6), squeeze=False)
    for column, place in enumerate(places):
        time_axis, memory_axis = axes[:, column]
        here = [(i, peer, medians[place, peer]) for i, peer in enumerate(peers) if (place, peer) in medians]
        for i, peer, m in here:
            time_axis.bar(peer, m["forward"], color=f"C{i}")
            time_axis.bar(peer, m["backward"], bottom=m["forward"], color=f"C{i}", alpha=0.5)
            memory_axis.bar(peer, m["peak"], color=f"C{i}")
        time_axis.set_title("N {}, H {}\nV {:,}, tensor {}".format(*place), fontsize=9)
        for axis in (time_axis, memory_axis):
            axis.tick_params(axis="x", rotation=30, labelsize=8)
    axes[0, 0].set_ylabel("seconds: forward, backward (pale)")
    axes[1, 0].set_ylabel("GB beyond inputs, outputs, gradients")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
