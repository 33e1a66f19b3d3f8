"""One arm of a comparison: a recommender on a grid of ranks that measures training steps when it is asked.

The deepspeed launcher starts it on every device: arm.py FOLDER, where FOLDER/arm.json is {"engine": "deepspeed" | "ddp",
"config": file, "settings": dotted keys over it}. A request is {"micro_batches": M, "warmup": w, "steps": n, "alone": bool,
"timeline": bool, "trace": file or null}: M micro-batches over all replicas make the global batch; "alone" (ddp only) has
every device compute all of them by itself. {"plan": true} asks what "parallel": "auto" came to.
"""

import argparse
import contextlib
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import ds_recsys
from benchmarks.mailbox import serve
from ds_recsys.assemble import build_pipe, load_interactions, model_parts, split_interactions, training_windows
from ds_recsys.config import load_config
from ds_recsys.data import TrainBatches
from ds_recsys.objective import NextItemLoss
from ds_recsys.topology import Grid, init_distributed


class Batch:
    """One global batch of the config's log, the same in every step and mode, so that all steps cost the same."""

    def __init__(self, config, data_size: int, data_rank: int):
        self._shares = config.recsys.data_shares
        dataset, cache = config.recsys.dataset, config.recsys.dataset.cache_dir
        self.interactions = load_interactions(dataset, cache)
        self.size, self._data, self._seed = config.train_batch_size, (data_size, data_rank), config.recsys.seed
        split = split_interactions(self.interactions, dataset)
        self._windows = training_windows(self.interactions, split, dataset, cache)

    def cut(self, micro_batches: int, alone: bool = False) -> list:
        """This rank's share of `micro_batches` micro-batches; all of them when `alone`."""
        data_size, data_rank = (1, 0) if alone else self._data
        batches = TrainBatches(
            self._windows,
            micro_batch=self.size // micro_batches,
            micro_batches=micro_batches // data_size,
            data_size=data_size,
            data_rank=data_rank,
            seed=self._seed,
            shares=None if alone else self._shares,
        )
        return next(batches.epoch_iterator(0))


class DeepSpeedArm:
    """DeepSpeed's pipeline engine on the config's grid, as `Trainer` makes it, and where the time of its steps went."""

    def __init__(self, config, folder: Path):
        trainer = ds_recsys.Trainer(config, run_dir=folder / "run" if config.recsys.parallel else None)
        self.engine, self.plan = trainer.engine, trainer.plan
        self.parameters = sum(parameter.numel() for parameter in trainer.pipe.parameters())
        self.batch = Batch(trainer.config, trainer.grid.data, self.engine.grid.get_data_parallel_rank())

    def cut(self, micro_batches: int, alone: bool) -> None:
        assert not alone, "a DeepSpeed engine has its reduction built in"
        self.micro_batches = self.batch.cut(micro_batches)
        self.engine.set_train_micro_batch_size(self.batch.size // micro_batches)
        self.engine.set_train_batch_size(self.batch.size)
        self.engine.reset_activation_shape()

    def step(self) -> float:
        return self.engine.train_batch(iter(self.micro_batches)).item()

    def timeline(self, trace: str | None):
        # the trace is of the first step after warming up
        return ds_recsys.StepTimeline(self.engine, trace_step=1 if trace else None, trace_file=trace)


class DistributedDataParallelArm:
    """torch's DistributedDataParallel, which reduces buckets of gradients while the last micro-batch's backward goes on."""

    plan = None

    def __init__(self, config, folder: Path):
        init_distributed()
        config = config.resolve()
        recsys, rank = config.recsys, dist.get_rank()
        self.batch = Batch(config, dist.get_world_size(), rank)
        model_config, weights = model_parts(recsys.model, self.batch.interactions, recsys.dataset.cache_dir)
        torch.set_num_threads(recsys.threads_per_rank)
        pipe = build_pipe(recsys, model_config, weights, Grid(data=dist.get_world_size()), None)
        pipe.loss_fn = NextItemLoss(pipe)
        self.parameters = sum(parameter.numel() for parameter in pipe.parameters())
        self.model = nn.parallel.DistributedDataParallel(_WithLoss(pipe), gradient_as_bucket_view=True)
        values = config.deepspeed
        params = {key: value for key, value in values["optimizer"]["params"].items() if key != "torch_adam"}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **params)
        self.clip = values["gradient_clipping"]

    def cut(self, micro_batches: int, alone: bool) -> None:
        self.micro_batches, self._alone = self.batch.cut(micro_batches, alone), alone

    def step(self) -> float:
        total, count = 0.0, len(self.micro_batches)
        for i, (inputs, labels) in enumerate(self.micro_batches, start=1):
            reduces = i == count and not self._alone  # alone, all devices come to the same gradient
            with contextlib.nullcontext() if reduces else self.model.no_sync():
                loss = self.model(inputs, labels) / count
                loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def timeline(self, trace):
        return None  # its reducer waits in C++, inside backward


class _WithLoss(nn.Module):
    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def forward(self, inputs, labels):
        return self.pipe.loss_fn(self.pipe(inputs), labels)


class Arm:
    """Answers requests with measured steps."""

    def __init__(self, engine: str, config, folder: Path):
        self.arm = (DistributedDataParallelArm if engine == "ddp" else DeepSpeedArm)(config, folder)
        self._cut = None

    def __call__(self, request: dict) -> dict:
        if request.get("plan"):
            return {"values": self.arm.plan.values, "reason": self.arm.plan.reason}
        cut = (request["micro_batches"], request["alone"])
        if cut != self._cut:
            self.arm.cut(*cut)
            self._cut = cut
        for _ in range(request["warmup"]):
            self.arm.step()
        timeline = self.arm.timeline(request.get("trace")) if request.get("timeline") else None
        losses, seconds, cpu = [], [], time.process_time()
        for _ in range(request["steps"]):
            dist.barrier()  # ranks see a request up to a polling interval apart
            started = time.perf_counter()
            losses.append(self.arm.step())
            seconds.append(time.perf_counter() - started)
        answer = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - cpu,
            "losses": losses,
            "parameters": self.arm.parameters,
        }
        if timeline is not None:
            answer["split"] = [{kind: getattr(step, kind) for kind in KINDS} for step in timeline.steps]
            timeline.close()
        _release_memory()
        return answer


def _release_memory() -> None:
    """Give what glibc keeps for later back to the system: many idle arms share one machine."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release:
        release(0)


KINDS = ("compute", "pipeline", "gradients", "tensor", "optimizer", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    folder = parser.parse_args().folder
    spec, rank = json.loads((folder / "arm.json").read_text()), int(os.environ["RANK"])
    arm = Arm(spec["engine"], load_config(spec["config"], overrides=spec["settings"]), folder)
    serve(folder, rank, arm)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
