"""A training checkpoint -> a normal HF folder, in one process and without DeepSpeed: one layer in memory at a time."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ds_recsys.errors import UserError
from ds_recsys.models.folder import put_in_place, set_dtype, write_index
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
    layers = sorted(checkpoint.glob("layer_*-model_states.pt"))
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
    index, dtype = {}, None
    for number, layer in enumerate(layers, start=1):
        tensors = torch.load(layer, map_location="cpu", mmap=True, weights_only=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
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
