"""Where pretrained weights come from: tensors by HF name, read one at a time so that a stage holds only its own.

A checkpoint's names are not always the model's (renamed modules, experts stored one by one and used stacked, a missing
`model.` prefix); transformers' own conversion mapping is applied to the names first and to the tensors as they are
asked for.
"""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ds_recsys.errors import UserError
from ds_recsys.models import hf_private
from ds_recsys.models.shards import Shard

if TYPE_CHECKING:
    from ds_recsys.models.skeleton import Skeleton

INDEX, SINGLE, CATALOGUE = "model.safetensors.index.json", "model.safetensors", "items.parquet"


class Weights:
    """A folder of safetensors in HF's layout. Reads headers only; cheap to copy to other processes.

    Attributes:
        folder: where the files are; `config.json` beside them.
        has_items: the folder is a recommender of ours (it has a catalogue), so its token table is the item table.
        item_table: safetensors file whose tensor `item_table` [I+1, E] initialises the item embedding, or None.
    """

    def __init__(self, folder: str | os.PathLike, *, item_table: str | os.PathLike | None = None):
        self.folder = Path(folder)
        self.has_items = (self.folder / CATALOGUE).exists()
        self.item_table = item_table
        self.files = _files(self.folder)

    def __repr__(self) -> str:
        return f"Weights({str(self.folder)!r})"

    @property
    def config(self) -> PreTrainedConfig:
        """The checkpoint's own config, as stored."""
        return AutoConfig.from_pretrained(self.folder)

    def names(self) -> list[str]:
        """Names as stored in the checkpoint."""
        return sorted(self.files)

    def read(self, name: str) -> Tensor:
        """One tensor by its stored name. The file is opened for this tensor only, so no other page stays mapped."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_part(self, name: str, part: tuple[Shard, int]) -> tuple[list[int], Tensor]:
        """(shape of the whole tensor, the part of one tensor rank); nothing else is read."""
        shard, rank = part
        with safe_open(self.files[name], framework="pt") as file:
            stored = file.get_slice(name)
            before = (slice(None),) * shard.dim
            pieces = [stored[(*before, slice(start, stop))] for start, stop in shard.ranges[rank]]
            return stored.get_shape(), torch.cat(pieces, shard.dim)

    def with_item_table(self, path: str | os.PathLike) -> "Weights":
        """The same weights with the item embedding taken from `path` (see `titles.title_embeddings`)."""
        other = copy.copy(self)
        other.item_table = path
        return other

    def bind(self, skeleton: "Skeleton") -> "Source":
        """See the checkpoint through the names of `skeleton`'s model."""
        return Source(self, skeleton)


class Source:
    """`get(hf_name, shape)` -> tensor; computed from the stored tensors that make it up, nothing else is read."""

    def __init__(self, weights: Weights, skeleton: "Skeleton"):
        self.weights = weights
        self.plan = hf_private.conversion_plan(skeleton.model, weights.names())
        self.table_name = skeleton.table_name
        for alias, name in skeleton.aliases.items():  # a tied checkpoint may hold the table under the head's name only
            if name not in self.plan and alias in self.plan:
                self.plan[name] = self.plan[alias]
        vocab = skeleton.embedding.weight.shape[0]
        heads = {n for n in skeleton.owned("head") if skeleton.outer[n].shape[:1] == (vocab,)}
        self.item_names = {skeleton.table_name} | heads

    def get(
        self, name: str, shape: tuple[int, ...], optional: bool = False, part: tuple[Shard, int] | None = None
    ) -> Tensor | None:
        """The tensor for parameter `name`; None where it is to be initialised: the item table and the head's item rows.

        Args:
            shape: of the whole parameter.
            optional: None also where the checkpoint lacks it.
            part: (shard, rank) to get only that rank's part.

        Raises:
            UserError: the checkpoint lacks it or has another shape.
        """
        if name == self.table_name and self.weights.item_table is not None:
            with safe_open(str(self.weights.item_table), framework="pt") as file:
                value = file.get_tensor("item_table")
        elif name in self.item_names and not self.weights.has_items:
            return None
        elif name not in self.plan:
            if optional:
                return None
            raise UserError(f"{self.weights.folder}: the checkpoint has no {name!r}; it does not belong to this config")
        elif part and self.plan[name].converter is None:
            found, value = self.weights.read_part(self.plan[name].sources[0][0], part)
            self._check_shape(name, found, shape)
            return value
        else:
            value = self.plan[name].load(self.weights.read)
        self._check_shape(name, value.shape, shape)
        return value if part is None else part[0].take(value, part[1])

    def _check_shape(self, name: str, found: Sequence[int], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise UserError(
                f"{self.weights.folder}: {name!r} has shape {tuple(found)}, the config needs {wanted}; "
                "take the config from the checkpoint and change only the number of layers"
            )


def _files(folder: Path) -> dict[str, str]:
    if (folder / INDEX).exists():
        listed = json.loads((folder / INDEX).read_text())["weight_map"]
        absent = sorted({f for f in listed.values() if not (folder / f).exists()})
        if absent:
            raise UserError(f"{folder / INDEX} names {absent[0]!r}, which is not there: the download is incomplete")
        return {name: str(folder / file) for name, file in listed.items()}
    if (folder / SINGLE).exists():
        with safe_open(folder / SINGLE, framework="pt") as file:
            return {name: str(folder / SINGLE) for name in file.keys()}
    if list(folder.glob("*.bin")):
        raise UserError(
            f"{folder} holds only .bin weights, which cannot be read slice by slice: save it again as safetensors"
        )
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}")


def open_weights(
    name: str | os.PathLike, *, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> Weights:
    """Pretrained weights by local folder, `.gguf` file or hub id.

    Args:
        name: folder in HF's layout, path of a GGUF file (converted once, into `cache_dir`), or hub id such as
            `org/model`.
        revision: hub revision.
        cache_dir: where converted files go; default `~/.cache/ds_recsys`.

    Raises:
        UserError: nothing usable there; says what was looked for.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        from ds_recsys.models.gguf import gguf_folder

        return Weights(gguf_folder(path, cache_dir))
    if path.is_dir():
        return Weights(path)
    if path.exists():
        raise UserError(f"{path} is a file; give a folder with config.json and safetensors, or a .gguf file")
    return Weights(_hub_folder(str(name), revision))


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise UserError(
            f"{name!r} is no local folder, and the hub did not give it: {str(exc).splitlines()[0]}"
        ) from exc
