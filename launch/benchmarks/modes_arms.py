"""What bench.py modes compares: names of the modes and compressors, and the settings of each."""

from pathlib import Path

from benchmarks import compression_training
from benchmarks.compression_methods import DENSE

SYNC, ALONE, AHEAD = "sync", "alone", "ahead"
MODES = (SYNC, "delayed", AHEAD, "local_sgd", "diloco", "async")
METHODS = ("none", "int8")
_LOCAL = ("local_sgd", "diloco")
_NEVER = 1_000_000  # steps: longer than any run here
_TOGETHER = 3  # arms beside the references
# windows of a step: with the quick start's 16, half a core would spend a third of a step on sending and receiving
BATCH, _LEARNING_RATE = 64, 2e-3
_TITLES = {
    ALONE: "each replica alone",
    "delayed": "delayed",
    AHEAD: "delayed, looking ahead",
    "local_sgd": "local SGD",
    "diloco": "DiLoCo",
    "async": "async",
}


def arm(mode: str, method: str) -> str:
    """One name for both, in figures."""
    return mode if method == "none" else f"{mode}_{method}"


def title(mode: str, method: str = "none") -> str:
    """For people."""
    name = _TITLES.get(mode, mode)
    return name if method == "none" else f"{name}, {method}"


def settings(
    config: Path, mode: str, method: str, ranks: int, every: int, data: str | None = None, batch: int | None = None
) -> dict:
    """Dotted keys over the config: plain data parallelism of one micro-batch, the mode, and what compresses it.

    With `batch` windows a step in place of the config's, the learning rate is that of BATCH.
    ALONE never sends: replicas of local SGD whose first average is beyond the end of every run.
    """
    found = compression_training.settings(config, DENSE if method == "none" else method, ranks, data)
    if batch:
        found |= {"train_batch_size": batch, "train_micro_batch_size_per_gpu": batch // ranks}
        found["optimizer.params.lr"] = _LEARNING_RATE
    if mode != SYNC:
        found["recsys.data_parallel.mode"] = {ALONE: "local_sgd", AHEAD: "delayed"}.get(mode, mode)
    if mode == AHEAD:
        found["recsys.data_parallel.look_ahead"] = True
    if mode in (ALONE, *_LOCAL):
        found["recsys.data_parallel.every"] = _NEVER if mode == ALONE else every
    return found


def margin(mode: str, every: int) -> int | None:
    """More steps than one replica can be ahead of another; None where they need not take equally many."""
    return None if mode in (ALONE, "async") else every + 2 if mode in _LOCAL else 4


def groups(modes: list[str], methods: list[str]) -> list[list[tuple[str, str]]]:
    """(mode, method) of the jobs that are up at once: more than five take the memory from each other, and a step's time grows.

    Each group has what the others are compared with: replicas alone, and dense synchronous training. Looking ahead, dense and
    compressed, has a group of its own.
    """
    references = [(ALONE, "none"), (SYNC, "none")]
    found = []
    others = [mode for mode in modes if mode != AHEAD]
    for method in methods:
        arms = [(mode, method) for mode in others if (mode, method) not in references]
        size = -(-len(arms) // -(-len(arms) // _TOGETHER)) if arms else 1
        found += [[*references, *arms[start : start + size]] for start in range(0, len(arms), size)]
    if AHEAD in modes:
        arms = [(mode, method) for method in methods for mode in (SYNC, AHEAD) if (mode, method) not in references]
        found.append([*references, *arms])
    return found
