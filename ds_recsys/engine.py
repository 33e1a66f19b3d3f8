"""`initialize()`: deepspeed.initialize plus what the config's "recsys" block names."""

import copy
import inspect
import logging

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule

from ds_recsys import compat
from ds_recsys.config import Config, load_config
from ds_recsys.config.compression import Compression
from ds_recsys.config.data_parallel import DataParallel
from ds_recsys.errors import UserError
from ds_recsys.head.row_sparse import RowSparseAdamW, all_reduce_rows
from ds_recsys.topology import init_distributed

logger = logging.getLogger("ds_recsys")


def initialize(*args, **kwargs):
    """Drop-in for `deepspeed.initialize`: same arguments, same `(engine, optimizer, dataloader, lr_scheduler)`.

    The config (a path, a dict or a `ds_recsys.config.Config`; as `config`, `config_params` or `args.deepspeed_config`)
    may hold a "recsys" block and `"auto"` batch sizes; both are checked and resolved before DeepSpeed sees the rest.
    With no capability switched on, the run is bit-equal to plain DeepSpeed. `recsys.timeline.enabled` prints where the
    time of the steps goes; the `StepTimeline` is `engine.step_timeline`. `recsys.compression.method` compresses what goes
    over the data axis; the `GradientCompression` is `engine.gradient_compression`. `recsys.partition.method` "profile" or
    "adaptive" moves layers of a pipeline; the `AdaptivePartition` is `engine.adaptive_partition`.
    `recsys.data_parallel.mode` says when replicas tell each other what they learned; the `Mode` is `engine.data_parallel`.

    Raises:
        UserError: one line naming what is wrong in the config.
    """
    call = inspect.signature(deepspeed.initialize).bind(*args, **kwargs).arguments
    namespace = call.get("args")
    given = [call.pop(name, None) for name in ("config", "config_params")]
    given.append(getattr(namespace, "deepspeed_config", None))
    given = [config for config in given if config is not None]
    if len(given) != 1:
        raise UserError(f"ds_recsys.initialize: {len(given)} configs given; give one, as config= or --deepspeed_config")
    if namespace is not None:
        call["args"] = namespace = copy.copy(namespace)
        namespace.deepspeed_config = None
    config = given[0] if isinstance(given[0], Config) else load_config(given[0])
    if config.recsys.parallel is not None:
        raise UserError(
            f'{config.source}: "recsys.parallel" "auto" is for ds_recsys.Trainer and launch/train.py, which build the model '
            "for the grid: leave it out here, and choose the grid by your module"
        )
    init_distributed()
    if isinstance(config.recsys.threads_per_rank, int):
        torch.set_num_threads(config.recsys.threads_per_rank)
    known = {"pipe", "data", "tensor", "threads_per_rank", "timeline", "compression", "data_parallel"}
    known |= {"partition"} if config.recsys.partition.measured else set()
    idle = sorted(config.recsys.model_fields_set - known)
    if idle and torch.distributed.get_rank() == 0:
        logger.warning(f"{config.source}: recsys.{', '.join(idle)} has no effect here: ds_recsys.Trainer reads it")
    model = call.get("model")
    tensor = max(1, model.topology().get_dim("model")) if isinstance(model, PipelineModule) else 1
    config = config.resolve_for_engine(pipe=getattr(model, "num_stages", 1), tensor=tensor)
    initialized = deepspeed.initialize(**call, config=config.deepspeed)
    _give_targets(initialized[0])
    _set_mode(initialized[0], config.recsys.data_parallel, config.recsys.compression)
    if config.recsys.timeline.enabled:
        from ds_recsys.timeline.report import ReportedTimeline

        engine = initialized[0]
        engine.step_timeline = ReportedTimeline(engine, config.recsys.timeline, "timeline_trace.json")
    if config.recsys.partition.measured:
        from ds_recsys.balance.callback import balance_after_steps

        balance_after_steps(initialized[0], config.recsys.partition)
    return initialized


def pipeline_engine(
    pipe, config: dict, compression: Compression | None = None, data_parallel: DataParallel | None = None
):
    """DeepSpeed's PipelineEngine over a `RecommenderPipe`.

    Weight decay spares biases and norms, as in Hugging Face's Trainer, and gradient clipping is exact for tied weights. A
    pipe with a `sparse_table` gets an Adam that updates the rows of the table that the gradient names.
    """
    compat.silence_deepspeed()
    _check_precision(config)
    config = _accumulate_at_once(config)
    trainable = [parameter for parameter in pipe.parameters() if parameter.requires_grad]
    params = config["optimizer"]["params"]
    parameters = _groups(trainable) if params.get("weight_decay") != 0 else trainable
    optimizer = None
    if pipe.sparse_table:
        config = {key: value for key, value in config.items() if key != "optimizer"}
        known = inspect.signature(RowSparseAdamW).parameters
        optimizer = RowSparseAdamW(parameters, **{key: value for key, value in params.items() if key in known})
        parameters = None
    engine = deepspeed.initialize(model=pipe, optimizer=optimizer, model_parameters=parameters, config=config)[0]
    compat.clip_tied_weights_once(engine)
    _give_targets(engine)
    if pipe.sparse_table:
        compat.reduce_tied_gradients_by(engine, all_reduce_rows)  # DeepSpeed's own is gloo's; NCCL has no sparse sum
    _set_mode(engine, data_parallel, compression)
    return engine


def _check_precision(config: dict) -> None:
    device = get_accelerator()
    for name, supported in (("fp16", device.is_fp16_supported), ("bf16", device.is_bf16_supported)):
        if (config.get(name) or {}).get("enabled") and not supported():
            raise UserError(
                f'"{name}.enabled" is true, and this device ({device.device_name()}) does not compute in {name}'
            )


def _give_targets(engine) -> None:
    if getattr(engine.module, "split_head", None) is not None:
        from ds_recsys.models.split_head import give_targets

        give_targets(engine)


def _set_mode(engine, data_parallel: DataParallel | None, compression: Compression | None) -> None:
    """How the data axis works: in `sync` compression takes gradients, in other modes what the mode sends."""
    if data_parallel is not None and data_parallel.mode != "sync":
        from ds_recsys.comm.modes.attach import attach

        attach(engine, data_parallel, compression or Compression())
    elif compression is not None and compression.method != "none":
        from ds_recsys.comm.engines import GradientCompression

        GradientCompression(engine, compression)


def _accumulate_at_once(config: dict) -> dict:
    """With bf16, add each gradient to its fp32 sum when it is computed, unless the config says otherwise.

    By default BF16_Optimizer of DeepSpeed 0.19 does so after a backward pass, and the gradient of a weight that is tied
    over stages comes out wrong (tests/test_parity.py). Added at once, gradients can also be sent while others are computed.
    """
    key = next((key for key in ("bf16", "bfloat16") if (config.get(key) or {}).get("enabled")), None)
    return {**config, key: {"immediate_grad_update": True, **config[key]}} if key else config


def _groups(trainable: list[torch.nn.Parameter]) -> list:
    """Matrices with weight decay and vectors without, or all in one group when a stage has only one kind.

    DeepSpeed reduces a norm per group over the stages, so all stages must have the same number of groups or they wait for
    each other forever.
    """
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    everywhere = torch.tensor(bool(matrices and vectors), dtype=torch.int32, device=trainable[0].device)
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    if everywhere:
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if torch.distributed.get_rank() == 0:
        logger.warning("a stage holds no biases or norms, so weight decay covers those of the other stages too")
    return trainable
