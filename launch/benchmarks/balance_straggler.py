"""Parts "straggler" and "hardware" of bench.py balance: a device that slows down in mid-run, and devices that differ.

Theory, for L equal blocks on four stages and M micro-batches: with one device at half speed the even cut takes
(M - 1) 2t + 5t, t being a stage's time before, and the best one (M + 3) 8/7 t. 28 units of work (27 blocks and a head that
costs about as much as one) go 7 7 7 7 and then 8 4 8 8; M = 32 makes that 1.67 times as fast, and no cut gives back more
than 3.5/4 of what it was before.
"""

from collections.abc import Iterator
from statistics import median

from benchmarks.balance_job import Pipeline, best_of

SLOWED = 1  # the stage
_STEPS_BEFORE, _STEPS_TO_ACT, _STEPS_AFTER = 9, 10, 8
_STEPS_TO_PROFILE = 24  # the first samples and a few steps more, at three cuts


def straggler(pipeline: Pipeline, options) -> Iterator[dict]:
    """Rows of kind "search", "cut" and "trial".

    A trial goes from DeepSpeed's `parameters` cut: some steps, the change, the steps in which `AdaptivePartition` has to act,
    and some more. Every trial is followed by steps of the static cuts and the one it reached, at the speeds after the change,
    and of the static ones at those before.
    """
    even = list(pipeline.speeds)
    slow = [speed / 2 if stage == SLOWED else speed for stage, speed in enumerate(even)]
    cuts = pipeline.facts["cuts"]
    pipeline.speed(slow)
    rows = []
    for row in search(pipeline, options, "after the change"):
        rows.append(row)
        yield row
    known = {**cuts, "best": best_of(rows)}
    for repeat in range(options.repeats):
        pipeline.speed(even)
        pipeline.cut(cuts["parameters"])
        trial = {"kind": "trial", "repeat": repeat, **_trial(pipeline, slow)}
        yield trial
        reached = trial["moves"][-1]["bounds"] if trial["moves"] else cuts["parameters"]
        all_cuts = {**known, "reached": reached}
        for row in pipeline.compare(all_cuts, 1, options.steps, f"pipe {len(even)}, cuts after the change"):
            yield {"kind": "cut", "when": "after", **row, "repeat": repeat}
        pipeline.speed(even)
        for row in pipeline.compare(cuts, 1, options.steps, f"pipe {len(even)}, static cuts before the change"):
            yield {"kind": "cut", "when": "before", **row, "repeat": repeat}


def hardware(pipeline: Pipeline, options) -> Iterator[dict]:
    """Rows of kind "search", "profile" and "cut": half of the devices have half of the others' speed from the start."""
    even, pipe = list(pipeline.speeds), len(pipeline.speeds)
    pipeline.speed([speed if stage < pipe // 2 else speed / 2 for stage, speed in enumerate(even)])
    rows = []
    for row in search(pipeline, options, "devices of two speeds"):
        rows.append(row)
        yield row
    cuts = pipeline.facts["cuts"]
    profiled = profile(pipeline, cuts["parameters"])
    yield profiled
    cuts = {**cuts, "profile": profiled["bounds"], "best": best_of(rows)}
    for row in pipeline.compare(cuts, options.repeats, options.steps, f"pipe {pipe}, devices of two speeds"):
        yield {"kind": "cut", **row}
    pipeline.speed(even)


def search(pipeline: Pipeline, options, label: str) -> Iterator[dict]:
    """Rows of kind "search": the cuts near the predicted best, from a profile of the `parameters` cut, measured."""
    pipeline.cut(pipeline.facts["cuts"]["parameters"])
    for row in pipeline.search(options.within, options.cuts, 1, options.steps, f"{label}: best cut"):
        yield {"kind": "search", **row}


def profile(pipeline: Pipeline, start: list[int]) -> dict:
    """What `AdaptivePartition(method="profile")` makes of a cut: a row of kind "profile"."""
    pipeline.cut(start)
    pipeline.watch("profile")
    steps = pipeline.steps(_STEPS_TO_PROFILE, timeline=False)
    found = pipeline.unwatch()
    bounds = found["moves"][-1]["bounds"] if found["moves"] else start
    return {"kind": "profile", "bounds": list(bounds), "moves": found["moves"], "acted": steps["moved"]}


def _trial(pipeline: Pipeline, slow: list[float]) -> dict:
    """Seconds of every step, which had the change before them (its number) and which ended with a move, the records."""
    pipeline.watch()
    parts = [pipeline.steps(_STEPS_BEFORE)]
    pipeline.speed(slow)
    parts += [pipeline.steps(count) for count in (_STEPS_TO_ACT, _STEPS_AFTER)]
    found = pipeline.unwatch()
    before, after = parts[0], parts[-1]
    moved, start = [], 0
    for part in parts:
        moved += [start + step for step in part["moved"]]
        start += len(part["seconds"])
    calm = [seconds for step, seconds in enumerate(after["seconds"]) if step not in after["moved"]]
    return {
        "seconds": [one for part in parts for one in part["seconds"]],
        "change": _STEPS_BEFORE,
        "moved": moved,
        "before": {"seconds": median(before["seconds"]), **{key: before[key] for key in ("split", "idle")}},
        "after": {"seconds": median(calm), **{key: after[key] for key in ("split", "idle")}},
        **found,
    }
