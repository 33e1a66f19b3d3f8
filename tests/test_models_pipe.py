"""RecommenderPipe on two ranks: bounds, own layers only, recomputation, DeepSpeed's own checkpoint files."""

import json
import os

import pytest
import torch
from distributed import distributed
from model_zoo import tiny_config

from ds_recsys.errors import UserError
from ds_recsys.models import ModelBuilder, RecommenderPipe, recommender_config


def _pipe(model_type="gpt2", stages=2, **options):
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    config = recommender_config(tiny_config(model_type), 49, tie=True)
    return RecommenderPipe(config, PipeDataParallelTopology(stages, 1), seed=2, **options)


@distributed(pipe=2)
def test_bounds_methods_and_own_layers_only():
    built = []
    fill = ModelBuilder.fill
    ModelBuilder.fill = lambda self, layer: built.append(type(layer).__name__) or fill(self, layer)
    pipe = _pipe()
    assert len(built) == pipe.parts[pipe.stage_id + 1] - pipe.parts[pipe.stage_id]  # counting parameters built none
    whole = ModelBuilder(pipe.config, seed=2)
    specs = whole.specs()
    for bounds in ([0, 4, 7], [0, 1, 7], [0, 6, 7]):
        pipe = _pipe(bounds=bounds)
        assert pipe.parts == bounds and all(type(p) is int for p in pipe.parts)
        start, stop = bounds[pipe.stage_id : pipe.stage_id + 2]
        expected = {n: v for s in specs[start:stop] for n, v in s.build().state_dict().items()}
        held = pipe.hf_state_dict()
        assert held.keys() == expected.keys() and all(torch.equal(held[n], expected[n]) for n in held)
        assert dict(pipe.hf_named_parameters()).keys() == set(pipe.hf_names().values())
        local = dict(pipe.named_parameters())
        assert local.keys() == pipe.hf_names().keys()
        assert all(local[n] is dict(pipe.hf_named_parameters())[hf] for n, hf in pipe.hf_names().items())
    assert sum(_pipe(partition_method=m).parts[1] for m in ("uniform", "type:block")) >= 5
    assert (pipe.tied_modules["item_table"] is not None) and not any("skeleton" in n for n, _ in pipe.named_modules())
    with pytest.raises(UserError, match=r"do not cut 7 layers into 2 stages"):
        _pipe(bounds=[0, 3, 8])
    with pytest.raises(UserError, match="stage 1 of 2 would hold no parameter"):
        _pipe(bounds=[0, 7, 7])


def test_recomputation_and_checkpoint_files(tmp_path):
    for name, model_type in (("a", "gpt2"), ("b", "bert")):
        _train(model_type=model_type, folder=str(tmp_path / name))


@distributed(pipe=2)
def _train(model_type, folder):
    import deepspeed

    def train(interval, load=False):
        pipe = _pipe(model_type, activation_checkpoint_interval=interval, seed_layers=True)
        pipe.loss_fn = lambda h, y: torch.nn.functional.cross_entropy(pipe.logits(h).flatten(0, 1), y.flatten())
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        }
        engine, *_ = deepspeed.initialize(model=pipe, model_parameters=list(pipe.parameters()), config=config)
        if load:
            engine.load_checkpoint(folder, load_module_strict=True)
            return pipe
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            ids = [torch.randint(1, 50, (2, 8), generator=generator) for _ in range(2)]
            engine.train_batch(iter([(x[:, :-1], x[:, 1:]) for x in ids]))
        if interval:
            engine.save_checkpoint(folder)
        return pipe

    plain, again = train(0), train(1)
    before = dict(_pipe(model_type).hf_named_parameters())
    for (name, a), (_, b) in zip(plain.hf_named_parameters(), again.hf_named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert any(not torch.equal(before[n], p) for n, p in plain.hf_named_parameters())
    loaded = train(0, load=True)
    for (name, a), (_, b) in zip(plain.hf_named_parameters(), loaded.hf_named_parameters(), strict=True):
        assert torch.equal(a, b), name
    if plain.stage_id == 0:
        files = [f for f in os.listdir(os.path.join(folder, "global_step3")) if f.startswith("layer_00")]
        state = torch.load(os.path.join(folder, "global_step3", files[0]))
        assert list(state) == [plain.builder.skeleton.table_name], json.dumps(list(state))
