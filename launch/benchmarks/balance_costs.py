"""Parts "overhead", "jitter", "pause" and "solver" of bench.py balance: what watching costs and what it does where nothing is
wrong, what a move costs, and what finding the best cut costs."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.balance_job import Pipeline
from benchmarks.repeats import interleaved

PATTERN = (False, True, True, False)  # a drift that is steady over four steps cancels out
JITTER = 0.1  # of a device's speed, up or down
_JITTER_SECONDS = 0.5  # between two changes
_SETTLING = 5  # steps after `watch`, of which the second to the fourth time single layers
_CHUNK = 50  # steps


def overhead(pipeline: Pipeline, rounds: int, steps: int) -> Iterator[dict]:
    """Rows of kind "overhead", of `steps` steps each, of which an `AdaptivePartition` looks at those that PATTERN says, and
    one of kind "watched", with the moves that it made.

    The machine's speed drifts within seconds by more than watching costs: only steps next to each other compare.
    """
    settle(pipeline)
    pipeline.watch()
    pipeline.steps(_SETTLING, timeline=False)
    for number in range(rounds):
        yield {"kind": "overhead", "repeat": number, **pipeline.steps(steps, timeline=False, pattern=PATTERN)}
    yield {"kind": "watched", "moves": pipeline.unwatch()["moves"]}


def jitter(pipeline: Pipeline, steps: int, seed: int = 0) -> Iterator[dict]:
    """Rows of kind "jitter", one for some steps each: all devices' speeds change at random while one partition watches."""
    settle(pipeline)
    pipeline.watch()
    with _jittered(pipeline, random.Random(seed)) as changes:
        for start in range(0, steps, _CHUNK):
            before = len(changes)
            row = pipeline.steps(min(_CHUNK, steps - start), timeline=False)
            yield {"kind": "jitter", "start": start, "jitter": JITTER, "changes": len(changes) - before, **row}
    pipeline.unwatch()


def pause(pipeline: Pipeline, repeats: int) -> Iterator[dict]:
    """Rows of kind "pause": the same change of bounds by `migrate`, there and back, and by a checkpoint.

    One boundary after the other goes a layer to the left, so that every stage but the first gets one.
    """
    here = pipeline.facts["cuts"]["parameters"]
    there = [here[0], *(bound - 1 for bound in here[1:-1]), here[-1]]
    pipeline.cut(here)

    def migration(bounds: list[int], back: list[int]):
        def run() -> dict:
            pipeline.cut(back)
            return pipeline.cut(bounds)

        return run

    def checkpoint() -> dict:
        pipeline.cut(here)
        parts = pipeline.reload(there)
        return {"seconds": sum(parts.values()), **parts}

    arms = {"migrate": migration(there, here), "migrate back": migration(here, there), "reload": checkpoint}
    for row in interleaved(arms, repeats, warmup=0, progress="pause"):
        yield {"kind": "pause", "bounds": [here, there], **row}


def solver(instances: int, layers: int = 100, stages: int = 16, micro_batches: int = 32) -> Iterator[dict]:
    """Rows of kind "solver": seconds of `partition` for layers that differ, devices of two speeds and links across hosts."""
    from ds_recsys.balance.costs import LayerCost, Link, PipelineCosts, StageCost
    from ds_recsys.balance.partition import partition

    draw = random.Random(0)
    for instance in range(instances):
        costs = PipelineCosts(
            [
                LayerCost(
                    draw.uniform(0.01, 0.03), draw.uniform(0.02, 0.06), trainable_bytes=10**7, boundary_bytes=10**5
                )
                for _ in range(layers)
            ],
            [StageCost(slowdown=draw.choice([1, 1, 1, 2])) for _ in range(stages)],
            [Link(1e-8, 1e-4, crosses_hosts=stage % 4 == 3) for stage in range(stages - 1)],
        )
        begin = time.perf_counter()
        partition(costs, micro_batches)
        seconds = time.perf_counter() - begin
        yield {"kind": "solver", "instance": instance, "layers": layers, "stages": stages, "seconds": seconds}


def settle(pipeline: Pipeline) -> None:
    """Cut it as the profile finds best, so that there is nothing to be gained."""
    pipeline.cut(pipeline.facts["cuts"]["parameters"])
    pipeline.cut(pipeline.costs(most=1)["cuts"][0]["bounds"])


@contextmanager
def _jittered(pipeline: Pipeline, generator: random.Random):
    """Every device's speed is drawn anew, over and over, in a thread; yields the list of what was set."""
    even, done, changes = list(pipeline.speeds), threading.Event(), []

    def change() -> None:
        while not done.wait(_JITTER_SECONDS):
            pipeline.speed([speed * (1 + generator.uniform(-JITTER, JITTER)) for speed in even])
            changes.append(list(pipeline.speeds))

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    try:
        yield changes
    finally:
        done.set()
        thread.join()
        pipeline.speed(even)
