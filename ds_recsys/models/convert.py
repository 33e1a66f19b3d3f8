"""A training checkpoint -> a normal HF folder, in one process and without DeepSpeed: one layer in memory at a time."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from ds_recsys.errors import UserError
from ds_recsys.models.folder import put_in_place, set_dtype, write_index
from ds_recsys.models.slices import joined, parse
from ds_recsys.models.specs import ModelBuilder
from ds_recsys.models.weights import CATALOGUE


def convert_checkpoint(checkpoint: str | Path, description: str | Path, out_dir: str | Path) -> Path:
    """Write the weights of a pipeline checkpoint as safetensors under HF's names.

    DeepSpeed saves a file per pipeline layer, and our layers keep HF's full names, so each file becomes one shard.
    (DeepSpeed's own zero_to_fp32.py fails on pipeline checkpoints.)

    Args:
        checkpoint: folder with `layer_*-model_states.pt`.
        description: folder with the run's `config.json` and `items.parquet`.
        out_dir: appears whole, in place of what was there.

    Raises:
        UserError: no layer files, or no description.
    """
    checkpoint, description, out = Path(checkpoint), Path(description), Path(out_dir)
    layers = layer_files(checkpoint)
    if not layers:
        raise UserError(f"{checkpoint}: no layer_*-model_states.pt in it, so not a pipeline checkpoint")
    for name in ("config.json", CATALOGUE):
        if not (description / name).exists():
            raise UserError(f"{description / name} is not there: give the folder of a run, which holds model/")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("config.json", CATALOGUE):
        shutil.copyfile(description / name, partial / name)
    index, dtype, rows = {}, None, {}
    builder = ModelBuilder(AutoConfig.from_pretrained(description))
    for number, files in enumerate(layers, start=1):
        tensors = merge_layer(files, builder)
        rows |= {name: tensors.pop(name) for name in list(tensors) if parse(name)[1] is not None}
        if number == len(layers):  # a split head is one tensor again
            tensors |= joined(rows)
        if not tensors:
            continue
        file = f"model-{number:05d}-of-{len(layers):05d}.safetensors"
        save_file(tensors, partial / file, metadata={"format": "pt"})
        index |= {name: (file, tensor.numel() * tensor.element_size()) for name, tensor in tensors.items()}
        dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), dtype)
    write_index(partial, index)
    set_dtype(partial, dtype)
    put_in_place(partial, out)
    return out


def layer_files(checkpoint: Path) -> list[list[Path]]:
    """Of every pipeline layer with parameters, in order, the file of each tensor rank."""
    layers: dict[str, list[Path]] = {}
    for path in sorted(checkpoint.glob("layer_*-model_states.pt")):  # layer_03-model_01-model_states.pt
        layers.setdefault(path.name.split("-")[0], []).append(path)
    return list(layers.values())


def merge_layer(files: list[Path], builder: ModelBuilder) -> dict[str, Tensor]:
    """HF name -> whole tensor of one layer from the files of its tensor ranks, which are mapped and not read at once."""
    ranks = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    shards = builder.shards(len(files))
    return {
        name: shards[name].merge([rank[name] for rank in ranks]) if name in shards else tensor.contiguous()
        for name, tensor in ranks[0].items()
    }
