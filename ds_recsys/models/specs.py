"""HF causal LM -> the list of LayerSpecs of its pipeline.

`ModelBuilder` is what every spec carries: config, weights and seed, cheap and picklable; the skeleton is made on
first use, once per process, and shared by the layers of the stage.
"""

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_recsys.models.initialise import fill_layer
from ds_recsys.models.layers import Block, Epilogue, Head, ItemTable, PipelineLayer, Prologue, pass_hidden
from ds_recsys.models.skeleton import Skeleton
from ds_recsys.models.unsupported import check_supported
from ds_recsys.models.weights import Weights

TIED_KEY = "item_table"


class ModelBuilder:
    """Makes the layers of one model; any layer, on any rank, at any time, with the same values everywhere."""

    def __init__(
        self,
        config: PreTrainedConfig,
        weights: Weights | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        embedding_dropout: float = 0.0,
    ):
        check_supported(config.model_type)
        self.embedding_dropout = embedding_dropout
        self.config, self.weights, self.seed, self.dtype = config, weights, seed, dtype
        self._skeleton: Skeleton | None = None
        self._source = None
        self.initialised: set[str] = set()  # HF names that the weights did not provide, of the layers built here

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_skeleton": None, "_source": None}

    def __repr__(self) -> str:
        return f"ModelBuilder({self.config.model_type})"

    @property
    def skeleton(self) -> Skeleton:
        if self._skeleton is None:
            self._skeleton = Skeleton(self.config)
        return self._skeleton

    @property
    def source(self):
        """The weights seen through this model's names, or None when everything is random."""
        if self._source is None and self.weights is not None:
            self._source = self.weights.bind(self.skeleton)
        return self._source

    def fill(self, layer: PipelineLayer) -> None:
        """Give the meta parameters of a new layer their values."""
        self.initialised |= set(fill_layer(layer, self.skeleton, self.source, self.seed, self.dtype))

    def specs(self) -> list[LayerSpec | TiedLayerSpec]:
        """Embedding, prologue, decoder layers, epilogue, head; the entries that would do nothing are left out."""
        skeleton = self.skeleton
        n = len(skeleton.blocks)
        specs: list[LayerSpec] = [
            TiedLayerSpec(TIED_KEY, ItemTable, self, tied_weight_attr=skeleton.table_name)
            if skeleton.tied
            else LayerSpec(ItemTable, self)
        ]
        if skeleton.glue[0]:
            specs.append(LayerSpec(Prologue, self))
        specs += [LayerSpec(Block, self, index) for index in range(n)]
        if skeleton.glue[n]:
            specs.append(LayerSpec(Epilogue, self))
        if not skeleton.tied or len(skeleton.owned("head")) > 1:
            specs.append(LayerSpec(Head, self))
        if skeleton.tied:
            specs.append(
                TiedLayerSpec(TIED_KEY, ItemTable, self, forward_fn=pass_hidden, tied_weight_attr=skeleton.table_name)
            )
        return specs

    def parameter_counts(self) -> list[int]:
        """Parameters of each spec, trainable or not, counted on meta: nothing is built. A tied table counts twice."""
        skeleton = self.skeleton
        sizes = {name: p.numel() for name, p in skeleton.outer.items()}
        blocks = [sum(p.numel() for p in b.parameters()) for b in skeleton.blocks]
        table = sum(p.numel() for p in skeleton.embedding.parameters())
        counts = []
        for spec in self.specs():
            if spec.typename is ItemTable:
                counts.append(table)
            elif spec.typename is Block:
                index = spec.module_args[1]
                between = skeleton.owned(index) if index and skeleton.glue[index] else []
                counts.append(blocks[index] + sum(sizes[n] for n in between))
            else:
                where = {Prologue: 0, Epilogue: len(blocks), Head: "head"}[spec.typename]
                counts.append(sum(sizes[n] for n in skeleton.owned(where) if n != skeleton.table_name))
        return counts

    def tail(self) -> int:
        """How many entries at the end of the list must share the last stage: `logits` reads their parameters."""
        return 2 if self.skeleton.tied and len(self.skeleton.owned("head")) > 1 else 1

    def logits(self, hidden: Tensor, layers: list[nn.Module], training: bool) -> Tensor:
        """HF's head on `last_hidden_state` [..., H] -> [..., I+1], with the parameters found in `layers`."""
        names = set(self.skeleton.owned("head"))
        params = {n: p for layer in layers for n, p in layer.named_parameters() if n in names}
        assert names == set(params), f"the head needs {sorted(names - set(params))}, which live on another stage"
        return self.skeleton.logits(hidden, params, training)


def to_layer_specs(
    config: PreTrainedConfig, weights: Weights | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[LayerSpec | TiedLayerSpec]:
    """The pipeline of a causal LM as DeepSpeed LayerSpecs: embedding, prologue, blocks, epilogue, head.

    Building a spec makes only that layer: its slices of `weights`, or values that depend on (`seed`, HF name) alone.
    The last layer returns hidden states; `ModelBuilder.logits` or `RecommenderPipe.logits` turns them into scores.

    Raises:
        UserError: the model type cannot be cut into stages (the reason is named).
    """
    return ModelBuilder(config, weights, seed=seed, dtype=dtype).specs()
