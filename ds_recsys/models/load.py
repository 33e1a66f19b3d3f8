"""Weights into a pipe that already stands: the best validation's, before the final evaluation and export."""

import torch

from ds_recsys.models.pipeline import RecommenderPipe
from ds_recsys.models.slices import parse
from ds_recsys.models.weights import Weights


@torch.no_grad()
def load_weights(pipe: RecommenderPipe, weights: Weights) -> None:
    """Copy a recommender's weights into this stage's parameters and buffers, in place.

    An optimizer keeps its own fp32 copies, so training on from here needs a new engine.
    """
    builder = pipe.builder
    source = weights.bind(builder.skeleton)
    for name, tensor in pipe.hf_state_dict().items():
        whole = parse(name)[0]
        value = source.get(whole, builder.full_shape(whole), optional=True, part=builder.part(name))
        if value is not None:
            tensor.copy_(value)
