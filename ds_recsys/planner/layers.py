"""Measures what the layers of a model and the optimizer cost on every rank, with two decoder layers of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter
from transformers import PreTrainedConfig

from ds_recsys.assemble import build_pipe
from ds_recsys.balance.layer_sample import LayerProfile, LayerSamples
from ds_recsys.comm.modes.flat import FlatParameters
from ds_recsys.comm.modes.look_ahead import LookAhead
from ds_recsys.config.schema import Recsys
from ds_recsys.data import TrainBatches
from ds_recsys.data.batches import IGNORE
from ds_recsys.models.recommender import recommender_config
from ds_recsys.models.specs import ModelBuilder
from ds_recsys.objective import next_item_loss
from ds_recsys.planner.facts import LayerFacts, Line
from ds_recsys.timeline.clock import clock_of_this_device
from ds_recsys.topology import Grid

_BLOCKS = 2
_ITEMS = 200_000  # most that are tried; a full softmax over more takes longer in proportion
_SECONDS = 2.5  # spent on a size of micro-batch at least, by each rank; what other processes take from it averages out
_PASSES = 3  # over micro-batches of a size, at least: other processes take more from one than from the next
_REPEATS = 3  # of an optimizer step and of a copy
_ALIKE = 1.15  # devices that differ by less are taken to be equal


@dataclass(frozen=True)
class Measured:
    """On this rank, at one tensor size.

    Attributes:
        kinds: class name of a layer -> its facts; a block's are the mean of two.
        seconds: of each pass, the same ones on all ranks.
        processor_seconds: what all threads of this process computed in them; 0 on an accelerator.
        optimizer, fused: seconds per parameter of AdamW as the config has it, and of its fused form where that was asked for,
            each with what clips gradients.
        copy: seconds per parameter to copy the gradients.
        ahead: seconds per parameter of looking ahead and back, clipping included.
    """

    kinds: dict[str, LayerFacts]
    seconds: tuple[float, ...]
    processor_seconds: float
    optimizer: float
    copy: float
    ahead: float
    fused: float | None = None


def measure(
    recsys: Recsys,
    model_config: PreTrainedConfig,
    windows,
    counts: torch.Tensor,
    sizes: Sequence[int],
    tensor: int,
    adamw: dict,
    fused: bool = False,
    clips: bool = True,
) -> Measured:
    """Forward and backward passes over micro-batches of `sizes` windows, on all ranks at once. Collective.

    Args:
        recsys: a resolved block; its grid does not count.
        counts: int64 [I + 1], how often each item occurs in training.
        sizes: one or two, rising.
        tensor: ranks of a tensor axis.
        adamw: keyword arguments of torch.optim.AdamW.
        fused: also measure its fused form.
        clips: whether a step clips gradients by their norm first.

    Raises:
        UserError: the model's layers cannot be shared by so many ranks.
    """
    items = min(model_config.vocab_size - 1, _ITEMS)
    small = recommender_config(model_config, items, num_layers=min(_BLOCKS, model_config.num_hidden_layers))
    world = dist.get_world_size()
    recsys = recsys.model_copy(update={"pipe": 1, "data": world // tensor, "tensor": tensor})
    pipe = build_pipe(recsys, small, None, Grid(1, world // tensor, tensor), None)
    pipe.loss_fn = next_item_loss(pipe, recsys.head, recsys.training.label_smoothing, counts[: items + 1])
    points, seconds, processor = [], (), 0.0
    for size in sizes:
        micro_batches = _micro_batches(windows, recsys, size, items)
        profiles, elapsed, used = _passes(pipe, micro_batches)
        points.append((size, profiles))
        seconds, processor = (*seconds, *elapsed), processor + used
    larger = (model_config.vocab_size - 1) / items if recsys.head.loss == "full" else 1.0
    kinds = _kinds(pipe, points, larger)
    parameters = [parameter for parameter in pipe.parameters() if parameter.requires_grad]
    optimizer = _optimizer_seconds(parameters, adamw, clips)
    other = _optimizer_seconds(parameters, {**adamw, "fused": True}, clips) if fused else None
    ahead = _ahead_seconds(parameters, {**adamw, "fused": True} if fused else adamw, clips)
    return Measured(kinds, seconds, processor, optimizer, _copy_seconds(parameters), ahead, other)


def _micro_batches(windows, recsys: Recsys, size: int, items: int) -> list:
    """A few of the run's own, with the catalogue folded into `items` items."""
    batches = TrainBatches(
        windows,
        micro_batch=size,
        micro_batches=3,
        seed=recsys.seed,
        length_multiple=recsys.tensor if recsys.sequence_parallel else 1,
    )
    made = []
    for inputs, (labels, scale) in next(batches.epoch_iterator(0)):
        inputs = torch.where(inputs > items, inputs % items + 1, inputs)
        labels = torch.where((labels != IGNORE) & (labels > items), labels % items + 1, labels)
        made.append((inputs, (labels, scale)))
    return made


def _passes(pipe, micro_batches: list) -> tuple[dict[int, LayerProfile], list[float], float]:
    """(layers of one pass, mean; seconds of each; processor seconds of all), as many passes as all ranks agree on."""
    device = next(pipe.parameters()).device
    moved = [_to(device, one) for one in micro_batches]
    clock = clock_of_this_device()
    _pass(pipe, moved[0], clock)  # allocates
    found: list[dict[int, LayerProfile]] = []
    seconds: list[float] = []
    used, done = 0.0, False
    while not done:
        begin, processor = time.perf_counter(), time.process_time()
        found.append(_pass(pipe, moved[len(found) % len(moved)], clock))
        seconds.append(time.perf_counter() - begin)
        used += time.process_time() - processor
        enough = torch.tensor(float(len(found) >= _PASSES and sum(seconds) >= _SECONDS), device=device)
        dist.all_reduce(enough, op=dist.ReduceOp.MIN)
        done = bool(enough)
    if device.type != "cpu":
        used = 0.0
    mean = {
        layer: LayerProfile(
            fmean(one[layer].forward for one in found),
            fmean(one[layer].backward for one in found),
            found[0][layer].boundary_bytes,
            found[0][layer].activation_bytes,
        )
        for layer in found[0]
    }
    return mean, seconds, used


def _pass(pipe, micro_batch, clock) -> dict[int, LayerProfile]:
    moments: list = []

    def mark() -> int:
        moments.append(clock.now())
        return len(moments) - 1

    inputs, labels = micro_batch
    clock.begin()
    mark()
    samples = LayerSamples(pipe, 1, mark)
    with samples.forward(0, inputs, inputs.numel):
        loss = pipe.loss_fn(pipe(inputs), labels)
    with samples.backward(0):
        loss.backward()
    if pipe.sparse_table:  # rows would pile up
        pipe.zero_grad(set_to_none=True)
    clock.wait(moments[-1])
    return samples.profiles(clock.seconds(moments))


def _to(device, value):
    return tuple(_to(device, one) for one in value) if isinstance(value, (tuple, list)) else value.to(device)


def _kinds(pipe, points: list, larger: float) -> dict[str, LayerFacts]:
    """Facts by the class name of a layer; a catalogue `larger` times as large makes the last layer cost as much more."""
    names = [spec.typename.__name__ for spec in pipe.builder.specs()]
    names[-1] = "last"  # of a tied model a table too, but with the head's work
    layers: dict[str, list[LayerFacts]] = {}
    for index, name in enumerate(names):
        factor = larger if name == "last" else 1.0
        forward = Line.through(*((size, factor * profiles[index].forward) for size, profiles in points))
        backward = Line.through(*((size, factor * profiles[index].backward) for size, profiles in points))
        size, profiles = points[-1]
        boundary, kept = profiles[index].boundary_bytes / size, profiles[index].activation_bytes / size
        layers.setdefault(name, []).append(LayerFacts(forward, backward, boundary, kept))
    return {name: _mean(same) for name, same in layers.items()}


def _mean(facts: list[LayerFacts]) -> LayerFacts:
    def line(name: str) -> Line:
        lines = [getattr(one, name) for one in facts]
        return Line(fmean(one.fixed for one in lines), fmean(one.each for one in lines))

    return LayerFacts(line("forward"), line("backward"), facts[0].boundary_bytes, facts[0].activation_bytes)


def _optimizer_seconds(parameters: list[Parameter], adamw: dict, clips: bool) -> float:
    """Seconds per parameter of a step of torch's AdamW, and of clipping before it; the weights stay as they are."""
    optimizer = _optimizer(parameters, adamw)

    def step() -> None:
        if clips:
            _clip(parameters)
        optimizer.step()

    return _seconds_of(step, parameters)


def _ahead_seconds(parameters: list[Parameter], adamw: dict, clips: bool) -> float:
    """Seconds per parameter of a step that is taken back."""
    optimizer = _optimizer(parameters, adamw)
    optimizer.step()
    ahead = LookAhead(optimizer, FlatParameters((str(number), one) for number, one in enumerate(parameters)))

    def there_and_back() -> None:
        ahead.go([one.grad for one in parameters], partial(_clip, parameters) if clips else None, optimizer.step)
        ahead.back()

    return _seconds_of(there_and_back, parameters)


def _optimizer(parameters: list[Parameter], adamw: dict) -> torch.optim.AdamW:
    """One that leaves the weights as they are."""
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)  # zeros would all be read from one page of memory
    return torch.optim.AdamW(parameters, **{**adamw, "lr": 0.0, "weight_decay": 0.0})


def _clip(parameters: list[Parameter]) -> None:
    nn.utils.clip_grad_norm_(parameters, max_norm=1e9)


def _copy_seconds(parameters: list[Parameter]) -> float:
    """Seconds per parameter to copy all gradients."""
    copies = [torch.empty_like(parameter.grad) for parameter in parameters]

    def copy() -> None:
        for to, parameter in zip(copies, parameters, strict=True):
            to.copy_(parameter.grad)

    return _seconds_of(copy, parameters)


def _seconds_of(work: Callable, parameters: list[Parameter]) -> float:
    """Of one run, per parameter; the first run, which allocates, is left out."""
    work()
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        if parameters[0].device.type != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return fmean(seconds) / sum(parameter.numel() for parameter in parameters)


def pipeline_layers(builder: ModelBuilder, kinds: dict[str, LayerFacts]) -> tuple[LayerFacts, ...]:
    """The facts of every layer of the whole model, by its kind."""
    counts, specs = builder.parameter_counts(), builder.specs()
    names = [spec.typename.__name__ for spec in specs]
    names[-1] = "last"
    return tuple(replace(kinds[name], parameters=count) for name, count in zip(names, counts, strict=True))


def on_fastest(measured: Sequence[Measured], slowdowns: Sequence[float], tensor: int) -> dict[str, LayerFacts]:
    """What all ranks measured, in rank order, as on the fastest device; a tensor axis is as slow as its slowest rank."""
    paces = [max(slowdowns[rank // tensor * tensor :][:tensor]) for rank in range(len(measured))]

    def line(name: str, kind: str) -> Line:
        lines = [(getattr(one.kinds[kind], name), pace) for one, pace in zip(measured, paces, strict=True)]
        return Line(median(a.fixed / pace for a, pace in lines), median(a.each / pace for a, pace in lines))

    first = measured[0].kinds
    return {
        kind: replace(first[kind], forward=line("forward", kind), backward=line("backward", kind)) for kind in first
    }


def slowdowns_of(seconds: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Of devices that took these for the same passes, against the fastest of each pass.

    The pass in which a device does best counts, for a slow device is slow in all of them. Those nearly as fast are equal.
    """
    fastest = [min(one) for one in zip(*seconds, strict=True)]
    found = [min(took / least for took, least in zip(mine, fastest, strict=True)) for mine in seconds]
    return tuple(1.0 if one < _ALIKE else one for one in found)
