"""`bench.py head`: the item head's cross-entropy against its peers, on CPU: forward, backward, memory, collectives.

Peers: `naive`, F.cross_entropy of all scores; `deepspeed`, its vocab_parallel_linear_cross_entropy with its defaults;
`deepspeed_chunked`, the same with large chunks (only with --peers); `torch`, F.linear_cross_entropy in chunks. Only
DeepSpeed's is tensor-parallel too. The processes of one shape take turns, in an order that rotates.
"""

import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from benchmarks import plots
from benchmarks.harness import markdown
from benchmarks.head_peers import Peer, obstacle
from benchmarks.repeats import groups, interleaved, median, spread

HELP = "time, memory and collectives of the item head's cross-entropy against its peers"
_SHAPES = [(256, 64, 1_000_000), (512, 1024, 262_144), (4096, 64, 1_000_000)]  # positions, hidden size, items
_QUICK = [(32, 32, 20_000), (128, 16, 20_000)]
_PEERS = {"ours": "ours", "naive": "naive", "deepspeed": "DeepSpeed", "torch": "torch"}
_NAMES = {**_PEERS, "deepspeed_chunked": "DeepSpeed, large chunks"}
_PLACE = ("positions", "hidden", "items", "tensor")


def arguments(parser) -> None:
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="a peer that has used these is not repeated")
    parser.add_argument("--peers", nargs="+", choices=_NAMES, default=list(_PEERS))


def measure(options) -> Iterator[dict]:
    """One row per peer, shape, tensor size and repeat; "skipped" holds the reason where a peer cannot run."""
    os.environ.update(OMP_NUM_THREADS=str(options.threads), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    for shape in _QUICK if options.quick else _SHAPES:
        for tensor in (1, 2):
            yield from _at(dict(zip(_PLACE, (*shape, tensor), strict=True)), options)


def _at(place: dict, options) -> Iterator[dict]:
    """All peers at one shape, in turns until each has its repeats or has used its time."""
    peers, losses = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in options.peers:
                reason = obstacle(name, place)
                if reason:
                    yield {"peer": name, **place, "skipped": reason}
                else:
                    peers[name] = Peer(name, place, options.threads, f"{scratch}/{name}")
            for peer in peers.values():
                peer.ready()
            arms = {name: peer.step for name, peer in peers.items()}
            repeats = 1 if options.quick else options.repeats
            label = "N {positions}, H {hidden}, V {items:,}, tensor {tensor}".format(**place)
            for row in interleaved(arms, repeats, warmup=0, budget_s=options.seconds, progress=label):
                losses += [row["loss"]] if "loss" in row else []
                yield {"peer": row.pop("arm"), **place, **row}
        finally:
            for peer in peers.values():
                peer.stop()
    if losses and max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise RuntimeError(f"the peers' losses differ at {place}: {min(losses)} to {max(losses)}")


def figures(rows: list[dict]) -> dict:
    """The worst of all shapes; None where no shape has both."""
    medians = _medians(rows)
    ours = {place: m["ours"] for place, m in medians.items() if "ours" in m}
    against = [
        medians[p]["deepspeed"]["forward"] / m["forward"]
        for p, m in ours.items()
        if "deepspeed" in medians[p] and p[2] / p[1] >= 256
    ]
    peers = {p: [m["step"] for name, m in medians[p].items() if name != "ours"] for p in ours}
    behind = [m["step"] / min(peers[p]) for p, m in ours.items() if peers[p]]
    largest = max((p[0] * p[2] for p in ours), default=None)
    return {
        "forward_speedup_vs_deepspeed": min(against, default=None),
        "step_time_vs_fastest_peer": max(behind, default=None),
        "all_reduces_per_step": max((m["all_reduces"] for m in ours.values()), default=None),
        "peak_extra_gb": max((m["peak"] for p, m in ours.items() if p[0] * p[2] == largest), default=None),
    }


def table(rows: list[dict]) -> str:
    """Forward + backward in seconds, medians; the fastest of a line is bold."""
    medians = _medians(rows)
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    why = {(_place(row), row["peer"]): row.get("skipped") or row.get("error") for row in rows}
    lines, previous = [], None
    for place in dict.fromkeys(_place(row) for row in rows):
        here = medians.get(place, {})
        fastest = min((m["step"] for m in here.values()), default=None)
        shape = "{:,}, {:,}, {:,}".format(*place[:3])
        line = ["" if shape == previous else shape, place[3]]
        for peer in peers:
            m = here.get(peer)
            text = f"{m['forward']:.2f} + {m['backward']:.2f}" if m else why.get((place, peer)) or ""
            line.append(f"**{text}**" if m and m["step"] == fastest else text.replace("not tensor-parallel", ""))
        reduces = " / ".join(f"{here[peer]['all_reduces']:,}" for peer in ("ours", "deepspeed") if peer in here)
        memory = f"{1e3 * here['ours']['peak']:.0f} MB" if "ours" in here else ""
        lines.append([*line, reduces if place[3] > 1 else "", memory, _repeats(here.values())])
        previous = shape
    header = ["positions, hidden size, items", "tensor", *(_NAMES[peer] for peer in peers)]
    header += ["all-reduces, ours / DeepSpeed", "extra memory, ours", "repeats, largest spread"]
    return markdown(header, lines)


def plot(rows: list[dict], path: Path) -> None:
    medians = _medians(rows)
    palette = plots.colours(_NAMES)
    widest = max(len(here) for here in medians.values())
    with plots.drawing(path, 2, len(medians), width=2.2, height=2.8) as axes:
        for (seconds, memory), (place, here) in zip(axes.T, medians.items(), strict=True):
            for peer, m in here.items():
                seconds.bar(_NAMES[peer], m["forward"], color=palette[peer])
                seconds.bar(_NAMES[peer], m["backward"], bottom=m["forward"], color=palette[peer], alpha=0.5)
                memory.bar(_NAMES[peer], 1e3 * m["peak"], color=palette[peer])
            seconds.set_title("N {:,}, H {:,}\nV {:,}, tensor {}".format(*place))
            for axis in (seconds, memory):
                axis.set_xlim(-0.6, widest - 0.4)
                axis.tick_params(axis="x", rotation=45)
        axes[0, 0].set_ylabel("seconds: forward, backward (pale)")
        axes[1, 0].set_ylabel("MB beyond inputs, outputs, gradients")


def _repeats(medians: Collection[dict]) -> str:
    """How often the peers ran, and the largest of their step times' spreads."""
    counts = sorted({m["repeats"] for m in medians})
    text = " to ".join(str(count) for count in dict.fromkeys((*counts[:1], *counts[-1:])))
    return text if counts[-1:] in ([], [1]) else f"{text}, ± {100 * max(m['spread'] for m in medians):.0f} %"


def _place(row: dict) -> tuple[int, int, int, int]:
    return tuple(row[key] for key in _PLACE)


def _medians(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """place -> peer -> medians over the repeats, and the spread of the step time."""
    found = {}
    for (*place, peer), group in groups(rows, *_PLACE, "peer").items():
        steps = [row["forward_s"] + row["backward_s"] for row in group]
        found.setdefault(tuple(place), {})[peer] = {
            "forward": median(row["forward_s"] for row in group),
            "backward": median(row["backward_s"] for row in group),
            "step": median(steps),
            "spread": spread(steps),
            "repeats": len(steps),
            "peak": max(row["peak_extra_gb"] for row in group),
            "all_reduces": max(row["collectives"].get("all_reduce", 0) for row in group),
        }
    return found
