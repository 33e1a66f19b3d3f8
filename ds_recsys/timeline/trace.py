"""One step of all ranks as a file for chrome://tracing and https://ui.perfetto.dev.

The format is the JSON array of complete events of
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (Trace Event Format).
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from ds_recsys.timeline.recorder import Span

_AT_ONCE = 50e-6  # seconds between a launch and its wait in a blocking call
_AXIS = {"pipeline": "pipe", "gradients": "data", "tensor": "tensor"}


def write_trace(path: str | Path, step: tuple[float, list[Span]], place: str) -> None:
    """Gather every rank's (start, spans) and write the file on rank 0. Collective over the world.

    A rank is a process of the trace. Ranks are put on one axis by their hosts' clocks (`time.time()`), so between hosts the
    shift is what their clocks differ by.
    """
    rank = torch.distributed.get_rank()
    ranks = [None] * torch.distributed.get_world_size() if rank == 0 else None
    torch.distributed.gather_object((place, *step), ranks)
    if rank:
        return
    begin = min(start for _, start, _ in ranks)
    events = []
    for number, (where, start, found) in enumerate(ranks):
        names = {"process_name": f"rank {number}: {where}", "process_sort_index": number}
        events += [
            {
                "ph": "M",
                "name": key,
                "pid": number,
                "tid": 0,
                "args": {"sort_index" if "sort" in key else "name": value},
            }
            for key, value in names.items()
        ]
        events += [_event(span, number, start - begin) for span in joined(found)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f"{path.name}.new")
    whole.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    os.replace(whole, path)


def joined(found: list[Span]) -> list[Span]:
    """A blocking collective, which is launched and then waited for, as one span."""
    together = []
    for span in found:
        before = together[-1] if together else None
        if before and span.label == ("wait for", *before.label) and span.start - before.end < _AT_ONCE:
            together[-1] = replace(before, end=span.end)
        else:
            together.append(span)
    return together


def _event(span: Span, rank: int, shift: float) -> dict:
    start, end = (round((shift + moment) * 1e6, 3) for moment in (span.start, span.end))
    return {
        "ph": "X",
        "name": _name(*span.label),
        "cat": span.category,
        "pid": rank,
        "tid": 0,
        "ts": start,
        "dur": round(end - start, 3),
    }


def _name(label: str, *details) -> str:
    if label == "wait for":
        return f"wait for {_name(*details)}"
    if len(details) == 2:  # a collective: bytes and category
        size, category = details
        return f"{label} {_size(size)} ({_AXIS[category]})" if size else f"{label} ({_AXIS[category]})"
    return " ".join([label, *map(str, details)])


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
