"""One rank of a pipeline whose layers move: makes steps, with and without an `AdaptivePartition`, at any cut.

The deepspeed launcher starts it on every device: balance_rank.py FOLDER, where FOLDER/job.json is {"config": file, "settings":
dotted keys over it}. Requests, each to all ranks, by their "do"; `Rank` has a method for each.
"""

import argparse
import functools
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import ds_recsys
from benchmarks.balance_cuts import near_best
from benchmarks.mailbox import serve
from ds_recsys import checkpoint, reshard
from ds_recsys.assemble import build_pipe, model_parts, training_windows
from ds_recsys.balance.measure import WINDOW, Meter
from ds_recsys.balance.migrate import migrate
from ds_recsys.balance.partition import uniform
from ds_recsys.balance.profile import StageProfiler
from ds_recsys.config import load_config
from ds_recsys.data import TrainBatches
from ds_recsys.engine import pipeline_engine
from ds_recsys.models.layers import Block
from ds_recsys.models.pipeline import keep_tail
from ds_recsys.objective import NextItemLoss

KINDS = ("compute", "pipeline", "gradients", "optimizer", "other")


class Rank:
    """The engine that a `Trainer` makes of the config, and the answers to requests."""

    def __init__(self, config, folder: Path):
        trainer = ds_recsys.Trainer(config, run_dir=None)
        self.engine, self.grid, self.config, self._folder = trainer.engine, trainer.grid, trainer.config, folder
        recsys, log = self.config.recsys, trainer.interactions
        self._windows = training_windows(log, trainer.split, recsys.dataset, recsys.dataset.cache_dir)
        self._model_config, _ = model_parts(recsys.model, log, recsys.dataset.cache_dir)
        self._by_parameters = self._bounds()
        self._watch = None
        self.batch(self.engine.micro_batches, self.engine.train_micro_batch_size_per_gpu())

    def __call__(self, request: dict) -> dict:
        request = dict(request)
        return getattr(self, request.pop("do"))(**request)

    def batch(self, micro_batches: int, micro_batch: int) -> dict:
        """From now on a step has that many micro-batches of so many windows; what they hold is the same in every step.

        Answers: the layers' kinds, the bounds that DeepSpeed's methods "parameters" and "uniform" make, and those in force.
        """
        engine = self.engine
        engine.set_train_micro_batch_size(micro_batch)
        engine.set_train_batch_size(micro_batch * micro_batches)
        engine.reset_activation_shape()
        batches = TrainBatches(
            self._windows, micro_batch=micro_batch, micro_batches=micro_batches, seed=self.config.recsys.seed
        )
        # windows of a step are about equally long; the longest are as long as the config lets them be
        self._micro_batches = max(batches.epoch_iterator(0), key=lambda step: step[0][0].shape[1])
        specs, tail = engine.module.builder.specs(), engine.module.builder.tail()
        even = keep_tail(uniform(len(specs), engine.module.num_stages), tail)
        return {
            "blocks": [number for number, spec in enumerate(specs) if spec.typename is Block],
            "cuts": {"parameters": self._by_parameters, "uniform": even},
            "bounds": self._bounds(),
            "parameters": sum(engine.module.builder.parameter_counts()),
        }

    def cut(self, bounds: Sequence[int]) -> dict:
        """Move layers until the stages have these bounds: seconds and bytes of the migration, zeros if they have them."""
        if list(bounds) == self._bounds():
            return {"seconds": 0.0, "bytes": 0, "busiest_bytes": 0, "layers": []}
        dist.barrier()
        migration = migrate(self.engine, bounds)
        return {key: getattr(migration, key) for key in ("seconds", "bytes", "busiest_bytes", "layers")}

    def steps(self, steps: int, timeline: bool = True, pattern: Sequence[bool] = (True,)) -> dict:
        """Training steps, from a barrier to the end of the partition's part in each.

        Answers: seconds and CPU seconds of each, which of them ended with a migration, and with `timeline` where the time
        went, a mean of the steps.

        Args:
            pattern: in which steps, over and over, the partition looks; in the others it is as if it was not there.
        """
        watched = ds_recsys.StepTimeline(self.engine) if timeline else None
        bare = functools.partial(type(self.engine).train_batch, self.engine)
        seconds, moved, cpu = [], [], []
        for step in range(steps):
            looks = pattern[step % len(pattern)]
            train_batch = self.engine.train_batch if looks else bare
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            train_batch(iter(self._micro_batches))
            if looks and self._watch is not None and self._watch() is not None:
                moved.append(step)
            seconds.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - busy)
        answer = {"seconds": seconds, "moved": moved, "cpu_seconds": cpu}
        if watched is not None:
            watched.close()
            answer["split"] = {kind: sum(getattr(s, kind) for s in watched.steps) / steps for kind in KINDS}
        return answer

    def watch(self, method: str = "adaptive") -> dict:
        """An `AdaptivePartition` looks at the steps from now on, until `unwatch`."""
        self._watch = ds_recsys.AdaptivePartition(self.engine, method=method)
        return {}

    def unwatch(self) -> dict:
        """Answers: what it recorded and did, on one rank."""
        watch, self._watch = self._watch, None
        watch.close()
        if dist.get_rank():
            return {}
        moves = [
            {
                "step": move.decision.step,
                "bounds": move.decision.bounds,
                "back": move.decision.back,
                "predicted_gain": move.decision.predicted_gain,
                "realised_gain": move.realised_gain,
                "seconds": move.migration.seconds,
                "bytes": move.migration.bytes,
                "transfer_seconds": [sum(prediction.transfer_seconds) for prediction in (move.before, move.after)],
                "cross_host_bytes": [prediction.cross_host_bytes for prediction in (move.before, move.after)],
            }
            for move in watch.moves
        ]
        return {"records": [asdict(record) for record in watch.records], "moves": moves}

    def costs(self, within: float, most: int) -> dict:
        """Answers: as ds_recsys profiles them at the present cut, seconds of the layers and slowdowns of the stages, and the
        cuts near the best, see `near_best`."""
        meter = Meter(self.engine, profiler := StageProfiler(self.engine))
        for _ in range(WINDOW + 1):  # in the second to the fourth the profiler samples layers
            self.engine.train_batch(iter(self._micro_batches))
            for reading in meter.read():
                meter.take(reading)
        profiler.close()
        if dist.get_rank():
            return {}
        costs = meter.costs()
        cuts = near_best(costs, self.engine.micro_batches, within, most)
        return {
            "layer_seconds": [layer.forward + layer.backward for layer in costs.layers],
            "slowdowns": [stage.slowdown for stage in costs.stages],
            "cuts": [{"bounds": bounds, "predicted": seconds} for bounds, seconds in cuts],
        }

    def reload(self, bounds: Sequence[int]) -> dict:
        """What it takes without a migration: save, make an engine with other bounds, load into that. It is then let go of.

        Answers: seconds of the three. The new engine is made in this process, which knows its data and has imported all.
        """
        folder, seconds = self._folder / "checkpoint", []
        dist.barrier()
        begin = time.perf_counter()
        saved = checkpoint.save(
            self.engine, folder, self.engine.global_steps, {}, client_state=reshard.parameter_names(self.engine)
        )
        seconds.append(time.perf_counter())
        pipe = build_pipe(self.config.recsys, self._model_config, None, self.grid, list(bounds))
        pipe.loss_fn = NextItemLoss(pipe)
        engine = pipeline_engine(pipe, self.config.deepspeed)
        seconds.append(time.perf_counter())
        reshard.load(engine, saved, self.grid)
        dist.barrier()
        seconds.append(time.perf_counter())
        assert engine.global_steps == self.engine.global_steps
        del engine, pipe
        gc.collect()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
        starts = [begin, *seconds]
        return {name: b - a for name, a, b in zip(("save", "build", "load"), starts, seconds, strict=False)}

    def _bounds(self) -> list[int]:
        return [int(bound) for bound in self.engine.module.parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    folder = parser.parse_args().folder
    job = json.loads((folder / "job.json").read_text())
    rank = Rank(load_config(job["config"], overrides=job["settings"]), folder)
    serve(folder, int(os.environ["RANK"]), rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
