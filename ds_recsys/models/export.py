"""A trained pipe -> a normal HF folder: each stage writes its own shard, then one rename makes the folder appear."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ds_recsys.errors import UserError
from ds_recsys.models.folder import put_in_place, set_dtype, write_description, write_index
from ds_recsys.models.pipeline import RecommenderPipe
from ds_recsys.models.shards import Shard
from ds_recsys.models.slices import joined, parse
from ds_recsys.topology import TensorAxis


def export(
    pipe: RecommenderPipe,
    out_dir: str | os.PathLike,
    *,
    item_ids: Sequence[Any],
    titles: Sequence[str | None] | None = None,
    extra_config: dict[str, Any] | None = None,
    world: dist.ProcessGroup | None = None,
) -> Path:
    """Write `pipe` as an HF causal LM folder. Collective: every rank calls it.

    One rank of every stage writes `model-*-of-*.safetensors` with HF's names and the dtype it holds. Tensors are whole:
    the parts of other tensor ranks are sent to it, one tensor at a time. Rank 0 writes the index, `config.json` and
    `items.parquet` (index, id, title). All goes to a temporary folder beside `out_dir`, which takes its place at the end,
    so `out_dir` never holds half an export.

    Args:
        out_dir: must be seen by all ranks (shared file system).
        item_ids: original ids of items 1..I, in order.
        titles: of the same items.
        extra_config: further keys of `config.json`.
        world: the ranks that are left, where some are lost; rank 0 is among them.

    Raises:
        UserError: wrong number of ids or titles, or a shard of another host is not visible here.
    """
    out = Path(out_dir)
    partial = out.parent / f".{out.name}.partial"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(world)
    writer = pipe.mpu().get_data_parallel_rank() == 0 and pipe.builder.tensor.rank == 0
    file = f"model-{pipe.stage_id + 1:05d}-of-{pipe.num_stages:05d}.safetensors"
    mine, error = {}, None
    tensors = stage_tensors(pipe) if pipe.mpu().get_data_parallel_rank() == 0 else {}
    if writer:
        try:
            save_file(tensors, partial / file, metadata={"format": "pt"})
        except OSError as exc:
            error = f"stage {pipe.stage_id} could not write {partial / file}: {exc}"
        mine = {name: (file, t.numel() * t.element_size()) for name, t in tensors.items()}
    everyone: list[Any] = [None] * dist.get_world_size(world)
    dist.all_gather_object(everyone, (mine, error), group=world)
    errors = [e for _, e in everyone if e]
    if rank == 0 and not errors:
        try:
            _finish(
                pipe,
                partial,
                out,
                {n: f for names, _ in everyone for n, f in names.items()},
                item_ids,
                titles,
                extra_config,
            )
        except (OSError, UserError) as exc:
            errors = [str(exc)]
    outcome = [errors]
    dist.broadcast_object_list(outcome, src=0, group=world)
    if outcome[0]:
        raise UserError(outcome[0][0])
    return out


def stage_tensors(pipe: RecommenderPipe) -> dict[str, Tensor]:
    """What this stage writes: HF name -> whole tensor on the host; a tied table belongs to the first stage.

    Collective over the tensor axis; ranks other than its first get nothing. The rows of a split head go to the last stage.
    """
    shards, axis = pipe.builder.shards(), pipe.builder.tensor
    tensors = joined(_rows_on_last_stage(pipe)) if pipe.split_head is not None else {}
    for name, tensor in pipe.hf_state_dict().items():
        if parse(name)[1] is not None or (name == pipe.builder.skeleton.table_name and not pipe.is_first_stage):
            continue
        if name in shards:
            tensor = gather(tensor.detach(), shards[name], pipe.builder.full_shape(name), axis)
        if axis.rank == 0:
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _rows_on_last_stage(pipe: RecommenderPipe) -> dict[str, Tensor]:
    """The rows of a split head by name, on the host of the last stage; collective over the pipeline."""
    grid, last = pipe.mpu(), pipe.num_stages - 1
    mine = {n: t.detach().contiguous() for n, t in pipe.hf_state_dict().items() if parse(n)[1] is not None}
    if not pipe.is_last_stage:
        for tensor in mine.values():
            dist.send(tensor, dst=grid.stage_to_global(last))
        return {}
    rows = {name: tensor.cpu() for name, tensor in mine.items()}
    for place in range(pipe.builder.split_head.blocks):
        stage = pipe.stage_owner(pipe.parts[-1] - pipe.builder.split_head.blocks + place)
        for name in pipe.builder.row_names(place) if stage != last else ():
            tensor = next(pipe.parameters()).new_empty(pipe.builder.full_shape(name), requires_grad=False)
            dist.recv(tensor, src=grid.stage_to_global(stage))
            rows[name] = tensor.cpu()
    return rows


def gather(tensor: Tensor, shard: Shard, full: tuple[int, ...], axis: TensorAxis) -> Tensor | None:
    """The whole tensor of shape `full` from the ranks' parts, on the axis' first rank; None on the others."""
    first = dist.get_global_rank(axis.group, 0)
    if axis.rank:
        dist.send(tensor.contiguous(), dst=first, group=axis.group)
        return None
    parts = [tensor]
    for rank in range(1, axis.size):
        parts.append(tensor.new_empty(shard.shape(full, rank)))
        dist.recv(parts[rank], src=dist.get_global_rank(axis.group, rank), group=axis.group)
    return shard.merge(parts)


def _finish(pipe, partial: Path, out: Path, index: dict[str, tuple[str, int]], item_ids, titles, extra_config) -> None:
    absent = sorted({f for f, _ in index.values() if not (partial / f).exists()})
    if absent:
        raise UserError(
            f"{partial / absent[0]} was written on another host and is not visible here: export to shared storage"
        )
    write_index(partial, index)
    write_description(partial, pipe.config, item_ids, titles, extra_config)
    set_dtype(partial, next(p.dtype for _, p in pipe.hf_named_parameters() if p.is_floating_point()))
    put_in_place(partial, out)
