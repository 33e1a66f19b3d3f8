"""Layers one by one: names, ties, initialisation, frozen weights, recomputation, dropout, caching, bounds."""

import pickle

import pytest
import torch
from model_zoo import run_layers, tiny_config
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from ds_recsys.errors import UserError
from ds_recsys.models import ModelBuilder, recommender_config, to_layer_specs
from ds_recsys.models.layers import Block, ItemTable
from ds_recsys.models.pipeline import check_bounds, keep_tail

KINDS = {
    "gpt2": True,
    "llama": False,
    "qwen3": False,
    "gemma2": True,
    "gemma3_text": True,
    "opt": True,
    "mamba": True,
    "bert": True,
}


def build(model_type, seed=0, **changes):
    builder = ModelBuilder(recommender_config(tiny_config(model_type, **changes), 49), seed=seed)
    specs = builder.specs()
    return builder, specs, [s.build() for s in specs]


@pytest.mark.parametrize("model_type", KINDS)
def test_names_counts_and_ties(model_type):
    builder, specs, layers = build(model_type)
    assert builder.parameter_counts() == [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert builder.skeleton.tied is KINDS[model_type]
    assert hasattr(specs[-1], "key") is KINDS[model_type]
    held = {n: v for layer in layers for n, v in layer.state_dict().items()}
    missing, unexpected = AutoModelForCausalLM.from_config(builder.config).load_state_dict(held, strict=False)
    assert not unexpected
    assert {builder.skeleton.aliases[n] for n in missing} <= held.keys()  # the tied names only
    for layer in layers:  # DeepSpeed's checkpoint files are these dicts
        layer.load_state_dict(layer.state_dict(), strict=True)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bert", "mamba"])
def test_random_values_depend_on_seed_and_name_only(model_type):
    builder, specs, layers = build(model_type)
    other = ModelBuilder(builder.config, seed=0)
    for index in reversed(range(len(specs))):  # another order, another process, another state of the generator
        torch.rand(3)
        again = other.specs()[index].build()
        for name, value in again.state_dict().items():
            assert torch.equal(value, layers[index].state_dict()[name]), name
    blocks = [layer for layer in layers if isinstance(layer, Block)]
    first, second = (dict(b.named_parameters()) for b in blocks[:2])
    pairs = zip(first.values(), second.values(), strict=True)
    matrices = [(a, b) for a, b in pairs if a.dim() == 2 and abs(a.mean()) < a.std()]
    assert matrices and not any(torch.equal(a, b) for a, b in matrices)
    table = layers[0].get_parameter(builder.skeleton.table_name)
    assert not torch.equal(
        table, ModelBuilder(builder.config, seed=1).specs()[0].build().get_parameter(builder.skeleton.table_name)
    )
    if builder.skeleton.embedding.padding_idx is not None:
        assert table[0].abs().sum() == 0
    assert (
        abs(table[1:].std().item() / builder.config.get_text_config().to_dict().get("initializer_range", 0.02) - 1)
        < 0.2
    )


def test_building_leaves_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _, specs, layers = build("gpt2", embd_pdrop=0.5)
    run_layers(specs[:1], layers[:1], torch.ones(2, 4, dtype=torch.int64))
    layers[2].builder.skeleton.arguments(torch.zeros(2, 4, 32), True)
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_are_cached_and_hold_no_graph():
    builder, specs, layers = build("gemma3_text")
    ids = torch.randint(1, 50, (2, 7))
    first = run_layers(specs, layers, ids)
    runs = []
    builder.skeleton.record = lambda *a, **k: runs.append(a)  # any further replay would show
    again = run_layers(specs, layers, ids)
    assert torch.equal(first, again) and not runs
    for calls in builder.skeleton._cache.values():
        for call in calls:
            assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in call.kwargs.values())


def test_dropout_follows_the_mode_and_the_generator():
    _, specs, layers = build("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    ids = torch.randint(1, 50, (2, 7))

    def run(seed):
        torch.manual_seed(seed)
        return run_layers(specs, layers, ids)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    for layer in layers:
        layer.eval()
    assert torch.equal(run(1), run(2))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_recomputation_and_frozen_layers(model_type):
    def grads(recompute):
        _, _, layers = build(model_type)
        layers[0].requires_grad_(False)
        torch.manual_seed(0)
        hidden = torch.randint(1, 50, (2, 7))
        for layer in layers:
            if recompute and isinstance(layer, Block):
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            elif not (isinstance(layer, ItemTable) and hidden.is_floating_point()):
                hidden = layer(hidden)
        hidden.square().sum().backward()
        return [p.grad for layer in layers[1:-1] for p in layer.parameters()]

    for plain, again in zip(grads(False), grads(True), strict=True):
        assert plain is not None and torch.equal(plain, again)


def test_specs_are_small_and_picklable():
    specs = to_layer_specs(recommender_config(tiny_config("llama"), 49))
    assert len(pickle.dumps(specs)) < 50_000
    before, after = specs[1].build(), pickle.loads(pickle.dumps(specs))[1].build()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_logits_of_any_leading_shape():
    builder, specs, layers = build("gemma2")
    hidden = run_layers(specs, layers, torch.randint(1, 50, (2, 7)))
    logits = builder.logits(hidden, layers, True)
    assert logits.shape == (2, 7, 50)
    assert logits.abs().max() <= builder.config.final_logit_softcapping
    torch.testing.assert_close(builder.logits(hidden[0, 3:5], layers, True), logits[0, 3:5])
    assert builder.logits(hidden[0, 0], layers, True).shape == (50,)


def test_config_of_a_recommender():
    config = recommender_config(tiny_config("gemma3_text"), 99, num_layers=2, tie=False)
    assert (config.vocab_size, config.num_hidden_layers, len(config.layer_types)) == (100, 2, 2)
    assert config.pad_token_id == 0 and config.bos_token_id is None and not config.tie_word_embeddings
    with pytest.raises(UserError, match="num_layers is 9.*3 layers"):
        recommender_config(tiny_config("llama"), 9, num_layers=9)
    with pytest.raises(UserError, match="no causal LM"):
        recommender_config({"model_type": "vit"}, 9)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([0, 2, 5], "do not cut 6 layers"),
        ([0, 4, 2, 6], "do not cut 6 layers"),
        ([0, 3, 3, 6], "stage 1 of 3 would hold no parameter"),
        ([0, 3, 5, 6], "split the head"),
    ],
)
def test_bounds_that_do_not_fit(parts, said):
    with pytest.raises(UserError, match=said):
        check_bounds(parts, len(parts) - 1 if said != "do not cut 6 layers" else 2, [5, 1, 1, 1, 1, 5], tail=2)
    check_bounds([0, 3, 6], 2, [5, 1, 1, 1, 1, 5], tail=2)
    assert keep_tail([0, 3, 5, 6], 2) == [0, 3, 4, 6]
