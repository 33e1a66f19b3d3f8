"""`compress_gradients`: compression on a DeepSpeed engine that exists, and what it reports, saves and restores."""

import logging
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from ds_recsys import compat
from ds_recsys.comm import probe, state
from ds_recsys.comm.backend import GradientBackend
from ds_recsys.comm.groups import group_like, place_of
from ds_recsys.comm.reducer import Reducer, owned
from ds_recsys.comm.report import summary
from ds_recsys.config.compression import Compression
from ds_recsys.errors import UserError
from ds_recsys.method_hook import MethodHook

logger = logging.getLogger("ds_recsys")


def compress_gradients(engine, method: str = "int8", **options) -> "GradientCompression":
    """Compress what a DeepSpeed engine sends on the data axis from now on. Collective: every rank of the world calls it.

    For engines of stage 0 (plain data-parallel, PipelineEngine, BF16_Optimizer, fp16), ZeRO-1 and ZeRO-2. Averaging,
    predivide factors and clipping keep their meaning; a step with a NaN or an infinity on any rank is skipped by all.

    Args:
        engine: what `deepspeed.initialize` returned, before its first step.
        method, options: the keys of the block recsys.compression (`ds_recsys.config.compression.Compression`).

    Returns:
        The compression; also `engine.gradient_compression`. `print(it.summary())` says what was saved.

    Raises:
        UserError: the engine's gradients cannot be compressed, in one line that says why.
    """
    return GradientCompression(engine, Compression(method=method, **options))


class GradientCompression:
    """See `compress_gradients`.

    Attributes:
        reducer: None where nothing is compressed: method "none", "auto" that found fp32 fastest, one data-parallel rank.
        choice: why "auto" chose what it chose, else None.
    """

    def __init__(self, engine, options: Compression):
        _refuse(engine, options)
        self.engine, self.options = engine, options
        self.reducer: Reducer | None = None
        self.choice: probe.Choice | None = None
        self.seconds_waited = 0.0
        self._hooks: list[MethodHook] = []
        self._adapter = None
        self._group = group_like(compat.data_parallel_group(engine))
        self._world = dist.new_group()  # apart from what DeepSpeed does meanwhile
        method = options.method
        if dist.get_world_size(self._group) == 1:
            method = "none"
        elif method == "auto":
            method = self._choose()
        if method != "none":
            self._install(method)
        engine.gradient_compression = self

    def _make(self, method: str) -> Reducer:
        given = {key: getattr(self.options, key) for key in self.options.model_fields_set - {"method"}}
        return Reducer(self._group, method, **given)

    def _choose(self) -> str:
        """What is fastest for the stage with the most gradients decides for all stages."""
        sizes = [p.numel() for p in self.engine.module.parameters() if p.requires_grad]
        self.choice = probe.agreed(probe.choose(self._group, self._make, sum(sizes)), self._world)
        if dist.get_rank() == 0:
            logger.info(f"gradient compression: {self.choice}")
        return self.choice.method

    def _install(self, method: str) -> None:
        self.reducer = self._make(method)
        self._attach()

    def _attach(self) -> None:
        from ds_recsys.comm.stage_zero import StageZeroGradients
        from ds_recsys.comm.zero_stages import ZeroGradients

        engine = self.engine
        backend = GradientBackend.install()
        if engine.zero_optimization_stage() and not hasattr(engine.optimizer, "bf16_groups"):
            self._adapter = ZeroGradients(engine, self.reducer, backend)
        else:
            self._adapter = StageZeroGradients(engine, self.reducer, backend, self._waited)
        self._follow_loss_scale()
        # torch's optimizers do not look for overflows; DeepSpeed's do, on all ranks together
        self._unguarded = not hasattr(engine.optimizer, "overflow")
        self._hooks = [
            MethodHook(engine.optimizer, "step", self._step),
            MethodHook(engine, "save_checkpoint", self._save),
            MethodHook(engine, "load_checkpoint", self._load),
        ]

    def _waited(self, seconds: float) -> None:
        self.seconds_waited += seconds

    def _step(self, method, *args, **kwargs):
        optimizer = self.engine.optimizer
        if self._unguarded:
            bad = torch.tensor(float(not self.reducer.finite), device=self.reducer.device)
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self._world)
            optimizer.overflow = bool(bad)  # what the engine counts skipped steps by
        result = None if self._unguarded and optimizer.overflow else method(*args, **kwargs)
        if optimizer.overflow or not self.reducer.finite:
            if self._unguarded and dist.get_rank() == 0:
                logger.warning("a gradient is infinite or NaN: all ranks skip this step")
            self.reducer.discard()
        else:
            self.reducer.commit()
        self._follow_loss_scale()
        return result

    def _follow_loss_scale(self) -> None:
        """fp16's gradients are multiplied by it, and it changes between steps only."""
        self.reducer.feedback.scale = float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    @cached_property
    def _place(self) -> dict[str, int]:
        """This rank's, as `state.save` wants it."""
        return place_of(self.engine, self._group)

    def _save(self, method, save_dir, tag=None, *args, **kwargs):
        tag = tag or f"global_step{self.engine.global_steps}"
        state.save(Path(save_dir) / str(tag), self.reducer, self._place)
        return method(save_dir, tag, *args, **kwargs)

    def _load(self, method, load_dir, *args, **kwargs):
        path, client_state = method(load_dir, *args, **kwargs)
        if path is not None:
            self.load(Path(path) if Path(path).is_dir() else Path(path).parent)
        return path, client_state

    def load(self, folder: Path) -> None:
        """Error feedback from a checkpoint's folder, of this grid or another; `engine.load_checkpoint` calls it."""
        if self.reducer:
            state.load(folder, self.reducer, self._place, {name for name, _ in self.engine.module.named_parameters()})
            self._follow_loss_scale()

    def summary(self) -> str:
        """What was saved so far, on this rank, in a few lines."""
        return summary(self)

    def as_dict(self) -> dict:
        """The figures behind `summary`, as JSON."""
        chosen = {"choice": str(self.choice)} if self.choice else {}
        if self.reducer is None:
            return {"method": "none", **chosen}
        return {
            "method": self.reducer.options.method,
            **chosen,
            **vars(self.reducer.totals),
            "seconds_waited": self.seconds_waited,
        }

    def close(self) -> None:
        """Leave the engine to DeepSpeed again."""
        self.detach()
        self.reducer = None

    def detach(self) -> None:
        """Let go of the engine's parameters and optimizer, of which others come; until `attach`."""
        for hook in self._hooks:
            hook.remove()
        if self._adapter:
            self._adapter.close()
        self._hooks, self._adapter = [], None

    def state_of(self, names: set[str]) -> dict[tuple, torch.Tensor]:
        """What is kept of the parameters with these names, under keys that `attach` on another rank understands."""
        return state.of_parameters(self.reducer.state_dict(), names) if self.reducer else {}

    def attach(self, arrived: dict[tuple, torch.Tensor]) -> None:
        """Go on with the parameters that the engine has now; `arrived`: `state_of` those that came from other ranks."""
        if self.reducer:
            sizes = {name: parameter.numel() for name, parameter in self.engine.module.named_parameters()}
            self.reducer.load_state_dict(state.regrouped(self.reducer.state_dict(), arrived, sizes))
            self._attach()


def _refuse(engine, options: Compression) -> None:
    """UserError for what cannot work."""
    zero = engine.zero_optimization_stage()
    reasons = {
        "the engine has a data-parallel mode; give compression to that": hasattr(engine, "data_parallel"),
        "ZeRO-3 gathers and scatters weights in its own way; use stage 0, 1 or 2": zero > 2,
        "experts of a mixture (MoE) are averaged over groups of their own": engine.has_moe_layers,
        "DeepCompile reduces gradients in compiled graphs; switch it off": engine.is_deepcompile_enabled(),
        'ZeRO needs "contiguous_gradients": true for it': zero and not engine.zero_contiguous_gradients(),
        'ZeRO needs "use_multi_rank_bucket_allreduce": true for it': zero
        and not engine.zero_multi_rank_bucket_allreduce(),
        '"owner_shares" is not for ZeRO, whose shards say who sums what; remove it': options.owner_shares and zero,
        '"communication_data_type" rounds gradients before; remove it': compat.casts_gradients(engine),
        "momentum correction needs one reduction a step, and ZeRO-2 makes one a micro-batch": options.momentum
        and zero == 2,
        "momentum correction takes the place of an SGD's momentum; use SGD without momentum": options.momentum
        and not _plain_sgd(engine.optimizer),
    }
    for reason, applies in reasons.items():
        if applies and options.method != "none":
            raise UserError(f"recsys.compression: {reason}")
    owned(options, dist.get_world_size(compat.data_parallel_group(engine)))


def _plain_sgd(optimizer) -> bool:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups)
