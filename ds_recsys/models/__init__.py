"""HF causal LM -> pipeline layers, weights in and out."""

from ds_recsys.models.export import export
from ds_recsys.models.pipeline import RecommenderPipe
from ds_recsys.models.recommender import recommender_config
from ds_recsys.models.specs import ModelBuilder, to_layer_specs
from ds_recsys.models.titles import title_embeddings, with_title_items
from ds_recsys.models.weights import Weights, open_weights

__all__ = [
    "ModelBuilder",
    "RecommenderPipe",
    "Weights",
    "export",
    "open_weights",
    "recommender_config",
    "title_embeddings",
    "to_layer_specs",
    "with_title_items",
]
