"""Weights into a pipe that already stands: the best validation's, before the final evaluation and export."""

import torch

from ds_recsys.models.pipeline import RecommenderPipe
from ds_recsys.models.weights import Weights


@torch.no_grad()
def load_weights(pipe: RecommenderPipe, weights: Weights) -> None:
    """Copy a recommender's weights into this stage's parameters and buffers, in place.

    An optimizer keeps its own fp32 copies, so training on from here needs a new engine.
    """
    builder = pipe.builder
    source, shards = weights.bind(builder.skeleton), builder.shards()
    for name, tensor in pipe.hf_state_dict().items():
        part = (shards[name], builder.tensor.rank) if name in shards else None
        value = source.get(name, builder.full_shape(name), optional=True, part=part)
        if value is not None:
            tensor.copy_(value)
