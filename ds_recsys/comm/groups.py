"""Process groups of our own, apart from DeepSpeed's, and where in the grid of ranks this one stands."""

import torch.distributed as dist
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank, bwc_tensor_model_parallel_world_size


def group_of(ranks: list[int], **options) -> dist.ProcessGroup:
    """A new group of `ranks`, which this one is among; every rank of the world calls it at once, each with its own group's.

    What a background thread sends there cannot meet what DeepSpeed sends. `options` go to `new_group`.
    """
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(ranks))
    groups = {tuple(some): dist.new_group(some, **options) for some in dict.fromkeys(map(tuple, everyone))}
    return groups[tuple(ranks)]


def group_like(group: dist.ProcessGroup, **options) -> dist.ProcessGroup:
    """The same ranks in a new group. Collective over the world."""
    return group_of(dist.get_process_group_ranks(group), **options)


def replica_group(data_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A new group of the ranks that hold one replica between them: those with one place on the data axis. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dist.get_rank(data_group))
    own = everyone[dist.get_rank()]
    return group_of([rank for rank, place in enumerate(everyone) if place == own])


def survivors(engine) -> dist.ProcessGroup | None:
    """The ranks that are left when replicas of an engine in mode "async" are lost; None where all are there."""
    return getattr(getattr(engine, "data_parallel", None), "world", None)


def data_place(engine) -> tuple[int, int]:
    """(place, number) of this rank's replica among those of a PipelineEngine that are left."""
    mode = getattr(engine, "data_parallel", None)
    if mode is not None and mode.world is not None:
        return mode.members.index(mode.data_rank), len(mode.members)
    return engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()


def place_of(engine, data_group: dist.ProcessGroup) -> dict[str, int]:
    """Where this rank stands: what a file of its own in a checkpoint is good for."""
    return {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "pipe_rank": engine.grid.get_stage_id() if engine.pipeline_parallelism else 0,
        "data_rank": dist.get_rank(data_group),
        "data_size": dist.get_world_size(data_group),
        "tensor_rank": bwc_tensor_model_parallel_rank(engine.mpu),
        "tensor_size": bwc_tensor_model_parallel_world_size(engine.mpu),
    }
