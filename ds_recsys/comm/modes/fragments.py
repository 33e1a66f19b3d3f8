"""Which weights travel together, and in which steps (Streaming DiLoCo, https://arxiv.org/abs/2501.18512). Pure."""

from collections.abc import Mapping, Sequence


def assign(stages: Sequence[Mapping[str, int]], count: int) -> dict[str, int]:
    """The fragment of each parameter: of about equal size in every stage, for each sends its own over links of its own.

    A weight that several stages hold is in one fragment, so that its copies change in the same steps.

    Args:
        stages: per pipeline stage {parameter: number of values}, in the order of the layers.
        count: of fragments; some stay empty where a stage has fewer parameters.
    """
    placed: dict[str, int] = {}
    for stage in stages:
        load = [0] * count
        for name, size in stage.items():
            if name in placed:
                load[placed[name]] += size
        for name in sorted(stage.keys() - placed.keys(), key=lambda name: (-stage[name], name)):
            placed[name] = load.index(min(load))
            load[placed[name]] += stage[name]
    return placed


def leaves(fragment: int, step: int, every: int, count: int) -> bool:
    """Whether a fragment leaves after `step` (1, 2, ...); each does so once in `every` steps, evenly one after another."""
    return (step - fragment * every // count) % every == 0
