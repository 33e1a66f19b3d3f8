"""What the planner measures of an optimizer."""

import pytest
import torch
from torch import nn

from ds_recsys.balance.layer_sample import LayerProfile
from ds_recsys.planner import layers


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_is_measured_with_what_its_step_reads_and_changes_no_weight(clips, fused, monkeypatch):
    norms, clip = [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args, **kwargs: norms.append(clip(*args, **kwargs)))
    parameters = [nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))]
    before = [parameter.detach().clone() for parameter in parameters]
    assert layers._optimizer_seconds(parameters, {"fused": fused}, clips) > 0
    assert all(torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert all(parameter.grad.all() for parameter in parameters), "zeros would be read from one page"
    assert (len(norms) > 1) == clips


@pytest.mark.parametrize("clips", [True, False])
def test_looking_ahead_is_measured_there_and_back(clips, monkeypatch):
    calls = []

    class Counted(layers.LookAhead):
        def go(self, gradients, clip, step):
            calls.append("clips" if clip else "goes")
            assert all(gradient.all() for gradient in gradients)
            super().go(gradients, clip, step)

        def back(self):
            calls.append("back")
            super().back()

    monkeypatch.setattr(layers, "LookAhead", Counted)
    parameters = [nn.Parameter(torch.randn(64, 64))]
    before = parameters[0].detach().clone()
    assert layers._ahead_seconds(parameters, {}, clips) > 0
    assert len(calls) > 2 and calls == ["clips" if clips else "goes", "back"] * (len(calls) // 2)
    assert torch.equal(parameters[0], before)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ([(1.0, 4.0), (1.1, 4.4)], (1.0, 1.0)),  # nearly as fast
        ([(1.0, 4.0), (2.0, 8.8)], (1.0, 2.0)),
        ([(1.0, 4.0), (1.0, 8.0), (2.0, 4.1)], (1.0, 1.0, 1.0)),  # each was held up once
        ([(1.0, 4.0), (3.0, 8.0), (2.0, 9.0)], (1.0, 2.0, 2.0)),
    ],
)
def test_a_device_is_slow_if_it_is_in_every_pass(seconds, expected):
    assert layers.slowdowns_of(seconds) == pytest.approx(expected)


def test_a_size_of_micro_batch_has_three_passes_at_least(monkeypatch):
    monkeypatch.setattr(layers, "_pass", lambda *_: {0: LayerProfile(1.0, 2.0, 0, 0)})
    monkeypatch.setattr(layers.dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(layers, "_SECONDS", 0.0)
    profiles, seconds, _ = layers._passes(nn.Linear(1, 1), [torch.zeros(1)])
    assert len(seconds) == 3 and profiles[0].backward == 2.0
