"""One decoder layer, whole and shared out among the ranks of a tensor group: outputs and every gradient compared."""

import copy

import torch
import torch.distributed as dist
from model_zoo import tiny_config

from ds_recsys.models import recommender_config
from ds_recsys.models.skeleton import Skeleton
from ds_recsys.models.tensor import plan_block
from ds_recsys.topology import TensorAxis


def skeleton_of(model_type, **changes):
    return Skeleton(recommender_config(tiny_config(model_type, **changes), 49))


def random_block(skeleton, index, dtype=torch.float32):
    """A layer of its own with random parameters, the same on every rank."""
    block = copy.deepcopy(skeleton.blocks[index])
    block.__dict__.pop("forward", None)
    generator = torch.Generator().manual_seed(index)
    for module in block.modules():
        for name, param in module._parameters.items():
            if param is not None:
                data = torch.randn(param.shape, generator=generator) * (0.2 if param.dim() > 1 else 0.5)
                module._parameters[name] = torch.nn.Parameter(data.to(dtype), param.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return block


def cut(block, plan, axis):
    """The layer on one rank, as a stage would hold it."""
    part = copy.deepcopy(block)
    for name, param in part.named_parameters():
        if name in plan.shards:
            param.data = plan.shards[name].take(param.data, axis.rank)
    plan.apply(part, axis)
    return part


def forward_backward(skeleton, index, block, hidden, upstream, training=True, call=None):
    """-> output, gradient of the hidden states, gradients by name."""
    hidden = hidden.clone().requires_grad_()
    call = call or skeleton.arguments(hidden, training)[index]
    out = call.apply(block.train(training), hidden)
    out.backward(upstream)
    return out.detach(), hidden.grad, {n: p.grad for n, p in block.named_parameters() if p.grad is not None}


def tensor_axis():
    return TensorAxis(dist.group.WORLD, dist.get_world_size(), dist.get_rank())


def gathered(value):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def distance(got, want):
    """Largest difference, relative to the largest value."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-3)).item()


def compare(skeleton, index, *, length=9, training=True, tolerance=1e-5, dtype=torch.float32, sequence_parallel=False):
    """Raise AssertionError where layer `index` on this tensor group differs from the whole one."""
    axis = tensor_axis()
    plan = plan_block(skeleton, index, axis.size, sequence_parallel)
    whole = random_block(skeleton, index, dtype)
    part = cut(whole, plan, axis)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, length, skeleton.config.get_text_config().hidden_size, generator=generator).to(dtype)
    with torch.no_grad():
        shape = skeleton.arguments(hidden, training)[index].apply(whole, hidden).shape
    upstream = torch.randn(shape, generator=generator).to(dtype)
    want = forward_backward(skeleton, index, whole, hidden, upstream, training)
    if sequence_parallel:
        call = skeleton.arguments(hidden, training)[index]
        pieces = [value.chunk(axis.size, 1)[axis.rank] for value in (hidden, upstream)]
        got = forward_backward(skeleton, index, part, *pieces, training, call)
        got = (*(torch.cat(gathered(value), 1) for value in got[:2]), got[2])
    else:
        got = forward_backward(skeleton, index, part, hidden, upstream, training)
    assert list(part.state_dict()) == list(whole.state_dict())
    assert distance(got[0], want[0]) < tolerance, f"output {distance(got[0], want[0]):.1e}"
    every = gathered((got[1], got[2]))
    for other, _ in every:
        assert torch.equal(other, every[0][0]), "the hidden states' gradient differs between ranks"
    assert got[2].keys() == want[2].keys(), got[2].keys() ^ want[2].keys()
    scale = max(g.abs().max() for g in want[2].values()) if want[2] else 1.0
    for name, reference in want[2].items():
        parts = [grads[name] for _, grads in every]
        if name in plan.shards:
            merged = plan.shards[name].merge(parts)
            for rank, own in enumerate(parts):
                assert torch.equal(plan.shards[name].take(merged, rank), own), f"copies of {name} differ"
        else:
            merged = parts[0]
            assert all(torch.equal(merged, own) for own in parts), f"{name} is replicated, its gradient differs"
        # a gradient of 0 but for rounding, as a key's bias has: only that it stays within the largest one's rounding
        floor = scale * (5e-2 if reference.abs().max() < scale * 1e-6 else 1e-2)
        off = ((merged - reference).abs().max() / torch.maximum(reference.abs().max(), floor)).item()
        assert off < tolerance, f"gradient of {name}: {off:.1e}"
    off = distance(got[1], want[1])
    assert off < tolerance, f"gradient of the hidden states: {off:.1e}"
    return len(plan.shards)
