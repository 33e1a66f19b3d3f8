"""The files of an exported folder beside the weights: index, config, catalogue; and the swap that makes it appear."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import dtype
from transformers import PreTrainedConfig

from ds_recsys.errors import UserError
from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES
from ds_recsys.models.weights import CATALOGUE, INDEX


def write_index(folder: Path, index: dict[str, tuple[str, int]]) -> None:
    """`index`: HF name -> (file, bytes) of every tensor."""
    listing = {
        "metadata": {"total_size": sum(size for _, size in index.values())},
        "weight_map": {name: file for name, (file, _) in sorted(index.items())},
    }
    (folder / INDEX).write_text(json.dumps(listing, indent=1))


def write_description(
    folder: Path,
    config: PreTrainedConfig,
    item_ids: Sequence[Any],
    titles: Sequence[str | None] | None,
    extra_config: dict[str, Any] | None = None,
) -> None:
    """`config.json` (with the keys of `extra_config`) and `items.parquet` (index, id, title) for items 1..I in order.

    Raises:
        UserError: wrong number of ids or titles.
    """
    n = config.vocab_size - 1
    for what, given in (("item ids", item_ids), ("titles", titles)):
        if given is not None and len(given) != n:
            raise UserError(f"export to {folder}: {len(given)} {what} for a model of {n} items")
    values = {**config.to_dict(), **(extra_config or {})}
    values |= {"architectures": [CAUSAL_LM_CLASSES[config.model_type]], "model_type": config.model_type}
    (folder / "config.json").write_text(json.dumps(values, indent=1, default=str))
    table = pa.table(
        {
            "index": pa.array(range(1, n + 1), pa.int64()),
            "id": pa.array(list(item_ids)),
            "title": pa.array([None] * n if titles is None else list(titles), pa.string()),
        }
    )
    pq.write_table(table, folder / CATALOGUE)


def set_dtype(folder: Path, weights: dtype) -> None:
    """Name the dtype of the weights in the folder's `config.json`."""
    values = json.loads((folder / "config.json").read_text())
    values["dtype"] = str(weights).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=1))


def put_in_place(partial: Path, out: Path) -> None:
    """Rename `partial` to `out`; what was there goes away only once the new one stands."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
