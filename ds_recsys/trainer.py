"""The loop over `train_batch`: data, model and engine from one config, validation, save and resume, export."""

import contextlib
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from ds_recsys import checkpoint, compat, reshard
from ds_recsys.assemble import (
    build_pipe,
    load_interactions,
    model_parts,
    split_interactions,
    training_windows,
    with_sources,
)
from ds_recsys.callbacks import Callback, standard_callbacks
from ds_recsys.config import Config, load_config
from ds_recsys.data import Interactions, TrainBatches
from ds_recsys.data.batches import moments_of
from ds_recsys.data.splits import train_counts
from ds_recsys.engine import pipeline_engine
from ds_recsys.errors import UserError
from ds_recsys.evaluation import evaluate
from ds_recsys.models import Weights, export
from ds_recsys.models.folder import write_description
from ds_recsys.models.load import load_weights
from ds_recsys.objective import next_item_loss
from ds_recsys.runlog import RunLog
from ds_recsys.topology import Grid, init_distributed


class Trainer:
    """Fine-tune a Hugging Face causal LM as a next-item recommender on a pipe x data x tensor grid of ranks.

        trainer = ds_recsys.Trainer("ds_configs/quickstart.json", data="ml-100k", run_dir="runs/first")
        trainer.train()
        print(trainer.evaluate("test"))

    Run it under any launcher that starts one process per device (deepspeed, torchrun, accelerate); alone it is one rank.
    Every method is collective.

    Args:
        config: ds_config path, dict or `Config`, with a "recsys" block.
        data: interaction log (path, or `Interactions` already read) in place of the config's.
        model: hub id or folder, in place of the config's.
        run_dir: gets checkpoints/, best/ (a Hugging Face folder), log.jsonl and, from launch/train.py, the report; None
            writes nothing, for evaluation only.
        resume: True for the newest checkpoint in `run_dir`, or the name of one.
        overwrite: start anew in a `run_dir` that holds a run; what it holds is deleted at the first step.
        callbacks: see `ds_recsys.callbacks.Callback`.

    Raises:
        UserError: one line, before any process group exists where the config alone shows the mistake.
    """

    def __init__(
        self,
        config: Config | dict | str | Path,
        *,
        data: str | Path | Interactions | None = None,
        model: str | None = None,
        run_dir: str | Path | None = "runs/train",
        resume: bool | str = False,
        overwrite: bool = False,
        callbacks: Sequence[Callback] = (),
    ):
        self.run_dir = None if run_dir is None else Path(run_dir)
        found = self._find_checkpoint(resume, overwrite)
        state = checkpoint.read_state(found) if found else None
        config = config if isinstance(config, Config) else load_config(config)
        given = isinstance(data, Interactions)
        unresolved = with_sources(config, data=None if given else data, model=model)
        config = self._resolved(unresolved)
        recsys, cache = config.recsys, config.recsys.dataset.cache_dir
        self.interactions = data if given else load_interactions(recsys.dataset, cache)
        self.split = split_interactions(self.interactions, recsys.dataset)
        windows = training_windows(self.interactions, self.split, recsys.dataset, cache)
        model_config, weights = model_parts(recsys.model, self.interactions, cache)
        counts = torch.from_numpy(train_counts(self.interactions, self.split))
        self.plan = None
        if recsys.parallel == "auto" and run_dir is not None:
            init_distributed()
            torch.set_num_threads(recsys.threads_per_rank)
            self.plan = self._choose_plan(unresolved, state, model_config, windows, counts)
            config = self.plan.apply(unresolved)
        self.config = config = config.resolve(windows=len(windows), model_config=model_config)
        recsys, values = config.recsys, config.deepspeed
        self.grid = Grid(recsys.pipe, recsys.data, recsys.tensor)
        self._identity = {
            "model": f"{model_config.model_type}, {model_config.num_hidden_layers} x {model_config.hidden_size}",
            "split": self.split.hash,
            "catalogue": self.interactions.num_items,
            "seed": recsys.seed,
            "train_batch_size": values["train_batch_size"],
        }
        self._cut = {"grid": [self.grid.pipe, self.grid.data, self.grid.tensor], "head_blocks": recsys.head.blocks}
        same_cut = not state or all(state.get(key, 1) == value for key, value in self._cut.items())
        if found:
            checkpoint.check_identity(found, state["identity"], self._identity)
        init_distributed()
        torch.set_num_threads(recsys.threads_per_rank)
        bounds = state["bounds"] if state and same_cut else recsys.partition.bounds
        self.pipe = build_pipe(recsys, model_config, weights, self.grid, bounds)
        self.pipe.loss_fn = next_item_loss(self.pipe, recsys.head, recsys.training.label_smoothing, counts)
        self.engine = pipeline_engine(self.pipe, values, recsys.compression, recsys.data_parallel)
        self.mode = getattr(self.engine, "data_parallel", None)
        self._length_multiple = recsys.tensor if recsys.sequence_parallel else 1
        self.batches = TrainBatches(
            windows,
            micro_batch=self.engine.train_micro_batch_size_per_gpu(),
            micro_batches=self.engine.micro_batches,
            data_size=self.grid.data,
            data_rank=self.engine.grid.get_data_parallel_rank(),
            seed=recsys.seed,
            length_multiple=self._length_multiple,
            moments=moments_of(self.interactions) if recsys.dataset.shuffle_ties else None,
            shares=recsys.data_shares,
        )
        self.is_main = torch.distributed.get_rank() == 0
        self.total_steps = recsys.training.steps or recsys.training.epochs * self.batches.steps_per_epoch
        self.callbacks = [*standard_callbacks(recsys), *callbacks]
        self.state = {"step": 0, "best": None, "validations_since_best": 0}
        if found:
            self.state = state["training"]
            if same_cut:
                checkpoint.load(self.engine, found)
            else:
                reshard.load(self.engine, found, Grid(*state["grid"]))
            if self.mode:  # replicas may have taken different numbers of steps
                self.state["step"] = self.mode.steps
        self._met = self._progress()
        cosine_scale = self.pipe.builder.cosine_scale
        self._serving = {"recsys": {"max_length": recsys.dataset.max_length, "cosine_scale": cosine_scale}}
        if self.is_main and self.run_dir:  # what launch/export.py needs beside a checkpoint
            (self.run_dir / "model").mkdir(parents=True, exist_ok=True)
            log = self.interactions
            write_description(self.run_dir / "model", model_config, log.items, log.titles, self._serving)
        self._log = RunLog(self.run_dir / "log.jsonl", self.state["step"]) if self.is_main and self.run_dir else None
        self._length = None  # of the micro-batches that the engine's buffers fit

    @staticmethod
    def _resolved(config: Config) -> Config:
        """Its data and model count at first; the grid may still be open."""
        if config.recsys.parallel is None:
            return config.resolve()
        from ds_recsys.planner.choose import on_some_grid

        return on_some_grid(config)

    @staticmethod
    def _choose_plan(config: Config, state: dict | None, *measured_on):
        """What `"parallel": "auto"` comes to; a resumed run keeps what it had."""
        from ds_recsys.planner.choose import choose, known

        return (state and known(state.get("plan"))) or choose(config, *measured_on)

    def _find_checkpoint(self, resume: bool | str, overwrite: bool) -> Path | None:
        folder = self.run_dir and self.run_dir / "checkpoints"
        if resume:
            return checkpoint.find(folder, resume if isinstance(resume, str) else None)
        if folder and folder.exists() and not overwrite:
            raise UserError(f"{self.run_dir} holds a run: --resume it, --overwrite it, or give another --run_dir")
        return None

    def describe(self) -> str:
        """The run in a few lines: data, split, grid, stages, and every value that took the place of an "auto"."""
        stages = "  ".join(f"stage {s}: layers {a}-{b - 1}" for s, (a, b) in enumerate(pairwise(self.pipe.parts)))
        lines = [
            self.interactions.describe(),
            self.split.describe(),
            f"{self.pipe.config.model_type}, {self.pipe.config.num_hidden_layers} decoder layers; {self.grid}; {stages}",
            f"{self.total_steps} steps of {self.batches.global_batch} windows, {self.batches.padding_fraction:.0%} padding",
            *([self.plan.reason] if self.plan else []),
            *self.config.describe(),
            *(f"warning: {line}" for line in self.config.warnings),
        ]
        return "\n".join(lines)

    def protocol(self, which: str) -> str:
        """How `evaluate` ranks, in one line."""
        seen = "seen items filtered" if self.config.recsys.evaluation.filter_seen else "seen items not filtered"
        return f"{self.split.describe()}; {which}, full ranking over {self.interactions.num_items:,} items, {seen}"

    def train(self) -> dict[str, float] | None:
        """Train to the configured epochs or steps and return the best validation's figures (None without validations).

        With `keep_best` the pipe afterwards holds the weights of the best validation, ready for `evaluate` and `export`.
        """
        if self.run_dir is None:
            raise UserError(
                "this Trainer was made for evaluation only, with run_dir=None; give it a folder to train into"
            )
        if self.is_main and not self.state["step"]:
            for old in ("checkpoints", "best"):  # of the run that this one overwrites
                shutil.rmtree(self.run_dir / old, ignore_errors=True)
        torch.distributed.barrier()
        self._call("on_train_begin")
        with self.mode.watched() if self.mode else contextlib.nullcontext():
            self._loop()
        self._call("on_train_end")
        if self._log:
            self._log.flush()
        best = self.state["best"]
        if self.config.recsys.training.keep_best and best:
            load_weights(self.pipe, Weights(self.run_dir / "best"))
        return best and best["metrics"]

    def _loop(self) -> None:
        while self._progress() < self.total_steps and not self._out_of_patience():
            epoch, position = divmod(self.state["step"], self.batches.steps_per_epoch)
            for micro_batches in self.batches.epoch_iterator(epoch, position):
                loss = self._step(micro_batches)
                finished, validate, save = self._due(self._progress())
                if self.mode and (finished or validate or save):
                    # replicas of their own speed meet here, and one may have come for less than another
                    finished, validate, save = self._due(self.mode.meet(self._progress()))
                if finished and self.mode:
                    self.mode.flush()
                if validate or save:
                    self._check_finite(loss, together=True)
                if validate:
                    self._validate()
                if save:
                    self.save()
                if finished or validate or save:
                    self._met = self._progress()
                if finished:
                    break
        if self.mode:
            self.mode.flush()
            self.mode.end()

    def evaluate(self, which: str = "test") -> dict[str, float]:
        """Full ranking of the "valid" or "test" items; see `ds_recsys.evaluation.evaluate`."""
        recsys = self.config.recsys
        with self._common_weights():
            return evaluate(
                self.engine,
                self.interactions,
                self.split,
                which,
                max_length=recsys.dataset.max_length,
                batch_size=recsys.evaluation.batch_size,
                ks=recsys.evaluation.k,
                filter_seen=recsys.evaluation.filter_seen,
                length_multiple=self._length_multiple,
            )

    def export(self, folder: str | Path) -> None:
        """Write the model as a Hugging Face folder with the item catalogue; replaces `folder` when it is whole."""
        log = self.interactions
        with self._common_weights():
            export(
                self.pipe,
                folder,
                item_ids=log.items,
                titles=log.titles,
                extra_config=self._serving,
                world=self.mode.world if self.mode else None,
            )

    def save(self) -> None:
        """Checkpoint model, optimizer, scheduler, counters, data position and stage bounds, atomically."""
        if self._log:
            self._log.flush()  # a resumed run continues the log from here
        checkpoint.save(
            self.engine,
            self.run_dir / "checkpoints",
            self._progress(),
            {
                "identity": self._identity,
                **self._cut,
                "bounds": list(self.pipe.parts),
                "plan": self.plan and self.plan.as_dict(),
                "training": self.state,
            },
            client_state=reshard.parameter_names(self.engine),
            keep_last=self.config.recsys.checkpoint.keep_last,
        )

    def _common_weights(self):
        """Inside, all replicas hold the weights to show; only modes of `recsys.data_parallel` let them differ."""
        return self.mode.evaluation() if self.mode else contextlib.nullcontext()

    def _progress(self) -> int:
        """Steps of the run so far; `state["step"]` counts those of this replica."""
        return self.mode.progress(self.state["step"]) if self.mode else self.state["step"]

    def _step(self, micro_batches: list) -> torch.Tensor:
        length = micro_batches[0][0].shape[1]
        if length != self._length:
            self.engine.reset_activation_shape()
            self._length = length
        compat.seed_dropout(self.engine, self.state["step"])
        loss = self.engine.train_batch(iter(micro_batches))
        self.state["step"] += 1
        if self._log:
            self._log.step(self.state["step"], loss)
        self._call("on_step_end", loss)
        if self.state["step"] % 20 == 0:
            self._check_finite(loss)
        return loss

    def _check_finite(self, loss: torch.Tensor, together: bool = False) -> None:
        """All ranks stop together; checkpoints are only written from finite losses.

        Every rank has the same loss, but where replicas train alone: those compare theirs when they meet (`together`).
        """
        finite = True
        if self.mode is None or not self.mode.options.local:
            finite = math.isfinite(loss.item())
        elif together:
            finite = self.mode.agreed_by_all(math.isfinite(loss.item()))
        if not finite:
            raise UserError(
                f"the loss is {loss.item()} at step {self.state['step']}: training has diverged; lower the learning rate, "
                "lengthen the warm-up or clip gradients, then start again or --resume"
            )

    def _validate(self) -> None:
        with self._common_weights():
            self._validate_common()

    def _validate_common(self) -> None:
        metrics = self.evaluate("valid")
        self._length = None
        score, best = self._score(metrics), self.state["best"]
        if best is None or score > self._score(best["metrics"]):
            self.state.update(best={"step": self.state["step"], "metrics": metrics}, validations_since_best=0)
            if self.config.recsys.training.keep_best:
                self.export(self.run_dir / "best")
        else:
            self.state["validations_since_best"] += 1
        if self._log:
            self._log.validation(self.state["step"], metrics)
        if self.is_main and self.engine.monitor.enabled:
            samples = self.engine.global_samples
            self.engine.monitor.write_events([(f"Valid/{key}", value, samples) for key, value in metrics.items()])
        self._call("on_validation", metrics)

    def _score(self, metrics: dict[str, float]) -> float:
        """What makes a validation better: more of it."""
        recsys = self.config.recsys
        return -metrics["loss"] if recsys.training.best == "loss" else metrics[f"NDCG@{recsys.evaluation.k[0]}"]

    def _out_of_patience(self) -> bool:
        patience = self.config.recsys.training.patience
        return patience is not None and self.state["validations_since_best"] >= patience

    def _due(self, now: int) -> tuple[bool, bool, bool]:
        """(end, validate, save): what there is to do when the run has come from where it last did any of it to `now`."""
        recsys, epoch = self.config.recsys, self.batches.steps_per_epoch

        def passed(every: int | None) -> bool:
            return bool(every) and now // every > self._met // every

        finished = now >= self.total_steps
        validations, saving = recsys.training.eval_every_epochs, recsys.checkpoint
        validate = bool(validations) and (finished or passed(validations * epoch))
        by_epoch = saving.every_epochs and (finished or passed(saving.every_epochs * epoch))
        return finished, validate, bool(by_epoch) or passed(saving.every_steps)

    def _call(self, name: str, *arguments) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(self, *arguments)
