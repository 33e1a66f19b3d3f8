"""Which axis of the grid a process group spans, and so what waiting in it is waiting for."""

from collections.abc import Iterable

import torch
from deepspeed.pipe import PipelineModule


class Axes:
    """The grid of an engine: PipelineModule's topology, else a model-parallel unit's tensor group, else data alone."""

    def __init__(self, engine):
        self._topology = engine.module.topology() if isinstance(engine.module, PipelineModule) else None
        self._tensor_ranks = set()
        if self._topology is None and getattr(engine, "mpu", None) is not None:
            group = engine.mpu.get_model_parallel_group()
            self._tensor_ranks = set(torch.distributed.get_process_group_ranks(group))

    def category(self, ranks: Iterable[int]) -> str | None:
        """ "pipeline", "gradients" (the data axis) or "tensor"; None for a rank alone.

        A group that spans several axes counts for the first of them in this order: that one is waited for last.
        """
        ranks = set(ranks)
        if len(ranks) == 1:
            return None
        if self._topology is None:
            return "tensor" if ranks <= self._tensor_ranks else "gradients"
        places = [self._topology.get_coord(rank) for rank in ranks]
        varying = {axis for axis in places[0]._fields if len({getattr(place, axis) for place in places}) > 1}
        if "pipe" in varying:
            return "pipeline"
        return "gradients" if "data" in varying else "tensor"

    def place(self, rank: int) -> str:
        """Such as "pipe 1 data 0 tensor 1"."""
        if self._topology is None:
            return f"data {rank}"
        names = {"model": "tensor"}  # DeepSpeed's name of the tensor axis
        place = self._topology.get_coord(rank)._asdict()
        return " ".join(f"{names.get(axis, axis)} {index}" for axis, index in place.items())
