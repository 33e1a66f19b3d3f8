"""A checkpoint of one grid loaded into an engine on another: weights, optimizer state, scheduler and counters.

DeepSpeed loads a checkpoint on the grid that wrote it. Its files of other grids are read here by name: layer files hold
weights under Hugging Face's names, and the optimizer's files say which piece of which parameter they hold. Each rank maps
the files and copies what it needs, one pipeline stage of the old grid at a time. The layout of those files is DeepSpeed
0.19's own; tests/test_reshard.py fails when a version changes it.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ds_recsys.checkpoint import verify
from ds_recsys.errors import UserError
from ds_recsys.models.convert import layer_files, merge_layer
from ds_recsys.models.shards import Shard
from ds_recsys.models.slices import overlaps
from ds_recsys.topology import Grid

NAMES = "recsys_parameters"  # key of the client state: HF names of the optimizer's parameters, group by group


def parameter_names(engine) -> dict[str, list[list[str]]]:
    """What must be saved as client state for a later load on another grid."""
    names = {id(parameter): name for name, parameter in engine.module.hf_named_parameters()}
    groups = engine.basic_optimizer.param_groups if _plain(engine) else engine.optimizer.param_groups
    return {NAMES: [[names.get(id(p), "") for p in group["params"]] for group in groups]}


@torch.no_grad()
def load(engine, checkpoint: Path, grid: Grid) -> None:
    """Load what an engine on `grid` saved at `checkpoint` into `engine`, whose grid is another. Collective.

    Raises:
        UserError: damaged files, or an optimizer whose files are not understood (fp16 without ZeRO).
    """
    verify(checkpoint)
    builder, parameters = engine.module.builder, dict(engine.module.hf_named_parameters())
    own, rank = builder.shards(), builder.tensor.rank
    tensors, rows = engine.module.hf_state_dict(), builder.head_places(parameters)
    for files in layer_files(checkpoint):
        for name, value in merge_layer(files, builder).items():
            if name in tensors:
                tensors[name].copy_(own[name].take(value, rank) if name in own else value)
                continue
            for held, here, there in overlaps(name, len(value), rows) if value.dim() else ():
                tensors[held][here].copy_(value[there])
    states: dict[str, dict[str, Tensor]] = {}
    for stage in range(grid.pipe):
        files = [_common(checkpoint, stage * grid.tensor + t) for t in range(grid.tensor)]
        pieces = [_optimizer_state(checkpoint, stage * grid.tensor + t, file, grid) for t, file in enumerate(files)]
        for name in pieces[0]:
            if name in parameters:
                states[name] = _whole_state(builder, name, pieces, grid.tensor)
                if name in own:
                    states[name] = {k: own[name].take(v, rank) if v.dim() else v for k, v in states[name].items()}
            elif any(overlaps(name, *builder.full_shape(name)[:1], rows)):
                state = _whole_state(builder, name, pieces, grid.tensor)
                _copy_rows(states, name, state, rows, parameters)
    absent = sorted(n for n, p in parameters.items() if p.requires_grad and n not in states)
    if absent:
        raise UserError(f"{checkpoint}: no optimizer state of {absent[0]!r}; resume on the grid that saved it, {grid}")
    (_write_plain if _plain(engine) else _write_partitioned)(engine, parameters, states)
    common = _common(checkpoint, 0)
    scheduled = _scheduled(checkpoint, common)
    for group in engine.optimizer.param_groups:
        group.update(scheduled)
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, key, common[key])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(common["lr_scheduler"])
    if hasattr(engine, "gradient_compression"):
        engine.gradient_compression.load(checkpoint)
    if hasattr(engine, "data_parallel"):
        engine.data_parallel.load(checkpoint)


def _whole_state(builder, name: str, pieces: list[dict], tensor: int) -> dict[str, Tensor]:
    shard = builder.shards(tensor).get(name)
    return _merge([piece[name] for piece in pieces], shard, builder.full_shape(name))


def _copy_rows(states: dict, name: str, state: Mapping[str, Tensor], rows: Mapping, parameters: Mapping) -> None:
    """The rows of a head that is split in another way here than in the checkpoint, which calls these `name`."""
    for held, here, there in overlaps(name, len(next(v for v in state.values() if v.dim())), rows):
        for key, value in state.items():
            if not value.dim():
                states.setdefault(held, {})[key] = value
                continue
            whole = states.setdefault(held, {}).setdefault(key, value.new_empty(parameters[held].shape))
            whole[here].copy_(value[there])


def _plain(engine) -> bool:
    """Whether the optimizer is torch's own over the parameters themselves (fp32, ZeRO 0)."""
    return engine.optimizer is engine.basic_optimizer


def _common(checkpoint: Path, model_rank: int) -> dict:
    return torch.load(
        checkpoint / f"mp_rank_{model_rank:02d}_model_states.pt", map_location="cpu", mmap=True, weights_only=False
    )


def _optimizer_state(checkpoint: Path, model_rank: int, common: dict, grid: Grid) -> dict[str, dict[str, Tensor]]:
    """HF name -> {"fp32": the master copy where there is one, "exp_avg": ..., "step": 0-d} of one old rank's parts."""
    pattern = f"*zero_pp_rank_*_mp_rank_{model_rank:02d}_optim_states.pt"
    files = sorted(checkpoint.glob(pattern), key=lambda file: int(file.name.split("pp_rank_")[1].split("_")[0]))
    if files:
        ranks = [
            torch.load(f, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"] for f in files
        ]
        return _joined(ranks)
    if NAMES not in common or "state" not in (common.get("optimizer") or {}):
        raise UserError(f"{checkpoint}: its optimizer state can only be loaded on the grid that saved it, {grid}")
    names = [name for group in common[NAMES] for name in group]
    states = common["optimizer"]["state"]
    return {name: states.get(index, {}) for index, name in enumerate(names)}


def _scheduled(checkpoint: Path, common: dict) -> dict:
    """What a scheduler changes in the optimizer's groups, the same in each: learning rate and momenta."""
    files = sorted(checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    inner = common["optimizer"]
    if files:
        state = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
        inner = state["base_optimizer_state"]
    return {key: value for key, value in inner["param_groups"][0].items() if key in ("lr", "betas", "momentum", "step")}


def _joined(ranks: list[dict]) -> dict[str, dict[str, Tensor]]:
    """Put the pieces of the data ranks' flat buffers together, parameter by parameter."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    for state in ranks:
        inner = state["base_optimizer_state"]
        inner = inner["state"] if "state" in inner else inner
        for group, mapping in enumerate(state["param_slice_mappings"]):
            buffers = {"fp32": state["single_partition_of_fp32_groups"][group], **inner[group]}
            for local_name, piece in mapping.items():
                mine = found.setdefault(_hf_name(local_name), {})
                for key, buffer in buffers.items():
                    if not torch.is_tensor(buffer) or not buffer.dim():
                        mine[key] = [torch.as_tensor(buffer)]
                    else:
                        mine.setdefault(key, []).append(buffer.narrow(0, piece.start, piece.numel))
    return {
        name: {key: torch.cat(parts) if parts[0].dim() else parts[0] for key, parts in state.items()}
        for name, state in found.items()
    }


def _hf_name(local: str) -> str:
    """`3.model.layers.2.mlp.up_proj.weight` or `tied_modules.item_table.model...` -> what follows the layer's name."""
    return local.split(".", 2)[2] if local.startswith("tied_modules.") else local.split(".", 1)[1]


def _merge(parts: list[Mapping[str, Tensor]], shard: Shard | None, full: tuple[int, ...]) -> dict[str, Tensor]:
    """The whole parameter's state from the tensor ranks' parts; numbers such as the step are the same in all."""
    if shard is None:
        return {key: value.reshape(full) if value.dim() else value for key, value in parts[0].items()}
    merged = {}
    for key, value in parts[0].items():
        cut = [part[key].reshape(shard.shape(full, rank)) for rank, part in enumerate(parts)] if value.dim() else None
        merged[key] = shard.merge(cut) if cut else value
    return merged


def _write_plain(engine, parameters: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    optimizer = engine.optimizer
    for name, parameter in parameters.items():
        state = states.get(name)
        if state:
            if "fp32" in state:
                parameter.copy_(state["fp32"])
            optimizer.state[parameter] = {
                key: value.to(parameter.device if value.dim() else value.device, copy=True)
                for key, value in state.items()
                if key != "fp32"
            }


def _write_partitioned(engine, parameters: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Into the flat buffers of ZeRO's and bf16's optimizers, of which this rank holds a piece."""
    optimizer = engine.optimizer
    inner = optimizer.optimizer
    sample = next(iter(states.values()))
    for group in inner.param_groups:
        for flat in group["params"]:  # a new optimizer has no state before its first step
            inner.state[flat] = {
                key: torch.zeros_like(flat) if value.dim() else value.clone()
                for key, value in sample.items()
                if key != "fp32"
            }
    optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        if name in states:
            master = states[name].get("fp32", parameter)  # without ZeRO in fp32 the weights are the masters
            parameter.set_full_hp_param(master.to(parameter.device, torch.float32))
            for key, value in states[name].items():
                if key != "fp32" and value.dim():
                    parameter.set_full_hp_param(value.to(parameter.device), key)
