"""`Mode`: what every mode does to an engine, and what it may override."""

import contextlib
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_recsys import compat
from ds_recsys.comm import probe
from ds_recsys.comm.backend import GradientBackend
from ds_recsys.comm.groups import group_like, place_of, replica_group
from ds_recsys.comm.modes import state
from ds_recsys.comm.modes.flat import FlatParameters
from ds_recsys.comm.reducer import Reducer
from ds_recsys.config.compression import Compression
from ds_recsys.config.data_parallel import DataParallel
from ds_recsys.errors import LostRank, UserError
from ds_recsys.method_hook import MethodHook

logger = logging.getLogger("ds_recsys")


class Mode:
    """A mode on an engine of ZeRO stage 0, plain or a pipeline: it decides what happens in place of averaging gradients.

    One optimizer step of the engine calls, in this order: `reduce_gradients`, clipping, `optimizer_step`, and when the
    engine has counted the step, `after_step`. Made on all ranks of the world together (see `attach.data_parallel`).

    Attributes:
        engine, options, compression: as given; `method` is the compressor, "auto" resolved.
        parameters: this rank's, as one flat buffer.
        steps: that this replica has taken so far, those that were skipped included.
        apart: whether replicas may hold different weights now.
        extra_step: whether `take_step` is at work.
        data_group: the ranks that hold the same part of the other replicas, for collectives of the main thread;
            `data_rank`, `data_size`: this one's place in it, their number.
        wire_group: the same ranks, for what a background thread sends.
        replica_group: the ranks that hold this replica between them.
        world: the ranks that are left when a replica is lost and the others go on; None for all.
    """

    def __init__(self, engine, options: DataParallel, compression: Compression):
        self.engine, self.options, self.compression = engine, options, compression
        self.parameters = FlatParameters.of(engine.module)
        self.steps, self.apart, self.extra_step = 0, False, False
        self.world: dist.ProcessGroup | None = None
        self._inside_consensus = 0
        theirs = compat.data_parallel_group(engine)
        self.data_group, self.wire_group = group_like(theirs), group_like(theirs)
        self.replica_group = replica_group(theirs)
        self.data_rank, self.data_size = dist.get_rank(self.data_group), dist.get_world_size(self.data_group)
        self.choice: probe.Choice | None = None
        self.method = self._choose() if compression.method == "auto" else compression.method
        # torch's optimizers do not look for overflows; DeepSpeed's do
        self.guarded = hasattr(engine.optimizer, "overflow")
        self._backend = GradientBackend.install()
        self._hooks = [
            MethodHook(engine, "clip_fp32_gradients", self._clip),
            MethodHook(engine, "buffered_allreduce_fallback", self._reduce),
            MethodHook(engine.optimizer, "step", self.optimizer_step),
            MethodHook(engine, compat.MODEL_STEP, self._model_step),
            MethodHook(engine, "save_checkpoint", self._save),
            MethodHook(engine, "load_checkpoint", self._load),
        ]
        if engine.pipeline_parallelism and self.data_size > 1:
            self._hooks.append(MethodHook(engine, compat.AGGREGATE_LOSS, self.sum_loss))
        if engine.pipeline_parallelism:
            self._hooks.append(MethodHook(engine, "eval_batch", self._eval_batch))
            self._hooks.append(MethodHook(engine, "train_batch", self._train_batch))
        engine.data_parallel = self

    # what a mode overrides

    def reduce_gradients(self, method: Callable, grads=None, **options) -> None:
        """In place of the engine's one call that averages all gradients of a step; `method` is that call."""
        raise NotImplementedError

    def optimizer_step(self, method: Callable, *args, **kwargs):
        """In place of `optimizer.step`; where it leaves `overflow` true the engine counts the step as skipped."""
        return method(*args, **kwargs)

    def sum_loss(self, method: Callable):
        """In place of the engine's call that averages the loss of a step over the replicas."""
        return method()

    def after_step(self) -> None:
        """The engine has counted the step; `steps` counts it too."""

    def flush(self) -> None:
        """Collective. Afterwards nothing is under way and all replicas hold the same weights."""
        raise NotImplementedError

    def consensus_weights(self) -> Tensor | None:
        """The flat weights that an evaluation, an export and a checkpoint show while replicas are `apart`. Collective.

        None: those that the rank holds, because they are the same on all replicas.
        """
        return None

    def before_evaluation(self) -> None:
        """Collective; `evaluation` is about to show the weights."""

    def progress(self, steps: int) -> int:
        """How far the run is, in steps of the whole data axis, when this replica has taken `steps`."""
        return steps

    def meet(self, progress: int) -> int:
        """Collective, at `progress`; where all replicas stand then. Only replicas of their own speed have to wait for it."""
        return progress

    def end(self) -> None:
        """Collective, after the last flush: what works in the background stops."""

    def state_dict(self) -> dict:
        """{"shared": what is the same on all ranks of the data axis, "own": what is not}, of tensors, numbers, dicts."""
        return {"shared": {}, "own": {}}

    def load_state_dict(self, content: dict) -> None:
        """Go on from `state_dict()`; without "own" when the data axis has another size now: from the weights there are."""

    def as_dict(self) -> dict:
        """The figures of the run so far on this rank, as JSON."""
        return {"mode": self.options.mode, "method": self.method, "steps": self.steps}

    def summary(self) -> str:
        """The same in a line or two."""
        figures = self.as_dict()
        text = f"data-parallel mode: {self.options.mode}, {self.steps} steps"
        if "seconds_waited" in figures:
            dense = 8 * (self.data_size - 1) / self.data_size * self.parameters.numel * self.steps
            text += (
                f"; sent {figures['sent_bytes'] / 1e6:,.1f} MB as {'fp32' if self.method == 'none' else self.method}, where "
                f"averaging every gradient as fp32 sends {dense / 1e6:,.1f} MB"
                f"; {figures['seconds']:.1f} s in averages, of which training waited {figures['seconds_waited']:.1f} s"
            )
        return f"{text}\nauto: {self.choice}" if self.choice else text

    # what all modes use

    @property
    def dense(self) -> bool:
        """Whether this step averages gradients as DeepSpeed does."""
        return False

    def _clip(self, method: Callable):
        """DeepSpeed averages the norm that clips gradients over the replicas, and each would wait for the others."""
        if self.dense:
            return method()
        group = compat.clipping_group()
        return self.answered(method, group, lambda norm: norm.mul_(dist.get_world_size(group)))

    def answered(self, method: Callable, group: dist.ProcessGroup, answer: Callable[[Tensor], object]):
        """`method()`, with `answer(tensor)` in place of DeepSpeed's sums over `group`."""
        with self._backend.gradient_scope(group, answer):
            return method()

    def make_reducer(self, method: str | None = None) -> Reducer:
        """Averages over `wire_group` with this run's compression; for one thing at a time. Collective over it."""
        given = {key: getattr(self.compression, key) for key in self.compression.model_fields_set - {"method"}}
        alone = dist.get_world_size(self.replica_group) == 1  # no other rank of the replica holds a copy of its weights
        return Reducer(self.wire_group, method or self.method, in_rank_order=not alone, **given)

    def _choose(self) -> str:
        values = sum(parameter.numel() for parameter in self.parameters.parameters)
        self.choice = probe.agreed(probe.choose(self.wire_group, self.make_reducer, values), None)
        return self.choice.method

    def agreed(self, answer: bool) -> bool:
        """Whether `answer` is true on all ranks of this replica. Collective over `replica_group`."""
        if dist.get_world_size(self.replica_group) == 1:
            return answer
        vote = torch.tensor(float(answer), device=self.engine.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self.replica_group)
        return bool(vote)

    def agreed_by_all(self, answer: bool) -> bool:
        """The same for all replicas: whoever calls it waits for the others. Collective over the world."""
        vote = torch.tensor(float(answer), device=self.engine.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return bool(vote)

    def average(self, flat: Tensor) -> Tensor:
        """flat <- its mean over the replicas, sent as fp32. Collective over `data_group`.

        Each value is summed in rank order, so copies of a weight on several stages get the same bits.
        """
        with self.watched():
            Reducer(self.data_group, "none", hierarchical=False).all_reduce(flat, [("values", (flat.numel(),))])
        return flat.div_(self.data_size)

    @contextlib.contextmanager
    def watched(self):
        """Around what waits for other ranks: that one is gone becomes one line."""
        try:
            yield
        except UserError:
            raise
        except RuntimeError as error:
            if not compat.says_peer_is_gone(error):
                raise
            why = str(error).strip().splitlines()[0]
            raise LostRank(
                f"rank {dist.get_rank()} (replica {self.data_rank}) lost another rank at step {self.steps + 1}: the run stops; "
                f"--resume it from its newest checkpoint ({why})"
            ) from error

    def warn_dropped(self) -> None:
        """What was averaged is not used."""
        if dist.get_rank() == 0:
            logger.warning(f"step {self.steps + 1}: an average is infinite or NaN: no replica uses it")

    def skip(self) -> None:
        """Let the engine count this step as one that the optimizer skipped."""
        self.engine.optimizer.overflow = True

    def take_step(self) -> None:
        """An optimizer step of the engine with the gradients that there are, which counts as no batch."""
        engine = self.engine
        counters = {name: getattr(engine, name) for name in ("global_steps", "global_samples")}
        self.extra_step = True
        try:
            getattr(engine, compat.MODEL_STEP)(None)
        finally:
            self.extra_step = False
        vars(engine).update(counters)

    def _reduce(self, method, *args, **kwargs):
        with self.watched():
            return self.reduce_gradients(method, *args, **kwargs)

    def _model_step(self, method, *args, **kwargs):
        with self.watched():
            result = method(*args, **kwargs)
            if not self.extra_step:
                self.steps += 1
                self.after_step()
        return result

    @contextlib.contextmanager
    def consensus(self):
        """Inside, this rank holds `consensus_weights`; afterwards its own again. Collective; may be nested."""
        outermost = not self._inside_consensus and self.apart
        own = None
        if outermost:
            shared = self.consensus_weights()
            if shared is not None:
                own = self.parameters.read()
                self.parameters.write(shared)
        self._inside_consensus += 1
        try:
            yield
        finally:
            self._inside_consensus -= 1
            if own is not None:
                self.parameters.write(own)

    @contextlib.contextmanager
    def evaluation(self):
        """Around an evaluation or an export: inside, all replicas hold the weights that it should see. Collective."""
        if not self._inside_consensus:
            self.before_evaluation()
        with self.consensus():
            yield

    def _train_batch(self, method, *args, **kwargs):
        with self.watched():
            return method(*args, **kwargs)

    def _eval_batch(self, method, *args, **kwargs):
        with self.evaluation():
            return method(*args, **kwargs)

    @cached_property
    def place(self) -> dict[str, int]:
        """This rank's, as `state.save` wants it."""
        return place_of(self.engine, self.data_group)

    def _save(self, method, save_dir, tag=None, *args, **kwargs):
        tag = str(tag or f"global_step{self.engine.global_steps}")
        state.save(Path(save_dir) / tag, self)
        with self.consensus():
            return method(save_dir, tag, *args, **kwargs)

    def _load(self, method, load_dir, *args, **kwargs):
        path, client_state = method(load_dir, *args, **kwargs)
        if path is not None:
            self.load(Path(path) if Path(path).is_dir() else Path(path).parent)
        return path, client_state

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's folder, whose weights the engine holds; `engine.load_checkpoint` calls it."""
        state.load(folder, self)

    def close(self) -> None:
        """Leave the engine to DeepSpeed again, with the weights that each rank has."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if vars(self.engine).get("data_parallel") is self:
            del self.engine.data_parallel
