"""`data_parallel`: a mode on a DeepSpeed engine that exists."""

from ds_recsys import compat
from ds_recsys.comm.modes.base import Mode
from ds_recsys.config.compression import Compression
from ds_recsys.config.data_parallel import DataParallel
from ds_recsys.errors import UserError


def data_parallel(engine, mode: str = "local_sgd", compression: dict | Compression | None = None, **options) -> Mode:
    """From now on the replicas of a DeepSpeed engine tell each other what they learn in another way. Collective.

        ds_recsys.data_parallel(engine, mode="diloco", every=50, compression={"method": "int8"})

    For engines of ZeRO stage 0, plain or PipelineEngine: in fp32, or with BF16_Optimizer for "delayed". Call
    `engine.data_parallel.flush()` at the end of training; evaluate, and export, inside `with
    engine.data_parallel.evaluation():` (`eval_batch` does so by itself).

    Args:
        engine: what `deepspeed.initialize` returned, before its first step.
        mode, options: the keys of the block recsys.data_parallel (`ds_recsys.config.data_parallel.DataParallel`).
        compression: the block recsys.compression, for what the mode sends.

    Returns:
        The mode; also `engine.data_parallel`.

    Raises:
        UserError: the engine cannot do this, in one line that says why.
        ValueError: the options do not fit the mode.
    """
    given = compression if isinstance(compression, Compression) else Compression(**(compression or {}))
    return attach(engine, DataParallel(mode=mode, **options), given)


def attach(engine, options: DataParallel, compression: Compression) -> Mode:
    """As `data_parallel`, from the typed blocks."""
    _refuse(engine, options, compression)
    if options.mode == "delayed":
        from ds_recsys.comm.modes.delayed import Delayed

        return Delayed(engine, options, compression)
    if options.mode == "async":
        from ds_recsys.comm.modes.asynchronous import Asynchronous

        return Asynchronous(engine, options, compression)
    from ds_recsys.comm.modes.rounds import Rounds

    return Rounds(engine, options, compression)


def _refuse(engine, options: DataParallel, compression: Compression) -> None:
    """UserError for what cannot work."""
    stage, sharded = engine.zero_optimization_stage(), hasattr(engine.optimizer, "bf16_groups")
    sparse = [name for name, module in engine.module.named_modules() if getattr(module, "sparse", False) is True]
    reasons = {
        '"sync" is what the engine does without it; leave the call out': options.mode == "sync",
        f"the shards of ZeRO-{stage} assume that replicas are equal; use stage 0": stage and not sharded,
        "bf16 keeps fp32 weights beside the model's, in shards or whole; train in fp32": engine.bfloat16_enabled()
        and options.local,
        '"look_ahead" takes a step back, which the rounded weights of bf16 do not; train in fp32': sharded
        and options.look_ahead,
        "fp16's loss scale changes; train in fp32": engine.fp16_enabled(),
        "a gradient scaler changes its scale; switch torch_autocast's fp16 off": engine.torch_autocast_z0_gradscaler
        is not None,
        "experts of a mixture (MoE) are averaged over groups of their own": engine.has_moe_layers,
        "DeepCompile reduces gradients in compiled graphs; switch it off": engine.is_deepcompile_enabled(),
        "the gradients are compressed already; give compression to this call": hasattr(engine, "gradient_compression"),
        "the engine has a mode already; close it first": hasattr(engine, "data_parallel"),
        '"communication_data_type" says what gradients are sent as; remove it': compat.casts_gradients(engine),
        f"the gradients of {', '.join(sparse)} are rows; make them dense": bool(sparse),
        "momentum correction corrects gradients that are averaged in every step; remove it": compression.momentum,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f'recsys.data_parallel.mode "{options.mode}": {reason}')
