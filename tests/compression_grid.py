"""Started by the deepspeed launcher: train each cell of a grid of compression methods and engines, print what became of it.

    deepspeed --num_gpus 4 tests/compression_grid.py CELLS.json RESULTS.json LOG.csv

A cell is {"engine": "plain" or "pipe", "config": ds_config, "compression": block, "steps": n}.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deepspeed
import torch
import torch.distributed as dist

import ds_recsys
from ds_recsys import compat


class Layers(torch.nn.Module):
    """Matrices large enough to be compressed, vectors, and a tensor of three dimensions."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 24)
        self.inner = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(2))
        self.mixing = torch.nn.Parameter(torch.eye(24).repeat(2, 1, 1) / 2)
        self.head = torch.nn.Linear(24, 50)

    def forward(self, items, targets):
        hidden = self.embedding(items)
        for layer, mixing in zip(self.inner, self.mixing, strict=True):
            hidden = hidden + torch.tanh(layer(hidden)) @ mixing
        return torch.nn.functional.cross_entropy(self.head(hidden).float(), targets)


def train_plain(config: dict, compression: dict, steps: int):
    """A plain engine on pairs of items with something to learn; returns it and its losses, averaged over the ranks."""
    torch.manual_seed(0)
    config = {**config, "recsys": {"compression": compression}} if compression else config
    initialize = ds_recsys.initialize if compression else deepspeed.initialize
    model = Layers()
    engine = initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(steps):
        step = 0.0
        for _ in range(engine.gradient_accumulation_steps()):
            items = torch.randint(50, (8,), generator=generator)
            loss = engine(items, (3 * items + 1) % 50)
            engine.backward(loss)
            engine.step()
            step += loss.item() / engine.gradient_accumulation_steps()
        losses.append(step)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return engine, (total / dist.get_world_size()).tolist()


def train_pipe(config: dict, compression: dict, steps: int, log: str):
    """What the Trainer builds: a small Llama with a tied item table on a pipe x data x tensor grid."""
    values = {**config, "recsys": {**config["recsys"], "compression": compression or {"method": "none"}}}
    trainer = ds_recsys.Trainer(values, data=log, run_dir=None)
    trainer.callbacks = []
    losses = []
    while len(losses) < steps:
        for micro_batches in trainer.batches.epoch_iterator(len(losses) // trainer.batches.steps_per_epoch, 0):
            losses.append(trainer._step(micro_batches).item())
            if len(losses) == steps:
                break
    return trainer.engine, losses


def differing(engine) -> list[str]:
    """Weights that are not the same bit for bit on all ranks that hold them: replicas, tied and tensor-replicated ones."""
    shards = engine.module.builder.shards() if hasattr(engine.module, "builder") else {}
    named = (
        engine.module.hf_named_parameters() if hasattr(engine.module, "builder") else engine.module.named_parameters()
    )
    tensor_rank = engine.grid.get_slice_parallel_rank() if engine.pipeline_parallelism else 0
    mine = {
        (name, tensor_rank if name in shards else -1): parameter.detach().float().view(-1).numpy().tobytes()
        for name, parameter in named
    }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    copies: dict = {}
    for held in everyone:
        for name, value in held.items():
            copies.setdefault(name, set()).add(value)
    return sorted(str(name) for name, values in copies.items() if len(values) > 1)


def main(cells: list[dict], log: str) -> list[dict]:
    """One after the other in one process, each in an engine of its own."""
    results = []
    for cell in cells:
        train = train_pipe if cell["engine"] == "pipe" else train_plain
        extra = (log,) if cell["engine"] == "pipe" else ()
        engine, losses = train(cell["config"], cell["compression"], cell["steps"], *extra)
        compression = getattr(engine, "gradient_compression", None)
        results.append(
            {
                "losses": losses,
                "differing": differing(engine),
                "optimizer": type(engine.optimizer).__name__,
                **({"sent": compression.as_dict()} if compression else {}),
            }
        )
        if compression:
            compression.close()
        engine.destroy()
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("cells")
    parser.add_argument("results")
    parser.add_argument("log")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compat.skip_compiled_collectives()
    ds_recsys.init_distributed()
    outcome = main(json.loads(Path(options.cells).read_text()), options.log)
    if dist.get_rank() == 0:
        Path(options.results).write_text(json.dumps(outcome))
