"""Looking ahead: the weights that an optimizer's step would lead to, and nothing else of it."""

import copy

import pytest
import torch
from torch import nn

from ds_recsys.comm.kernels.native import library
from ds_recsys.comm.modes import look_ahead
from ds_recsys.comm.modes.flat import FlatParameters

ADAM = {"lr": 3e-3, "betas": (0.8, 0.98), "eps": 1e-6}


def _made(kind, **options):
    """(module, optimizer) of two groups after three steps; the last parameter has had none."""
    torch.manual_seed(0)
    module = nn.ParameterList([torch.randn(33, 17), torch.randn(100), torch.randn(8, 8)])
    groups = [{"params": [module[0]], "weight_decay": 0.1}, {"params": [module[1], module[2]], "weight_decay": 0.0}]
    optimizer = kind(groups, **options)
    for _ in range(3):
        for parameter in module[:2]:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for parameter in module:
        parameter.grad = None
    return module, optimizer


def _clip(module):
    return lambda: nn.utils.clip_grad_norm_(module, 1.0)


CASES = {
    "adamw": (torch.optim.AdamW, ADAM),
    "fused": (torch.optim.AdamW, {**ADAM, "fused": True}),
    "amsgrad": (torch.optim.AdamW, {**ADAM, "amsgrad": True}),
    "adam": (torch.optim.Adam, ADAM),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_it_leads_where_the_step_leads_and_leaves_no_trace(case, kernels, monkeypatch):
    if kernels and library() is None:
        pytest.skip("no compiler")
    if not kernels:
        monkeypatch.setattr(look_ahead, "library", lambda: None)
    module, optimizer = _made(CASES[case][0], **CASES[case][1])
    before, state = [p.detach().clone() for p in module], copy.deepcopy(optimizer.state_dict())
    gradients = [torch.randn_like(p) for p in module]
    ahead = look_ahead.LookAhead(optimizer, FlatParameters.of(module))
    steps = []
    for _ in range(2):  # the second in memory of the first
        ahead.go([g.clone() for g in gradients], _clip(module), lambda: steps.append(optimizer.step()))
        assert len(steps) == 0 or not (kernels and case in ("adamw", "fused")), "those in one pass"
        led, kept = [p.detach().clone() for p in module], ahead.weights.clone()
        assert all(parameter.grad is None for parameter in module)
        assert torch.equal(kept, torch.cat([one.flatten() for one in before]))
        ahead.back()
        assert all(torch.equal(p, one) for p, one in zip(module, before, strict=True))
        now = optimizer.state_dict()
        assert now["param_groups"] == state["param_groups"] and now["state"].keys() == state["state"].keys()
        for number, values in state["state"].items():
            for name, value in values.items():
                same = torch.equal(now["state"][number][name], value) if torch.is_tensor(value) else value is None
                assert same, (number, name)
    for parameter, gradient in zip(module, gradients, strict=True):
        parameter.grad = gradient
    _clip(module)()
    optimizer.step()
    for parameter, one, old in zip(module, led, before, strict=True):
        assert torch.allclose(parameter, one, rtol=1e-5, atol=1e-7) and not torch.equal(parameter, old)
