"""Item embeddings from item titles: the mean of the language model's own token embeddings of each title.

Computed once by whichever process comes first and kept in a file, so that the stages that hold the item table read it
and the others never see the language model's vocabulary.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import embedding_bag
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ds_recsys.cache import default_cache
from ds_recsys.errors import UserError
from ds_recsys.models import hf_private
from ds_recsys.models.skeleton import empty_model
from ds_recsys.models.weights import Weights


def token_table(weights: Weights) -> Tensor:
    """The checkpoint's token embedding [V, E], as stored."""
    config = weights.config.get_text_config(decoder=True)
    model = empty_model(config)
    embedding = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is embedding) + ".weight"
    plan = hf_private.conversion_plan(model, weights.names())
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if p is embedding.weight]
    for candidate in (name, *tied):
        if candidate in plan:
            return plan[candidate].load(weights.read)
    raise UserError(f"{weights.folder}: the checkpoint has no token table {name!r}")


def title_embeddings(weights: Weights, tokenizer: PreTrainedTokenizerBase, titles: Sequence[str | None]) -> Tensor:
    """Mean token embedding of every title, centred and scaled to the spread of a fresh embedding.

    All titles share most of their mean, which would make every item score alike, and a tied head multiplies the scale
    into the logits; so the mean over items is taken off and the rest scaled to the config's `initializer_range`.

    Args:
        titles: of items 1..I, in order; None or a title without tokens gets the mean of all others, which is 0.

    Returns:
        float32 [I + 1, E]; row 0 (padding) is zero.
    """
    encoded = tokenizer([t or "" for t in titles], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([len(e) for e in encoded])
    if not int(lengths.sum()):
        raise UserError("no title has a token: title initialisation needs titles")
    flat = torch.tensor([t for e in encoded for t in e])
    used, compact = torch.unique(flat, return_inverse=True)
    rows = token_table(weights)[used].float()  # only the rows in use, so that the vocabulary is not kept in fp32
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    means = embedding_bag(compact, rows, offsets, mode="mean")
    means -= means[lengths > 0].mean(0)
    means[lengths == 0] = 0.0
    means *= getattr(weights.config, "initializer_range", 0.02) / means[lengths > 0].std().clamp(min=1e-6)
    return torch.cat([torch.zeros(1, means.shape[1]), means])


def with_title_items(
    weights: Weights,
    titles: Sequence[str | None],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Weights:
    """`weights` whose item table is initialised from `titles`; safe to call on every rank at once.

    Raises:
        UserError: no tokenizer beside the weights, or no title has a token.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(repr((str(weights.folder.resolve()), list(titles))).encode())
    for file in sorted(set(weights.files.values())):
        stat = os.stat(file)
        key.update(repr((file, stat.st_size, stat.st_mtime_ns)).encode())
    path = cache / f"titles-{key.hexdigest()[:16]}.safetensors"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            if tokenizer is None:
                try:
                    tokenizer = AutoTokenizer.from_pretrained(weights.folder)
                except (OSError, ValueError, KeyError) as exc:
                    raise UserError(f"{weights.folder} has no tokenizer to read the titles with") from exc
            partial = path.with_suffix(".partial")
            save_file({"item_table": title_embeddings(weights, tokenizer, titles)}, partial)
            partial.rename(path)
    return weights.with_item_table(path)
