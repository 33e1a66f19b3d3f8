"""The head of every kind of model is what `HeadForm` says, and asking how layers are called computes no scores."""

import pytest
import torch
from model_zoo import tiny_config
from transformers import AutoModelForCausalLM

from ds_recsys.models import ModelBuilder, recommender_config
from ds_recsys.models.replay import Replay
from ds_recsys.models.skeleton import Skeleton

_FORMS = {  # what is expected of scale, softcap, bias and transform
    "llama": ({}, (1.0, None, False, False)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None, False, False)),
    "granite": ({"logits_scaling": 6.0}, (1 / 6.0, None, False, False)),
    "gemma2": ({"final_logit_softcapping": 5.0}, (1.0, 5.0, False, False)),
    "gptj": ({}, (1.0, None, True, False)),
    "bert": ({}, (1.0, None, True, True)),
    "mamba": ({}, (1.0, None, False, False)),  # its head casts to fp32
}


@pytest.mark.parametrize("model_type", _FORMS)
def test_scores_are_what_the_form_says(model_type):
    changes, expected = _FORMS[model_type]
    builder = ModelBuilder(recommender_config(tiny_config(model_type, **changes), 49), seed=1)
    form = builder.skeleton.head_form
    scale, softcap, bias, transform = expected
    assert form.scale == pytest.approx(scale, abs=1e-7) and form.softcap == softcap
    assert (form.bias is not None, form.transform) == (bias, transform)

    layers = [spec.build() for spec in builder.specs()]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = AutoModelForCausalLM.from_config(builder.config).eval()
    model.load_state_dict({n: p for layer in layers for n, p in layer.state_dict().items()}, strict=False)
    model.tie_weights()
    hidden = torch.randn(3, 2, builder.skeleton.hidden_width)
    with torch.no_grad():
        found = builder.head(layers).scores(builder.head_input(hidden, layers, False))
        torch.testing.assert_close(found, builder.logits(hidden, layers, False), atol=1e-5, rtol=1e-5)
    assert found.std() > 0.1


def test_asking_for_arguments_computes_no_scores(monkeypatch):
    """For 8 x 64 positions and two million items they would take 4 GB."""
    skeleton = Skeleton(recommender_config(tiny_config("llama"), 2_000_000))
    monkeypatch.setattr(Replay, "linear", lambda *_: pytest.fail("the head was called"))
    assert len(skeleton.arguments(torch.zeros(8, 64, 32), training=True)) == 3
