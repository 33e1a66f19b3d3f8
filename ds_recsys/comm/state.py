"""Error feedback in checkpoints: a file per rank beside DeepSpeed's, by parameter name."""

import logging
from pathlib import Path

import torch

logger = logging.getLogger("ds_recsys")


def file_of(folder: Path, rank: int) -> Path:
    """Of one rank, in the folder of a checkpoint."""
    return folder / f"compression_rank_{rank:05d}.pt"


def save(folder: Path, reducer, place: dict) -> None:
    """Write what this rank's reducer holds.

    Args:
        place: rank, world_size, pipe_rank, data_rank, data_size, tensor_rank and tensor_size of this rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"method": reducer.options.method, "owner_shares": reducer.options.owner_shares}
    content = {"place": place, **kept, **reducer.state_dict()}
    torch.save(content, file_of(folder, place["rank"]))


def load(folder: Path, reducer, place: dict, names: set[str]) -> None:
    """Go on from a checkpoint; on the grid it was saved on, bit for bit.

    With another number of data-parallel ranks, or other owners of the sums, each gets the mean of the residuals, worker's
    and server's: what was held back of the average gradient stays the same. With another tensor axis, or none saved, they
    begin at zero (logged).

    Args:
        place: as in `save`.
        names: the parameters of this rank.
    """
    files = sorted(folder.glob("compression_rank_*.pt"))
    if not files:
        logger.warning(f"{folder}: no error feedback in this checkpoint; it begins at zero")
        return
    own = file_of(folder, place["rank"])
    if own.exists():
        content = torch.load(own, weights_only=True)
        same = content["place"] == place and content.get("owner_shares") == reducer.options.owner_shares
        if same and len(files) == place["world_size"] and _names(content) <= names:
            reducer.load_state_dict(content)
            return
    contents = [torch.load(file, weights_only=True, mmap=True) for file in files]
    if any(content["place"]["tensor_size"] != place["tensor_size"] for content in contents):
        logger.warning(f"{folder}: saved with another tensor axis; error feedback begins at zero")
        return
    reducer.load_state_dict(_redistributed(contents, place, names))


def of_parameters(content: dict, names: set[str]) -> dict[tuple, torch.Tensor]:
    """The tensors of a reducer's state that are about the parameters `names`, under keys that say what they are."""
    found = {("residuals", *key): value for key, value in content["residuals"].items() if key[1] in names}
    for kind in ("factors", "velocities"):
        found |= {(kind, name): value for name, value in content[kind].items() if name in names}
    return found


def regrouped(content: dict, arrived: dict[tuple, torch.Tensor], sizes: dict[str, int]) -> dict:
    """A reducer's state for the parameters in `sizes` (name -> values), when they come in other buckets than before.

    Which rank owns the sum of which range changes then. So what was held back of a sum becomes what its owner holds back
    of its own gradients: either way it is added to the next sum.
    """
    present = {**of_parameters(content, set(sizes)), **arrived}
    sides: dict[tuple[str, str], torch.Tensor] = {}
    for kind, *key in present:
        if kind == "residuals":
            side, name, start, stop = key
            value = present[(kind, *key)]
            whole = sides.setdefault((side, name), torch.zeros(sizes[name], device=value.device))
            whole[start:stop] = value
    residuals: dict[tuple, torch.Tensor] = {}
    for (_, name), value in sides.items():
        key = ("worker", name, 0, sizes[name])
        residuals[key] = residuals[key] + value if key in residuals else value
    rest = {
        kind: {key[1]: value for key, value in present.items() if key[0] == kind} for kind in ("factors", "velocities")
    }
    return {"step": content["step"], "residuals": residuals, **rest}


def _names(content: dict) -> set[str]:
    return {name for _, name, _, _ in content["residuals"]}


def _redistributed(contents: list[dict], place: dict, names: set[str]) -> dict:
    """What was held back in all, shared out evenly: sum over the old ranks / their number, in the average's units.

    A sum over N ranks is divided by N afterwards, so each of the new ranks holds the old total / the old N.
    """
    contents = [content for content in contents if content["place"]["tensor_rank"] == place["tensor_rank"]]
    share = 1 / contents[0]["place"]["data_size"]
    residuals, velocities, factors = {}, {}, {}
    for name in sorted(names):
        holders = [content for content in contents if name in _names(content)]
        stages = {content["place"]["pipe_rank"] for content in holders}
        # a tied weight is held by several stages, which all have the same residuals
        holders = [content for content in holders if content["place"]["pipe_rank"] == min(stages)]
        if holders:
            residuals[("worker", name)] = share * sum(map(torch.Tensor.double, _whole(name, holders)))
            found = [content["velocities"][name] for content in holders if name in content["velocities"]]
            if found:
                velocities[name] = share * sum(found)
    for content in contents:
        factors |= {name: value for name, value in content["factors"].items() if name in names}
    return {
        "step": contents[0]["step"],
        "residuals": {(*key, 0, len(value)): value.float() for key, value in residuals.items()},
        "velocities": velocities,
        "factors": factors,
    }


def _whole(name: str, contents: list[dict]) -> list[torch.Tensor]:
    """A tensor's residuals, of each rank and side one as long as the tensor."""
    length = max(stop for content in contents for _, of, _, stop in content["residuals"] if of == name)
    whole = []
    for content in contents:
        sides = {side: torch.zeros(length) for side in ("worker", "server")}
        for (side, of, start, stop), value in content["residuals"].items():
            if of == name:  # ranges may overlap, with the same values, in a block that two ranks needed
                sides[side][start:stop] = value
        whole += sides.values()
    return whole
