"""Decoder layers on a tensor group against the whole layer: outputs, and the gradients of inputs and parameters."""

import gc
import warnings
import weakref

import pytest
import torch
import transformers
from deepspeed.runtime.activation_checkpointing import checkpointing
from distributed import distributed, run_on_grid
from model_zoo import tiny_config
from tensor_zoo import compare, cut, forward_backward, gathered, random_block, skeleton_of, tensor_axis
from torch.utils.checkpoint import checkpoint

from ds_recsys.models import recommender_config
from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES
from ds_recsys.models.tensor import plan_block
from ds_recsys.models.tensor.families import OWN_PLANS, UNSHARDED
from ds_recsys.models.unsupported import UNSUPPORTED

# Neither in transformers nor here; see test_tensor_plan.py for what they are told.
NO_PLAN = set(UNSHARDED)


def check_types(types):
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    wrong, cut_layers = {}, {}
    for model_type in types:
        try:
            skeleton = skeleton_of(model_type)
            training = model_type != "phimoe"  # its router samples in training
            layers = range(len(skeleton.blocks))
            cut_layers[model_type] = sum(compare(skeleton, i, training=training) > 0 for i in layers)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    return wrong, cut_layers


CONVERTIBLE = sorted(CAUSAL_LM_CLASSES.keys() - UNSUPPORTED.keys())


@pytest.mark.parametrize("part", range(4))
def test_every_convertible_type(part):
    """Three layers of every type on two ranks; mixed kinds of layers are all there."""
    types = [t for t in CONVERTIBLE[part::4] if t not in NO_PLAN]
    for wrong, cut_layers in run_on_grid(check_types, 2, timeout=300, types=types):
        assert not wrong, wrong
        assert all(cut_layers.values()), [t for t, layers in cut_layers.items() if not layers]


UNEVEN = [
    ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "intermediate_size": 65}),
    ("qwen2", {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("phi3", {"num_key_value_heads": 1}),
    ("falcon", {"multi_query": False, "num_kv_heads": 4, "alibi": True, "bias": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"alibi": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_bigcode", {}),
    ("cohere", {"use_qk_norm": True, "num_key_value_heads": 1}),
    ("persimmon", {"qk_layernorm": True}),
    ("gpt_oss", {"num_key_value_heads": 1}),
    ("mixtral", {"num_key_value_heads": 1, "intermediate_size": 72}),
    ("deepseek_v2", {}),
    ("olmo2", {}),
    ("llama4_text", {}),
    ("gpt2", {}),
    ("bloom", {}),
]


def check_uneven():
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    for model_type, changes in UNEVEN:
        skeleton = skeleton_of(model_type, **changes)
        try:
            compare(skeleton, 1)
        except AssertionError as error:
            raise AssertionError(f"{model_type} {changes}: {error}") from error


@pytest.mark.parametrize("world", [2, 3, 4])
def test_heads_and_features_that_do_not_divide(world):
    run_on_grid(check_uneven, world)


@distributed(tensor=2)
def test_gradients_accumulate_over_micro_batches():
    """Summed parameters (k_norm) and shared rows (k_proj, one key-value head on both ranks) take part every time."""
    skeleton = skeleton_of("qwen3", num_key_value_heads=1)
    axis = tensor_axis()
    whole = random_block(skeleton, 0)
    plan = plan_block(skeleton, 0, 2)
    part = cut(whole, plan, axis)
    for seed in range(3):
        torch.manual_seed(seed)
        hidden, upstream = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
        want = forward_backward(skeleton, 0, whole, hidden, upstream)[2]
        got = forward_backward(skeleton, 0, part, hidden, upstream)[2]
    for name in ("self_attn.k_norm.weight", "self_attn.q_norm.weight", "input_layernorm.weight"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    mine = plan.shards["self_attn.k_proj.weight"].take(want["self_attn.k_proj.weight"], axis.rank)
    torch.testing.assert_close(got["self_attn.k_proj.weight"], mine, rtol=1e-4, atol=1e-5)


DROPPING = [
    ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5}),
    ("llama", {"attention_dropout": 0.5}),
    ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5}),
    ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
]


def run_dropping(recompute):
    """Output and gradients per type, with the state that the common generator is left in."""
    results = []
    for model_type, changes in DROPPING:
        skeleton = skeleton_of(model_type, **changes)
        part = cut(random_block(skeleton, 0), plan_block(skeleton, 0, 2), tensor_axis()).train()
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(2, 9, 32, generator=generator).requires_grad_()
        upstream = torch.randn(2, 9, 32, generator=generator)
        call = skeleton.arguments(hidden, True)[0]
        torch.manual_seed(5)
        out = recompute(lambda h, call=call, part=part: call.apply(part, h), hidden)
        state = torch.get_rng_state()
        torch.rand(100)  # what comes after must not shift what is recomputed
        out.backward(upstream)
        grads = {name: p.grad for name, p in part.named_parameters() if p.grad is not None}
        assert list(grads), model_type
        results.append((model_type, out.detach(), hidden.grad, state, grads))
    return results


@distributed(tensor=2)
def test_dropout_is_common_outside_and_the_same_when_recomputed():
    plain = run_dropping(lambda forward, hidden: forward(hidden))
    for model_type, out, hidden_grad, state, _ in plain:
        for other in gathered((out, hidden_grad, state)):
            same = [torch.equal(a, b) for a, b in zip(other, (out, hidden_grad, state), strict=True)]
            assert all(same), f"{model_type}: output, gradient, generator equal on both ranks: {same}"
    for name, recompute in {
        "torch": lambda forward, hidden: checkpoint(forward, hidden, use_reentrant=False),
        "torch, reentrant": lambda forward, hidden: checkpoint(forward, hidden, use_reentrant=True),
        "deepspeed": checkpointing.checkpoint,
    }.items():
        for want, got in zip(plain, run_dropping(recompute), strict=True):
            assert torch.equal(want[1], got[1]) and torch.equal(want[2], got[2]), (name, want[0])
            assert all(torch.equal(want[4][n], got[4][n]) for n in want[4]), (name, want[0])


@distributed(tensor=2)
def test_attention_dropout_differs_between_ranks():
    """With the same weights in every head, what reaches the output projection differs by dropout alone."""
    seen = {}
    for training in (True, False):
        skeleton = skeleton_of("llama", attention_dropout=0.5, num_key_value_heads=4)
        whole = random_block(skeleton, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(whole.self_attn, name).weight
            weight.data = weight.data[:8].repeat(4, 1)
        part = cut(whole, plan_block(skeleton, 0, 2), tensor_axis()).train(training)
        part.self_attn.o_proj.register_forward_pre_hook(lambda _, args, t=training: seen.update({t: args[0].detach()}))
        hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        before = torch.get_rng_state()
        skeleton.arguments(hidden, training)[0].apply(part, hidden)
        assert torch.equal(torch.get_rng_state(), before) is (not training)
    one, other = gathered(seen)
    assert torch.equal(one[False], other[False])
    assert not torch.equal(one[True], other[True])


@distributed(tensor=2)
def test_queries_keys_and_values_share_one_all_reduce():
    skeleton = skeleton_of("llama")
    part = cut(random_block(skeleton, 0), plan_block(skeleton, 0, 2), tensor_axis())
    calls = []
    original = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    try:
        hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = skeleton.arguments(hidden, True)[0].apply(part, hidden)
        forward = len(calls)
        out.sum().backward()
    finally:
        torch.distributed.all_reduce = original
    assert (forward, len(calls) - forward) == (2, 2)  # attention and feed-forward, each way


@distributed(tensor=2)
def test_a_layer_forgets_what_entered():
    skeleton = skeleton_of("llama")
    part = cut(random_block(skeleton, 0), plan_block(skeleton, 0, 2), tensor_axis())
    seen = []
    part.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        skeleton.arguments(hidden, True)[0].apply(part, hidden)
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_the_table_of_types_is_complete():
    """A type has a plan in transformers, or here, or a reason why not."""
    for model_type in CONVERTIBLE:
        config = recommender_config(tiny_config(model_type), 49)
        planned = bool(getattr(config, "base_model_tp_plan", None))
        assert planned or config.model_type in OWN_PLANS or config.model_type in UNSHARDED, model_type
