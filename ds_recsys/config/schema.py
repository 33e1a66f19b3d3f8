"""The "recsys" block of a ds_config: one model per sub-block, one description per key."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ds_recsys.config.base import Auto, Block, NonNegative, Positive
from ds_recsys.config.compression import Compression
from ds_recsys.config.data_parallel import DataParallel
from ds_recsys.config.partition import Partition


class Columns(Block):
    """Columns of a log where the usual names do not fit; a number counts from 0 in a log without a header."""

    user: str | NonNegative | None = Field(None, description="Column of the user id.")
    item: str | NonNegative | None = Field(None, description="Column of the item id.")
    timestamp: str | NonNegative | None = Field(
        None, description="Column of the time; null, when it is written down, ignores the times: rows keep file order."
    )
    title: str | NonNegative | None = Field(None, description="Column of the item's title.")

    def given(self) -> dict[str, str | int | None]:
        """The columns that were written down: an absent timestamp is guessed, `"timestamp": null` ignores the times."""
        return self.model_dump(exclude_unset=True)


class Dataset(Block):
    """The interaction log, its filter, its split and how histories become training windows."""

    path: str | None = Field(
        None, description="File or folder of the log, or a name that `datasets.load_dataset` opens."
    )
    format: str = Field("auto", description='Layout of the log; `"auto"` recognises it from the name and first lines.')
    columns: Columns | None = Field(None, description="Column names, where the usual ones do not fit.")
    titles: str | None = Field(
        "auto", description='File of the item titles; `"auto"` looks beside and inside the log, null reads none.'
    )
    load_options: dict[str, Any] | None = Field(
        None, description='Keyword arguments of `datasets.load_dataset`, such as `{"split": "train"}`.'
    )
    min_count: NonNegative = Field(
        0, description="k-core: users and items with fewer interactions are dropped until none is left; 0 keeps all."
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of malformed rows above which the run stops before training."
    )
    min_catalogue: NonNegative = Field(
        0, description="Pad the catalogue with synthetic items to this many, to measure what a larger one costs."
    )
    split: Literal["leave_one_out", "global_time"] = Field(
        "leave_one_out",
        description="`leave_one_out`: each user's last item is the test, the one before it the validation; "
        "`global_time`: two moments cut the whole log.",
    )
    valid_fraction: float = Field(
        0.1, gt=0, lt=1, description="`global_time` only: share of the interactions, by time, that validate."
    )
    test_fraction: float = Field(
        0.1, gt=0, lt=1, description="`global_time` only: share of the interactions, the latest ones, that test."
    )
    max_length: Positive = Field(50, description="Most items of a history that the model sees.")
    stride: Positive | None = Field(
        None,
        description="Step between the training windows of one history; null covers every position exactly once.",
    )
    recent_only: bool = Field(False, description="Train only on the last `max_length` items of each history.")
    shuffle_ties: bool = Field(
        False,
        description="Training only: draw the order of a user's interactions with equal timestamps anew in each epoch.",
    )
    cache_dir: str | Auto = Field(
        "auto",
        description='Where windows, packaged data and converted weights are kept; `"auto"` is `$DS_RECSYS_CACHE`, else '
        "`ds_recsys` below `$XDG_CACHE_HOME` or `~/.cache`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Dataset":
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} + test_fraction {self.test_fraction} leave nothing to train on; "
                "lower one of them"
            )
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"stride {self.stride} is more than max_length {self.max_length}, which would skip items; lower stride"
            )
        if self.recent_only and self.stride is not None:
            raise ValueError("recent_only trains on one window a user, so stride has no meaning; remove one of them")
        return self


class Model(Block):
    """The Hugging Face causal LM that becomes the recommender."""

    path: str | None = Field(
        None,
        description="Pretrained model: hub id, local folder, a folder or file with a GGUF, or `smollm2-135m`, which "
        "comes inside a Python package.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="A model from scratch, in place of `path`: `model_type` and the keyword arguments of its Hugging "
        "Face config; weights are random.",
    )
    weights: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="With `path`: `random` keeps only its architecture (the control of a pretraining claim).",
    )
    num_layers: Positive | None = Field(None, description="Keep only the first decoder layers; null keeps all.")
    tie: bool | None = Field(
        None, description="Whether the item head shares the item embedding; null as the model has it."
    )
    embedding_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the item embeddings, beside what the model's own config drops."
    )
    item_init: Literal["random", "titles"] = Field(
        "random", description="Item embeddings: random, or the model's own encoding of the titles (needs `path`)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Model":
        if self.path is not None and self.config is not None:
            raise ValueError(f"path {self.path!r} and config are both given; keep one of them")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError('config has no "model_type"; add one, such as "model_type": "llama"')
        if self.config is not None and self.item_init == "titles":
            raise ValueError('item_init "titles" needs a pretrained model to read them; give path in place of config')
        return self


class Head(Block):
    """The item head: what the loss compares the target with, and how scores are made."""

    loss: Literal["full", "sampled", "gbce"] = Field(
        "full",
        description="`full`: softmax over the whole catalogue, never held at once; `sampled`: softmax over sampled items "
        "with logQ correction; `gbce`: gSASRec's generalised binary cross-entropy over sampled items.",
    )
    negatives: Positive = Field(
        1024, description="Items sampled per micro-batch, over the whole catalogue; `sampled` and `gbce` only."
    )
    sampling: Literal["uniform", "popularity", "in_batch"] = Field(
        "uniform",
        description="Which items are sampled: any, by how often they occur in training (to the power of "
        "`popularity_power`), or the targets of the same micro-batch.",
    )
    popularity_power: float = Field(
        0.75, ge=0, le=2, description="`popularity` only; 0 is uniform, 1 as often as seen, more favours the popular."
    )
    calibration: float = Field(
        0.75, ge=0, le=1, description="`gbce` only: 0 is binary cross-entropy, 1 makes scores calibrated (gSASRec's t)."
    )
    cosine_scale: float | None = Field(
        None,
        gt=0,
        description="Scores are this times the cosine of history and item; null: the model's own dot product.",
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="`full` only: type of the operands of its matrix products; sums stay fp32. Null: the model's."
    )
    kernel: Literal["torch", "auto", "liger", "cce"] = Field(
        "torch",
        description="`full` only, on one CUDA device per table: `liger` (Liger-Kernel) or `cce` (cut-cross-entropy) in place "
        'of our own; `"auto"` takes what is installed and fits.',
    )
    blocks: Positive = Field(
        1,
        description="Cut the head into that many pipeline layers, which stages can share; `full` only, for a model whose head "
        "is not tied to the item embedding.",
    )
    sparse_gradients: bool | Auto = Field(
        "auto",
        description="Gradients of the item table as rows, with an optimizer that touches only those; `sampled` and `gbce` "
        'with `zero_optimization.stage` 0 in fp32; `"auto"` does so where it can.',
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Head":
        sampled = ("negatives", "sampling", "popularity_power", "calibration")
        given = [name for name in sampled if getattr(self, name) != type(self).model_fields[name].default]
        if self.loss == "full" and given:
            raise ValueError(f'{", ".join(given)} has no meaning with loss "full"; choose "sampled" or "gbce"')
        if self.loss != "full" and (self.kernel != "torch" or self.compute_dtype):
            raise ValueError(f'kernel and compute_dtype have no meaning with loss "{self.loss}"; remove them')
        if self.blocks > 1 and (self.loss != "full" or self.kernel != "torch"):
            raise ValueError(
                f'blocks {self.blocks} needs loss "full" and kernel "torch", not "{self.loss}" and "{self.kernel}"; change '
                "them, or leave blocks out"
            )
        if self.loss == "full" and self.sparse_gradients is True:
            raise ValueError('sparse_gradients true needs loss "sampled" or "gbce": the full softmax touches every row')
        return self


class Training(Block):
    """How long to train, and the choices DeepSpeed's own keys have no word for."""

    epochs: Positive | None = Field(None, description="Passes over the training windows; 3 when `steps` is null too.")
    steps: Positive | None = Field(None, description="Optimizer steps, in place of `epochs`.")
    eval_every_epochs: NonNegative = Field(1, description="Epochs between validations; 0 never validates.")
    patience: Positive | None = Field(
        None, description="Stop after this many validations without a better one, by `best`."
    )
    best: Literal["ndcg", "loss"] = Field(
        "ndcg",
        description="What makes a validation the best: the highest NDCG (at the first of `evaluation.k`), which is noisy "
        "with few users, or the lowest loss.",
    )
    keep_best: bool = Field(True, description="End with the weights of the best validation and not with the last.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all items.")
    activation_checkpoint_interval: NonNegative = Field(
        0, description="Recompute activations in groups of this many layers; 0 stores them."
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs {self.epochs} and steps {self.steps} are both given; keep one of them")
        if self.patience is not None and self.eval_every_epochs == 0:
            raise ValueError(f"patience {self.patience} needs validations; set eval_every_epochs to 1 or more")
        return self


class Evaluation(Block):
    """Full ranking over the catalogue."""

    k: list[Positive] = Field(
        [10], min_length=1, description="Cut-offs K of HR@K, NDCG@K and coverage@K; the first one's NDCG is validated."
    )
    filter_seen: bool = Field(True, description="Leave the items of the user's history out of the ranking.")
    batch_size: Positive | Auto = Field("auto", description='Users per batch and rank; `"auto"` is 128.')

    @field_validator("k")
    @classmethod
    def _no_repeats(cls, value: list[int]) -> list[int]:
        if len(set(value)) != len(value):
            raise ValueError("a cut-off is repeated; keep each once")
        return value


class Checkpoint(Block):
    """When the run is saved; the place is the run's folder."""

    every_epochs: NonNegative = Field(1, description="Epochs between saves; 0 saves none but those of `every_steps`.")
    every_steps: Positive | None = Field(None, description="Optimizer steps between saves, beside `every_epochs`.")
    keep_last: Positive | None = Field(2, description="How many checkpoints stay; null keeps all.")


class Timeline(Block):
    """Where the time of a step goes: compute, waiting for the pipeline, gradients or tensor ranks, the optimizer."""

    enabled: bool = Field(
        False,
        description="Time every training step; costs about 1 % where it has hundreds of small collectives, else less, "
        "and changes no result.",
    )
    trace_step: Positive | None = Field(
        10,
        description="Step whose spans are written as a trace for chrome://tracing or ui.perfetto.dev: trace.json in the "
        "run's folder, with `ds_recsys.initialize` timeline_trace.json in the working folder; null writes none.",
    )
    every: Positive = Field(50, description="Optimizer steps between lines on rank 0 and the monitor's events.")


class Recsys(Block):
    """The block itself: the grid of ranks first, then one sub-block per concern."""

    parallel: Auto | None = Field(
        None,
        description='`"auto"`: measure this model, these devices and links when the run begins, and choose grid, '
        "micro-batches, stages, compression and mode; what is set by hand stays. Null: as set.",
    )
    pipe: Positive = Field(1, description="Pipeline stages.")
    data: Positive | Auto = Field("auto", description='Replicas; `"auto"` is world size / (`pipe` x `tensor`).')
    tensor: Positive = Field(1, description="Ranks that share each layer and the item table.")
    data_shares: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="A number per replica, for devices of unlike speed: each micro-batch of all replicas is dealt out in these "
        "proportions, a window at least to each; null is equal parts.",
    )
    sequence_parallel: bool = Field(
        False, description="Split the activations between the blocks over the `tensor` ranks too; saves their memory."
    )
    seed: NonNegative = Field(42, description="Seed of the weights, the shuffling and the dropout.")
    threads_per_rank: Positive | Auto = Field(
        "auto", description='CPU threads of a rank; `"auto"` divides the usable cores by the ranks on the host.'
    )
    partition: Partition = Field(Partition(), description="")
    dataset: Dataset = Field(Dataset(), description="")
    model: Model = Field(Model(), description="")
    head: Head = Field(Head(), description="")
    training: Training = Field(Training(), description="")
    evaluation: Evaluation = Field(Evaluation(), description="")
    checkpoint: Checkpoint = Field(Checkpoint(), description="")
    data_parallel: DataParallel = Field(DataParallel(), description="")
    compression: Compression = Field(Compression(), description="")
    timeline: Timeline = Field(Timeline(), description="")
