"""Small pipelines that train, move their layers in between and are compared bit for bit with runs that did not."""

import gc
import os
from dataclasses import dataclass, replace
from functools import partial

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn
from transformers import AutoConfig

from ds_recsys import compat
from ds_recsys.balance.migrate import migrate
from ds_recsys.config.schema import Head
from ds_recsys.engine import pipeline_engine
from ds_recsys.models import RecommenderPipe, recommender_config
from ds_recsys.objective import next_item_loss
from ds_recsys.topology import Grid, dropout_seeds

WIDTH, ROWS, LAYERS = 8, 12, 10
ADAM = {"type": "AdamW", "params": {"lr": 5e-3, "weight_decay": 0.01, "torch_adam": True}}
MODES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "bf16": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "bf16 zero1": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "bf16 zero0": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "fp16": {"zero_optimization": {"stage": 0}, "fp16": {"enabled": True, "initial_scale_power": 8}},
    "fp16 zero1": {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "initial_scale_power": 8}},
}
# there and back, several layers at once; with four stages each of them changes
BOUNDS = {2: [0, 5, LAYERS], 4: [0, 2, 5, 8, LAYERS]}
MOVES = {
    2: {10: [0, 8, LAYERS], 20: [0, 2, LAYERS], 35: [0, 5, LAYERS]},
    4: {10: [0, 3, 4, 7, LAYERS], 20: [0, 1, 6, 8, LAYERS], 35: [0, 2, 5, 8, LAYERS]},
}
RECOMMENDER_BOUNDS = {2: [0, 4, 8], 4: [0, 2, 3, 4, 8]}
RECOMMENDER_MOVES = {
    2: {10: [0, 5, 8], 20: [0, 2, 8], 35: [0, 4, 8]},
    4: {10: [0, 3, 4, 5, 8], 20: [0, 2, 4, 5, 8], 35: [0, 2, 3, 4, 8]},
}


@dataclass(frozen=True)
class Setup:
    grid: Grid
    mode: str = "zero0"
    tie: str = "no"  # "ends": the table is the first and the last layer; "three": and one in the middle
    recompute: int = 0
    dropout: float = 0.0
    clip: float = 0.0
    optimizer: str = "config"  # "client": built by the user, with two groups; "sparse": rows of the item table alone
    model: str = "plain"  # or "recommender"

    def but(self, **changes) -> "Setup":
        return replace(self, **changes)


class Block(nn.Module):
    """Residual, with buffers that follow the training: one that is saved and one that is not.

    With recomputation they must not: how many forward passes come before a backward pass depends on the stage.
    """

    def __init__(self, dropout: float = 0.0, follow: bool = True):
        super().__init__()
        self.follow = follow
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("gain", torch.ones(()), persistent=False)

    def forward(self, hidden):
        if self.training and self.follow:
            self.mean = 0.9 * self.mean + 0.1 * hidden.detach().float().mean((0, 1))
            self.gain = self.gain * 0.999
        branch = self.outer(F.gelu(self.inner(self.norm(hidden) - self.mean.to(hidden.dtype))))
        return hidden + self.gain.to(hidden.dtype) * F.dropout(branch, self.dropout, self.training)


class Adapted(nn.Module):
    """A frozen matrix with a trainable low-rank one beside it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH)

    def forward(self, hidden):
        return hidden + torch.tanh(self.base(hidden) + self.up(self.down(hidden)))


def scores(table, hidden):
    return F.linear(hidden, table.weight)


def add_mean(table, hidden):
    return hidden + table.weight.mean(0)


def keep(hidden):
    return hidden * 1.0


def layers(setup: Setup) -> list:
    def table(**options):
        return TiedLayerSpec("table", nn.Embedding, ROWS, WIDTH, **options)

    tied = setup.tie != "no"
    options = (setup.dropout, not setup.recompute)
    block, late = partial(LayerSpec, Block, *options), Block(*options)
    late.inner.weight.requires_grad_(False)  # after it was built: a spec that builds it again would not know
    return [
        table() if tied else LayerSpec(nn.Embedding, ROWS, WIDTH),
        keep,
        block(),
        Block(*options),
        block(),
        table(forward_fn=add_mean) if setup.tie == "three" else LayerSpec(Adapted),
        block(),
        late,
        LayerSpec(Adapted),
        table(forward_fn=scores) if tied else LayerSpec(nn.Linear, WIDTH, ROWS),
    ]


def loss_fn(outputs, labels):
    return F.cross_entropy(outputs.float().flatten(0, 1), labels.flatten())


def plain_module(setup: Setup) -> PipelineModule:
    torch.manual_seed(5)
    seeds = dropout_seeds(5, setup.grid.coordinates().data) if setup.dropout else {}
    options = {
        "activation_checkpoint_func": checkpointing.non_reentrant_checkpoint,
        "partition_method": "uniform",
        **seeds,
    }
    options["activation_checkpoint_interval"] = setup.recompute
    return PipelineModule(layers(setup), topology=setup.grid.deepspeed(), loss_fn=loss_fn, **options)


def two_groups(module) -> list[dict]:
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 1e-2}]


def make_engine(setup: Setup, module=None, optimizer=None):
    module = module or plain_module(setup)
    config = {
        "train_batch_size": 4 * setup.grid.data,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": setup.clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-3, "warmup_num_steps": 30}},
        **MODES[setup.mode],
    }
    call = {"model_parameters": [p for p in module.parameters() if p.requires_grad]}
    if optimizer is not None:
        call = {"optimizer": optimizer}
    elif setup.optimizer == "client":
        call = {"optimizer": torch.optim.AdamW(two_groups(module), lr=5e-3)}
    else:
        config["optimizer"] = ADAM
    engine = deepspeed.initialize(model=module, config=config, **call)[0]
    if setup.clip:
        compat.clip_tied_weights_once(engine)  # DeepSpeed's fp32 norm is that of the first stage alone
    return engine


def make_recommender(setup: Setup):
    """A small Llama over its items, sharded over the tensor axis: 8 layers, the item table first and last when tied."""
    base = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    )
    pipe = RecommenderPipe(
        recommender_config(base, ROWS - 1, tie=setup.tie != "no"),
        setup.grid.deepspeed(),
        seed=3,
        bounds=RECOMMENDER_BOUNDS[setup.grid.pipe],
        activation_checkpoint_interval=setup.recompute,
        embedding_dropout=setup.dropout,
        sparse_table=setup.optimizer == "sparse",
        **dropout_seeds(3, setup.grid.coordinates().data),
    )
    for name, parameter in pipe.hf_named_parameters():
        if "gate_proj" in name:
            parameter.requires_grad_(False)
    head = Head(loss="sampled", negatives=5) if setup.optimizer == "sparse" else Head()
    pipe.loss_fn = next_item_loss(pipe, head, 0.0, torch.arange(ROWS))
    config = {
        "train_batch_size": 4 * setup.grid.data,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": setup.clip,
        "optimizer": ADAM,
        "steps_per_print": 1000,
        **MODES[setup.mode],
    }
    return pipeline_engine(pipe, config)


def interactions(engine, step: int):
    """The micro-batches of this data rank: ids [2, 6] and (targets, scale) of `NextItemLoss`."""
    scale = torch.tensor(1 / 12, dtype=torch.float64)
    for ids, _ in data(engine, step):
        ids = torch.cat([ids, 11 - ids], dim=1).clamp(min=1)[:, :6]
        yield ids, ((3 * ids) % (ROWS - 1) + 1, scale)


def data(engine, step: int):
    """The micro-batches of this data rank, as (ids, labels) int64 [2, 4]."""
    generator = torch.Generator().manual_seed(1000 * engine.grid.get_data_parallel_rank() + step)
    for _ in range(engine.micro_batches):
        ids = torch.randint(ROWS, (2, 4), generator=generator)
        yield ids, (3 * ids + 1) % ROWS


def train(engine, steps, moves=None, batches=data, **options) -> list[float]:
    """The losses; before step s the layers move to the bounds moves[s]."""
    losses = []
    for step in steps if isinstance(steps, range) else range(steps):
        if moves and step in moves:
            migrate(engine, moves[step], **options)
        losses.append(engine.train_batch(batches(engine, step)).item())
    return losses


def snapshot(engine) -> dict:
    """All that this rank has, read with DeepSpeed's own functions where the state is shared out. Collective."""
    module, optimizer = engine.module, engine.optimizer
    plain = optimizer is engine.basic_optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False  # ZeRO-1 links when the first of several groups has a state
        optimizer._lazy_init_hp_params_optimizer_state()
    inner = optimizer if plain else optimizer.optimizer
    found = {"bounds": tuple(map(int, module.parts)), "groups": [_options(group) for group in inner.param_groups]}
    found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    for name, parameter in module.named_parameters():
        marks = [getattr(parameter, key, None) for key in ("ds_pipe_replicated", "tensor_model_parallel")]
        found[name] = (parameter.detach().clone(), parameter.requires_grad, marks)
        if not parameter.requires_grad:
            continue
        if plain:
            found[f"{name} state"] = {key: value.clone() for key, value in inner.state[parameter].items()}
        elif hasattr(parameter, "_hp_mapping"):
            keys = ("exp_avg", "exp_avg_sq")
            found[f"{name} state"] = [safe_get_full_optimizer_state(parameter, key) for key in keys]
            found[f"{name} state"].append(safe_get_full_fp32_param(parameter))
    if hasattr(optimizer, "fp32_groups"):  # fp16 without ZeRO
        found["masters"] = [master.detach().clone() for group in optimizer.fp32_groups for master in group]
        found["state"] = [inner.state[master]["exp_avg"].clone() for group in optimizer.fp32_groups for master in group]
    scaler = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
    found["scale"] = repr(scaler and sorted(vars(scaler).items()))
    found["steps"] = [float(value["step"]) for value in inner.state.values()]
    return found


def _options(group) -> list:
    return sorted((key, str(value)) for key, value in group.items() if key not in ("params", "param_names"))


def differences(one, other, where="") -> list[str]:
    """Where two snapshots are not the same bits."""
    if torch.is_tensor(one):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: {sorted(one.keys() ^ other.keys())}"]
        return [found for key in one for found in differences(one[key], other[key], f"{where} {key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [f"{where}: {one} and {other}"]


def start(setup: Setup):
    """(engine, the function that gives its batches) with the first bounds of `BOUNDS` or `RECOMMENDER_BOUNDS`."""
    gc.freeze()  # DeepSpeed's wrappers collect garbage many times
    if setup.model == "recommender":
        return make_recommender(setup), interactions
    engine = make_engine(setup)
    migrate(engine, BOUNDS[setup.grid.pipe])  # "uniform" is another cut, for four stages
    return engine, data


def chosen(every: list[Setup], by_default: str) -> list[Setup]:
    """The setups that a test goes through: those with the mode `by_default`, or all with DS_RECSYS_FULL_GRID=1."""
    if os.environ.get("DS_RECSYS_FULL_GRID") == "1":
        return every
    return [setup for setup in every if setup.mode == by_default][:1]


def moves_of(setup: Setup) -> dict[int, list[int]]:
    return (RECOMMENDER_MOVES if setup.model == "recommender" else MOVES)[setup.grid.pipe]


def run(setup: Setup, steps: int, moves: dict, **options) -> tuple[list[float], dict]:
    """Losses of a run from its beginning, and the snapshot of its end."""
    engine, batches = start(setup)
    losses = train(engine, steps, moves, batches, **options)
    found = snapshot(engine)
    engine.destroy()
    return losses, found


def check_exact(setups: list[Setup], steps=50, moves=None, **options) -> list[list[float]]:
    """Train each setup twice on this rank, with and without migrations; everything must be the same bits in the end.

    The last of the moves leads back to the first bounds.
    """
    runs = []
    for setup in setups:
        losses, stayed = run(setup, steps, {})
        again, moved = run(setup, steps, moves or moves_of(setup), **options)
        assert not differences(stayed, moved), (setup, differences(stayed, moved)[:5])
        assert losses == again, setup
        assert steps < 50 or losses[0] > losses[-1], setup
        runs.append(losses)
    return runs
