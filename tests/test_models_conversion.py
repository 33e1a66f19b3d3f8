"""Every causal-LM type of transformers: cut in two, forward and backward equal HF's own exactly, or refused."""

import pytest
import torch
from model_zoo import HeldWeights, run_layers, tiny_config
from transformers import AutoModelForCausalLM

from ds_recsys.errors import UserError
from ds_recsys.models import ModelBuilder, recommender_config
from ds_recsys.models.hf_private import CAUSAL_LM_CLASSES
from ds_recsys.models.skeleton import Skeleton
from ds_recsys.models.unsupported import UNSUPPORTED

# Refused before there is a model to look at, or with configs that cannot be made tiny.
NOT_BUILT = {"blt", "emu3", "mllama", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text"}
# Drafters for speculative decoding: their config holds an ordinary text model, which converts under its own type.
NOT_BUILT |= {"gemma4_assistant", "gemma4_unified_assistant"}


def test_at_least_a_hundred_types_convert():
    assert len(CAUSAL_LM_CLASSES.keys() - UNSUPPORTED.keys()) >= 150
    assert UNSUPPORTED.keys() <= CAUSAL_LM_CLASSES.keys()


@pytest.mark.parametrize("model_type", sorted(CAUSAL_LM_CLASSES.keys() - UNSUPPORTED.keys()))
def test_two_stages_equal_hf(model_type):
    torch.manual_seed(0)
    config = recommender_config(tiny_config(model_type), 49)
    training = model_type != "phimoe"  # its router samples in training; dropout is 0 everywhere
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train(training)
    with torch.no_grad():
        for param in whole.parameters():
            param.add_(torch.randn_like(param) * 0.02)  # HF starts biases at 0 and norms at 1, which hides mistakes
    weights = HeldWeights(whole.state_dict())
    ids = torch.randint(1, 50, (2, 9))

    first, last = ModelBuilder(config, weights), ModelBuilder(config, weights)  # as in two processes
    cut = len(first.specs()) // 2
    stage_0, stage_1 = first.specs()[:cut], last.specs()[cut:]
    layers_0, layers_1 = [s.build() for s in stage_0], [s.build() for s in stage_1]
    for layer in layers_0 + layers_1:
        layer.train(training)
    sent = run_layers(stage_0, layers_0, ids)
    received = sent.detach().requires_grad_()
    got = last.logits(run_layers(stage_1, layers_1, received), layers_1, training)
    want = whole(input_ids=ids).logits
    assert torch.equal(got, want), f"logits differ by {(got - want).abs().max()}"

    upstream = torch.randn_like(want)
    want.backward(upstream)
    got.backward(upstream)
    sent.backward(received.grad)
    grads: dict[str, torch.Tensor] = {}
    for layer in layers_0 + layers_1:
        for name, param in layer.named_parameters():
            if param.grad is not None:
                grads[name] = grads[name] + param.grad if name in grads else param.grad
    names = dict(whole.named_parameters(remove_duplicate=False))
    for name, grad in grads.items():
        assert torch.equal(grad, names[name].grad), f"the gradient of {name} differs"
    with_grad = {id(p) for p in names.values() if p.grad is not None}
    assert with_grad == {id(names[n]) for n in grads}


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED))
def test_the_rest_is_refused_by_name_and_reason(model_type):
    with pytest.raises(UserError) as refused:
        recommender_config({"model_type": model_type}, 49)
    assert repr(model_type) in str(refused.value) and UNSUPPORTED[model_type] in str(refused.value)
    if model_type not in NOT_BUILT:  # the table is true: without it, the probe refuses too
        with pytest.raises(UserError):
            Skeleton(tiny_config(model_type, pad_token_id=0))


def test_an_unknown_type_that_hides_a_dependency_is_refused():
    """gemma4 converts; with per-layer inputs, which are looked up by token id, the same type must not."""
    config = tiny_config("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=50)
    with pytest.raises(UserError, match="depends on token ids"):
        Skeleton(recommender_config(config, 49))
