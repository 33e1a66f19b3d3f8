"""Part "head" of bench.py balance: so many items that the item head is about half of the compute.

No cut of four stages takes a whole head apart: it is the slowest stage of the best of them. So there are three comparisons: the
head whole in two stages and in four, and cut into blocks of items in four.
"""

from collections.abc import Iterator

from benchmarks.balance_job import Pipeline, best_of
from benchmarks.balance_straggler import profile, search

HEAD_BLOCKS = 8


def head(pipeline: Pipeline, options, label: str) -> Iterator[dict]:
    """Rows of kind "share" (of the head in a micro-batch's compute), "search", "profile" and "cut"."""
    facts = pipeline.facts
    pipeline.cut(facts["cuts"]["parameters"])
    seconds, last = pipeline.costs(most=1)["layer_seconds"], facts["blocks"][-1]
    share = sum(seconds[last + 1 :]) / sum(seconds)
    yield {"kind": "share", "head_share": share, "layer_seconds": seconds, "parameters": facts["parameters"]}
    rows = []
    for row in search(pipeline, options, label):
        rows.append(row)
        yield row
    profiled = profile(pipeline, facts["cuts"]["parameters"])
    yield profiled
    cuts = {**facts["cuts"], "profile": profiled["bounds"], "best": best_of(rows)}
    for row in pipeline.compare(cuts, options.repeats, options.steps, label):
        yield {"kind": "cut", **row}
