"""What does not change while a pipeline runs: the bytes of its layers, and the links between its stages."""

import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from deepspeed.pipe import TiedLayerSpec
from torch import nn

from ds_recsys import compat_stages
from ds_recsys.balance.costs import Link
from ds_recsys.balance.optimizer_state import read_shares
from ds_recsys.balance.survey import counts_in_norm
from ds_recsys.comm.hosts import this_host

_NORM = "weight in the gradient's norm of tensor rank"
_MOMENTS = 2  # of Adam, which optimizers are taken to be
_PROBE_BYTES = (1 << 10, 1 << 20)  # of the messages that links are timed with


@dataclass(frozen=True)
class LayerFacts:
    """Of one layer. `kind` is equal for layers that are built alike; `needed` and `joined` as in `LayerCost`."""

    kind: str
    weight_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    needed: frozenset[str] = frozenset()
    joined: bool = False


def layer_facts(engine) -> list[LayerFacts]:
    """Of every layer of the pipeline, from the ranks that hold it; one without parameters has zeros. Collective."""
    module = engine.module
    first, tied = module.parts[module.stage_id], set(module.tied_modules.values())
    mine, shares = {}, read_shares(engine)
    for number, layer in enumerate(map(_owner, module.forward_funcs)):
        mine[first + number] = replace(_facts(layer), needed=_needed(engine, layer, shares, layer in tied))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    layers, known = compat_stages.layer_list(module), {}
    for layer, facts in (item for part in everyone for item in part.items()):
        needed = known[layer].needed if layer in known else frozenset()
        known[layer] = replace(facts, needed=needed | facts.needed)
    counted = set()  # keys of ties: a tied weight counts on the first of its stages
    for number, spec in enumerate(layers):
        if isinstance(spec, TiedLayerSpec):
            if spec.key in counted:
                groups = frozenset(need for need in known[number].needed if not need.startswith(_NORM))
                known[number] = replace(known[number], needed=groups)
            counted.add(spec.key)
    joined = getattr(module, "joined_layers", lambda: ())()
    return [replace(known[number], joined=number in joined) for number in range(len(layers))]


def _owner(layer):
    """What holds a layer's parameters: the function of a tied one is a partial."""
    return layer if isinstance(layer, nn.Module) else getattr(layer, "args", [layer])[0]


def _needed(engine, layer, shares: dict, tied: bool) -> frozenset[str]:
    """Of what every stage must have some, what this layer has on this rank."""
    parameters = [p for p in layer.parameters() if p in shares] if isinstance(layer, nn.Module) else []
    needed = set()
    if not compat_stages.is_unwrapped(engine):
        needed |= {f"parameter group {shares[parameter].group}" for parameter in parameters}
    if compat_stages.fails_without_norm(engine):
        name, rank = "tied_modules." if tied else "", compat_stages.tensor_rank(engine.module)
        needed |= {f"{_NORM} {rank}" for parameter in parameters if counts_in_norm(engine.module, name, parameter)}
    return frozenset(needed)


def _facts(layer) -> LayerFacts:
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    copies = sum(4 * parameter.numel() for parameter in trainable if parameter.dtype != torch.float32)
    shapes = sorted(tuple(parameter.shape) for parameter in parameters)
    return LayerFacts(
        f"{type(layer).__name__} {shapes}",
        sum(parameter.nbytes for parameter in parameters),
        sum(parameter.nbytes for parameter in trainable),
        sum(4 * _MOMENTS * parameter.numel() for parameter in trainable) + copies,
    )


def timed_links(engine) -> list[Link]:
    """Between neighbouring stages, from round trips of a small and a large message; of replicas, the slowest. Collective."""
    module = engine.module
    stage, hosts = module.stage_id, [""] * dist.get_world_size()
    dist.all_gather_object(hosts, this_host())
    found = {}
    for boundary in range(module.num_stages - 1):
        if stage in (boundary, boundary + 1):
            peer = compat_stages.rank_of_stage(module, boundary + 1 if stage == boundary else boundary)
            small, large = (_round_trip(engine.device, peer, stage == boundary, size) for size in _PROBE_BYTES)
            per_byte = max(0.0, large - small) / 2 / (_PROBE_BYTES[1] - _PROBE_BYTES[0])
            found[boundary] = Link(per_byte, small / 2, hosts[dist.get_rank()] != hosts[peer])
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return [
        max((part[n] for part in everyone if n in part), key=lambda link: (link.seconds_per_byte, link.latency))
        for n in range(module.num_stages - 1)
    ]


def _round_trip(device, peer: int, first: bool, nbytes: int) -> float:
    """Seconds to the peer and back, the best of three."""
    message, best = torch.zeros(nbytes, dtype=torch.uint8, device=device), float("inf")
    for _ in range(4):  # the first connects
        begin = time.perf_counter()
        for send in (first, not first):
            (dist.send if send else dist.recv)(message, peer)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
