"""A mode in checkpoints: a file per rank beside DeepSpeed's, which itself holds the weights of `Mode.consensus`."""

import logging
from pathlib import Path

import torch

from ds_recsys.errors import UserError

logger = logging.getLogger("ds_recsys")

_GRID = ("pipe_rank", "tensor_rank", "tensor_size")


def file_of(folder: Path, rank: int) -> Path:
    """Of one rank, in the folder of a checkpoint."""
    return folder / f"data_parallel_rank_{rank:05d}.pt"


def save(folder: Path, mode) -> None:
    """Write what this rank's mode holds."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"place": mode.place, "mode": mode.options.mode, "steps": mode.steps, "apart": mode.apart}
    torch.save({**content, **mode.state_dict()}, file_of(folder, mode.place["rank"]))


def load(folder: Path, mode) -> None:
    """Go on from a checkpoint: on the grid it was saved on, bit for bit.

    With another number of replicas each begins from the weights in DeepSpeed's files, with what the old ones shared (the
    outer optimizer, a gradient that was under way). Otherwise, and from another mode, with nothing; both are logged.

    Raises:
        UserError: a file of one rank is missing.
    """
    place = mode.place
    files = sorted(folder.glob("data_parallel_rank_*.pt"))
    if not files:
        return _begin(folder, mode, "nothing of this mode in this checkpoint")
    first = torch.load(files[0], weights_only=True, mmap=True)
    if first["mode"] != mode.options.mode:
        return _begin(folder, mode, f"saved in mode {first['mode']}")
    if len(files) != first["place"]["world_size"]:
        raise UserError(
            f"{folder}: {len(files)} files data_parallel_rank_*.pt of {first['place']['world_size']} are there"
        )
    contents = [torch.load(file, weights_only=True, mmap=True) for file in files]
    same = [content for content in contents if content["place"] == place]
    if same:
        content = torch.load(file_of(folder, place["rank"]), weights_only=True)
        mode.steps, mode.apart = content["steps"], content["apart"]
        return mode.load_state_dict({"shared": content["shared"], "own": content["own"]})
    stages = {content["place"]["pipe_rank"] for content in contents}
    pipe_size = place["world_size"] // place["data_size"] // place["tensor_size"]
    alike = [content for content in contents if all(content["place"][key] == place[key] for key in _GRID)]
    if len(stages) != pipe_size or not alike:
        return _begin(folder, mode, "saved on another grid")
    logger.warning(
        f"{folder}: saved by {alike[0]['place']['data_size']} replicas; each of {place['data_size']} goes on alike"
    )
    mode.steps, mode.apart = max(content["steps"] for content in contents), False
    return mode.load_state_dict({"shared": alike[0]["shared"]})


def _begin(folder: Path, mode, why: str) -> None:
    logger.warning(f'{folder}: {why}; mode "{mode.options.mode}" begins anew from its weights')
    mode.steps, mode.apart = mode.engine.global_steps, False
    mode.load_state_dict({})
