"""The recommender as a DeepSpeed PipelineModule: HF layers, one float tensor per boundary, hidden states out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ds_recsys.errors import UserError
from ds_recsys.head.shard import HeadShard
from ds_recsys.head.split import SplitHead
from ds_recsys.models.layers import Block, ItemTable, PipelineLayer
from ds_recsys.models.specs import TIED_KEY, ModelBuilder
from ds_recsys.models.split_head import HeadEntry, stage_rows
from ds_recsys.models.tied_table import TiedTable
from ds_recsys.models.weights import Weights
from ds_recsys.objective import NextItemLoss
from ds_recsys.topology import ALONE, TensorAxis


class RecommenderPipe(PipelineModule):
    """An HF causal LM over item ids, cut into pipeline stages.

    Args:
        config: of the causal LM; see `recommender_config`.
        topology: DeepSpeed `ProcessTopology` with axes `pipe`, `data` and, for tensor parallelism, `model`.
        weights: pretrained weights, or None for random ones; either way a stage makes its own layers only.
        seed: of the random initialisation; values depend on (seed, HF name), not on the grid.
        partition_method: "parameters", "uniform" or "type:REGEX" (on `Block`, `ItemTable`, `Prologue`, `Epilogue`,
            `Head` or `HeadEntry` and `HeadRows`).
        bounds: first layer of each stage and the number of layers, in place of `partition_method`.
        activation_checkpoint_interval: recompute every that many layers in backward; 0: keep activations.
        dtype: of the parameters as built; DeepSpeed casts for bf16 itself.
        embedding_dropout: on the item embeddings while training, beside what the config's own fields drop.
        sequence_parallel: split the activations between the blocks over the tensor axis; lengths must divide by it.
        cosine_scale: scores are this times the cosine of hidden state and item, in place of the head's own dot product.
        sparse_table: the item table gets row-sparse gradients from lookups; for sampled losses.
        split_head: make several layers of the head; needs an engine of `pipeline_engine` and the loss of `next_item_loss`.
        pipe_options: `loss_fn`, `seed_layers`, `base_seed`, `dynamic_shape` ... of DeepSpeed's PipelineModule.

    A mixture of experts trains on the next-item loss alone: the auxiliary router losses of HF's forward are not added.

    Input of the first stage: ids [B, S] int64. Output of the last: hidden states [B, S, H]; `loss_fn` gets those, with
    what `ds_recsys.head.split` puts behind them where the head is split.

    Raises:
        UserError: model type that cannot be cut, bounds that do not fit, a stage without parameters.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        topology,
        *,
        weights: Weights | None = None,
        seed: int = 0,
        partition_method: str = "parameters",
        bounds: Sequence[int] | None = None,
        activation_checkpoint_interval: int = 0,
        dtype: torch.dtype = torch.float32,
        embedding_dropout: float = 0.0,
        sequence_parallel: bool = False,
        cosine_scale: float | None = None,
        sparse_table: bool = False,
        split_head: SplitHead | None = None,
        loss_fn: Callable | None = None,
        **pipe_options,
    ):
        builder = ModelBuilder(
            config,
            weights,
            seed=seed,
            dtype=dtype,
            embedding_dropout=embedding_dropout,
            sequence_parallel=sequence_parallel,
            cosine_scale=cosine_scale,
            sparse_table=sparse_table,
            split_head=split_head,
        )
        # nn.Module refuses attributes before its __init__, which only runs inside PipelineModule's; these are no
        # modules.
        object.__setattr__(self, "builder", builder)
        object.__setattr__(self, "_wanted_bounds", None if bounds is None else list(bounds))
        options = {"activation_checkpoint_func": checkpointing.non_reentrant_checkpoint, **pipe_options}
        super().__init__(
            layers=builder.specs(),
            topology=topology,
            loss_fn=loss_fn,
            partition_method=partition_method,
            activation_checkpoint_interval=activation_checkpoint_interval,
            **options,
        )
        self._mark_shards()

    def _mark_shards(self) -> None:
        """Tell DeepSpeed's norms which parameters differ between tensor ranks, so that each value counts once."""
        shards, rank = self.builder.shards(), self.builder.tensor.rank
        for name, parameter in self.hf_named_parameters():
            if name in shards:
                parameter.tensor_model_parallel = True
                if not shards[name].owner(rank):  # key-value heads that another rank holds too
                    parameter.ds_pipe_replicated = True

    @property
    def config(self) -> PreTrainedConfig:
        """Of the HF model this pipe computes."""
        return self.builder.config

    def _count_layer_params(self) -> list[int]:
        """DeepSpeed builds every layer on every rank to count; the skeleton knows."""
        return self.builder.parameter_counts()

    def _partition_layers(self, method: str = "uniform") -> None:
        grid = self._grid
        if grid.get_slice_parallel_world_size() > 1:  # DeepSpeed's groups stand now, and no layer has been built
            axis = (
                grid.get_slice_parallel_group(),
                grid.get_slice_parallel_world_size(),
                grid.get_slice_parallel_rank(),
            )
            self.builder.set_tensor_axis(TensorAxis(*axis))
        if self._wanted_bounds is None:
            super()._partition_layers(method)
            parts = keep_tail([int(p) for p in self.parts], self.builder.tail())
        else:
            parts = self._wanted_bounds
        self.check_bounds(parts)
        self.parts = parts
        self._set_bounds(start=parts[self.stage_id], stop=parts[self.stage_id + 1])

    def check_bounds(self, bounds: Sequence[int]) -> None:
        """Raise `UserError` unless the pipe can be cut there."""
        check_bounds(bounds, self.num_stages, self.builder.parameter_counts(), self.builder.tail())

    def joined_layers(self) -> set[int]:
        """Places in the list that must be on the stage of the place before."""
        places = len(self.builder.specs())
        return set(range(places - self.builder.tail() + 1, places))

    def _synchronize_tied_weights(self) -> None:
        with (
            torch.no_grad()
        ):  # DeepSpeed broadcasts parameters that require grad, which makes autograd warn in each run
            super()._synchronize_tied_weights()

    def _is_checkpointable(self, funcs: list) -> bool:
        """Recompute decoder layers; never the item table, whose input has no gradient, nor what takes in the targets."""
        return any(isinstance(f, Block) for f in funcs) and not any(
            isinstance(f, (ItemTable, HeadEntry)) for f in funcs
        )

    @property
    def sparse_table(self) -> bool:
        """Whether the item table gets row-sparse gradients."""
        return self.builder.sparse_table

    @property
    def split_head(self) -> SplitHead | None:
        """How the head is split into layers."""
        return self.builder.split_head

    def local_layers(self) -> Iterator[tuple[str, PipelineLayer]]:
        """(name in this module, layer) of every layer of this stage, a tied table once."""
        for name, child in self.named_children():
            if isinstance(child, PipelineLayer):
                yield name, child
        for key, child in self.tied_modules.items():
            yield f"tied_modules.{key}", child

    def hf_names(self) -> dict[str, str]:
        """Parameter name in this module -> HF's full name, this stage."""
        return {f"{n}.{p}": p for n, layer in self.local_layers() for p, _ in layer.named_parameters()}

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(HF's full name, parameter) of this stage; the first and the last stage both have a tied table."""
        for _, layer in self.local_layers():
            yield from layer.named_parameters()

    def hf_state_dict(self) -> dict[str, Tensor]:
        """HF's full name -> parameter or persistent buffer of this stage."""
        return {name: value for _, layer in self.local_layers() for name, value in layer.state_dict().items()}

    @property
    def is_first_stage(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all items for hidden states of any leading shape, on the last stage: [..., H] -> [..., I+1].

        On a tensor axis: of the items this rank holds, [..., rows]. Losses and rankings do not need all scores at once:
        they take `head` and `head_input`. So does who wants scores of a split head.
        """
        if self.split_head is not None:
            raise UserError(
                "the rows of a split head are on several stages, so none has all scores: rank with pipe.head()"
            )
        return self.builder.logits(hidden, self._tail(), self.training)

    def head(self) -> HeadShard:
        """This rank's rows of the item head, on the last stage; of a split head on every stage, in new memory.

        The ranks of the shard's axis hold the other rows: of the tensor axis, or the stages of a split head.
        """
        if self.split_head is None:
            return self.builder.head(self._tail())
        axis = ALONE
        if self.num_stages > 1:
            axis = TensorAxis(self._grid.get_pipe_parallel_group(), self.num_stages, self.stage_id)
        like = next(self.parameters()).detach()
        return replace(stage_rows(self.builder, self.forward_funcs, like), axis=axis)

    def tied_table(self, begin: Callable[[int], None]) -> TiedTable | None:
        """Takes the gradient of an fp32 item table apart, where this stage has both its ends and the loss asks for `head`.

        Args:
            begin: as `TiedTable` has it.
        """
        if TIED_KEY not in self.tied_modules or self.num_stages > 1 or self.sparse_table:
            return None
        tied = self.tied_modules[TIED_KEY]
        trained = tied.embedding.weight.requires_grad and tied.embedding.weight.dtype == torch.float32
        return TiedTable(self, tied, begin) if trained and isinstance(self.loss_fn, NextItemLoss) else None

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the item rows are multiplied with: the hidden states, or HF's transform of them. [..., H] -> [..., E].

        With a split head the last stage puts out the transform, so that nothing is left to do.
        """
        return hidden if self.split_head is not None else self.builder.head_input(hidden, self._tail(), self.training)

    def to_every_stage(self, states: Tensor | None, count: int) -> Tensor:
        """[count, E] of the last stage, on all of them; the others give None. Collective over the pipeline."""
        if states is None:
            like = next(self.parameters())
            states = like.new_empty(count, self.builder.head_width, requires_grad=False)
        if self.num_stages > 1:
            source = self._grid.stage_to_global(self.num_stages - 1)
            torch.distributed.broadcast(states, source, group=self._grid.get_pipe_parallel_group())
        return states

    def _tail(self) -> list[PipelineLayer]:
        assert self.is_last_stage, f"the head lives on the last stage, this is stage {self.stage_id}"
        places = range(self.parts[-1] - self.builder.tail(), self.parts[-1])  # a profiler may wrap forward_funcs
        tail = [self._modules[str(place)] for place in places if str(place) in self._modules]
        if TIED_KEY in self.tied_modules:
            tail.append(self.tied_modules[TIED_KEY])
        return tail


def keep_tail(parts: list[int], tail: int) -> list[int]:
    """Move bounds that fall inside the last `tail` entries of the list before them; a stage may end up empty."""
    last = parts[-1] - tail
    return [min(p, last) for p in parts[:-1]] + [parts[-1]]


def check_bounds(parts: Sequence[int], num_stages: int, counts: Sequence[int], tail: int) -> None:
    """Raise `UserError` unless `parts` cuts the list into `num_stages` stages that each have parameters."""
    n = len(counts)
    rising = all(a <= b for a, b in zip(parts, parts[1:], strict=False))
    if len(parts) != num_stages + 1 or parts[0] != 0 or parts[-1] != n or not rising:
        raise UserError(
            f"stage bounds {list(parts)} do not cut {n} layers into {num_stages} stages: give {num_stages + 1} rising "
            f"numbers from 0 to {n}"
        )
    for stage, (start, stop) in enumerate(zip(parts, parts[1:], strict=False)):
        if sum(counts[start:stop]) == 0:
            raise UserError(
                f"stage {stage} of {num_stages} would hold no parameter (stage bounds {list(parts)}, {n} layers): "
                "use fewer stages, more layers or other bounds"
            )
    if num_stages > 1 and parts[-2] > n - tail:
        raise UserError(
            f"stage bounds {list(parts)} split the head: the last {tail} of {n} layers belong on the last stage"
        )
