"""`migrate`: other stage bounds for a running PipelineEngine, with the whole training state, in memory."""

import contextlib
import gc
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_recsys import compat_stages
from ds_recsys.balance import parcels, units
from ds_recsys.balance.optimizer_state import read_shares, rebuild_optimizer, unshareable_state
from ds_recsys.balance.survey import Report, check, others_of, survey
from ds_recsys.balance.units import Move
from ds_recsys.errors import UserError


class MigrationError(RuntimeError):
    """Layers did not arrive whole, or a rank was lost. One line; it says whether the old bounds are still in force."""


@dataclass(frozen=True)
class Migration:
    """What a migration came to, the same on every rank.

    Attributes:
        bounds: now in force; stage s holds layers bounds[s] to bounds[s + 1] - 1.
        layers: names of the layers that moved, such as "3" or "tied_modules.embedding".
        bytes: that all ranks sent.
        busiest_bytes: that the rank with the most sent; what the pause grows with.
        seconds: from the call to the end of it on the slowest rank.
    """

    bounds: tuple[int, ...]
    layers: tuple[str, ...]
    bytes: int
    busiest_bytes: int
    seconds: float


def migrate(
    engine,
    bounds: Sequence[int],
    *,
    make_optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None = None,
) -> Migration:
    """Cut the pipeline at other `bounds`; the same engine goes on as if it had always been cut there. Collective.

    Weights, fp32 copies, moments and every other state of the optimizer, frozen weights, buffers and the error feedback of
    compressed gradients go straight from the ranks of one stage to those of the other, a layer at a time, and are checked
    there by XXH3. All is kept where it was until every rank has confirmed what it got. Modules, parameters, optimizer and
    scheduler of what stays remain the same objects. Dropout is what it would have been if the module was made with
    `seed_layers=True`; without, a layer that moved draws from its new rank's generator.

    Args:
        engine: a PipelineEngine between two calls of `train_batch`: ZeRO 0 or 1, fp32, bf16 or fp16.
        bounds: first layer of each stage, and the number of layers.
        make_optimizer: called with param_groups of the stage's new parameters, for an optimizer that keeps parameters
            elsewhere than in its groups and cannot be given others.

    Raises:
        UserError: these bounds, or this engine's layers, cannot be had; nothing has changed.
        MigrationError: a layer could not be built, did not arrive whole or does not fit into memory: the old bounds are in
            force, training can go on. Or a rank was lost: the last checkpoint must be resumed. The message says which.
    """
    begin = time.perf_counter()
    if not engine.pipeline_parallelism:
        raise UserError("stage bounds are a PipelineEngine's; this engine has no pipeline")
    module, bounds = engine.module, [int(bound) for bound in bounds]
    stage, old = module.stage_id, [int(bound) for bound in module.parts]
    parts = units.units_of(compat_stages.layer_list(module))
    with _undisturbed(), _contact(module.global_rank):
        problem = _problem(engine, bounds)
        moves = [] if problem else units.plan_moves(parts, old, bounds)
        layers = {unit.name: module.get_submodule(unit.name) for unit in parts if stage in unit.stages(old)}
        shares = {} if problem else read_shares(engine)
        reports = survey(engine, bounds, moves, layers, shares, problem)
        grouped, normed = not compat_stages.is_unwrapped(engine), compat_stages.fails_without_norm(engine)
        check(reports, parts, bounds != old, grouped, normed)
        sent = 0
        if bounds != old:
            outgoing = reports[dist.get_rank()].outgoing
            arriving = _all_or_none(old, lambda: _prepare(engine, moves, reports))
            sent, failures = _transfer(engine, moves, layers, outgoing, shares, arriving)
            _all_or_none(old, lambda: _inspect(arriving, failures))
            gone = [layers.pop(unit.name) for unit in parts if stage in unit.stages(old) - unit.stages(bounds)]
            for parameter in (parameter for layer in gone for parameter in layer.parameters()):
                shares.pop(parameter, None)
            sent += _rebuild(engine, bounds, layers, shares, arriving, make_optimizer)
            for layer in gone:
                parcels.free(layer)
        figures = [None] * dist.get_world_size()
        dist.all_gather_object(figures, (sent, time.perf_counter() - begin))
    return Migration(
        tuple(bounds),
        tuple(dict.fromkeys(move.unit.name for move in moves)),
        sum(sent for sent, _ in figures),
        max(sent for sent, _ in figures),
        max(seconds for _, seconds in figures),
    )


def _problem(engine, bounds: list[int]) -> str | None:
    """What this rank sees wrong by itself; it is told to the others, who would wait for it otherwise."""
    module, reason = engine.module, compat_stages.unmovable(engine)
    if reason:
        return f"layers of this engine cannot move between stages: {reason}"
    try:
        units.check_bounds(bounds, module.num_stages, len(compat_stages.layer_list(module)))
        if hasattr(module, "check_bounds"):
            module.check_bounds(bounds)
    except UserError as error:
        return str(error)
    return unshareable_state(engine)


@dataclass
class _Arrival:
    """A layer on its way: the module that will be it, the memory that its tensors go to, and their checksum at the sender."""

    label: parcels.Label
    name: str
    layer: nn.Module
    tensors: list[Tensor]
    checksum: Tensor
    sender: int


def _prepare(engine, moves: Sequence[Move], reports: Sequence[Report]) -> dict[Move, _Arrival]:
    """Build what this rank is to receive, and take the memory for it."""
    arriving = {}
    for move in moves:
        if move.target == engine.module.stage_id:
            sender = compat_stages.rank_of_stage(engine.module, move.source)
            label = reports[sender].outgoing[move.unit.name]
            layer, tensors = _built(engine.module, move, label), parcels.room_for(label, engine.device)
            told = torch.zeros(1, dtype=torch.int64, device=engine.device)
            arriving[move] = _Arrival(label, move.unit.name, layer, tensors, told, sender)
    return arriving


def _built(module, move: Move, label: parcels.Label) -> nn.Module:
    """The layer as the user's list has it; its values come with the parcel."""
    spec = compat_stages.layer_list(module)[move.unit.places[0]]
    without_values = getattr(getattr(module, "builder", None), "without_values", contextlib.nullcontext)
    with without_values():
        layer = spec if isinstance(spec, nn.Module) else spec.build()
    built, wanted = parcels.label_of(layer, {}, {}, tied=False).names, label.names
    if built != wanted:
        kind = next(kind for kind in wanted if built[kind] != wanted[kind])
        differing = sorted(set(built[kind]) ^ set(wanted[kind])) or ["their order"]
        raise ValueError(
            f"layer {move.unit.name} as its spec builds it has other {kind}s than on stage {move.source} "
            f"({differing[0]}): what was changed in a layer after it was built cannot move"
        )
    return layer


def _transfer(
    engine, moves: Sequence[Move], layers: dict, outgoing: dict, shares: dict, arriving: dict[Move, _Arrival]
) -> tuple[int, list[Exception]]:
    """Send and receive, one layer at a time between any two stages; returns the bytes sent and what went wrong here.

    Tensors leave from where they are and arrive where they stay. What cannot be sent is replaced by bytes of any value: the
    receiver waits for it, and all are told afterwards.
    """
    stage, sent, failures = engine.module.stage_id, 0, []
    for batch in units.in_rounds(moves):
        leaving, work = [], []
        for move in batch:
            if move.source == stage:
                name, peer = move.unit.name, compat_stages.rank_of_stage(engine.module, move.target)
                try:
                    contents = parcels.contents(layers[name], shares, others_of(engine, name), engine.device)
                except Exception as error:
                    failures.append(error)
                    contents = [parcels.as_bytes(tensor) for tensor in parcels.room_for(outgoing[name], engine.device)]
                leaving.append((contents, peer))
                work += [dist.P2POp(dist.isend, values, peer) for values in contents if values.numel()]
                sent += outgoing[name].size
            elif move.target == stage:
                values = map(parcels.as_bytes, arriving[move].tensors)
                work += [dist.P2POp(dist.irecv, each, arriving[move].sender) for each in values if each.numel()]
        pending = dist.batch_isend_irecv(work) if work else []
        work = []
        for contents, peer in leaving:  # which are on their way meanwhile
            told = torch.tensor([parcels.checksum(contents)], device=engine.device)
            work.append(dist.P2POp(dist.isend, told, peer))
        work += [
            dist.P2POp(dist.irecv, arriving[move].checksum, arriving[move].sender)
            for move in batch
            if move.target == stage
        ]
        for each in [*pending, *(dist.batch_isend_irecv(work) if work else ())]:
            each.wait()
    return sent, failures


def _inspect(arriving: dict[Move, _Arrival], failures: Sequence[Exception]) -> None:
    if failures:
        raise failures[0]
    for arrival in arriving.values():
        if int(arrival.checksum) != parcels.checksum(list(map(parcels.as_bytes, arrival.tensors))):
            raise ValueError(f"layer {arrival.name} from rank {arrival.sender} has another checksum than there")


def _rebuild(engine, bounds: list[int], layers: dict, shares: dict, arriving: dict, make_optimizer) -> int:
    """Make the stage of what stayed and what arrived; returns the bytes sent on the data axis."""
    compression, others = getattr(engine, "gradient_compression", None), {}
    try:
        if compression is not None:
            compression.detach()
        compat_stages.release_parameters(engine)
        for arrival in arriving.values():
            arrived, beside = parcels.unpack(arrival.label, arrival.tensors, arrival.layer)
            shares |= arrived
            others |= beside
            layers[arrival.name] = arrival.layer
            arrival.tensors.clear()  # wrappers copy the state into buffers of theirs, a kind at a time, and each is freed then
        compat_stages.set_stage(engine.module, bounds, layers)
        compat_stages.name_parameters(engine)
        sent = rebuild_optimizer(engine, shares, make_optimizer)
        compat_stages.forget_activations(engine)
        if compression is not None:
            compression.attach(others)
    except Exception as error:
        raise MigrationError(
            f"rank {dist.get_rank()}: stage {engine.module.stage_id} could not be rebuilt ({_line(error)}); resume the last "
            "checkpoint"
        ) from error
    return sent


def _all_or_none(bounds: list[int], work: Callable):
    """`work()` on every rank; where one fails, all raise its error."""
    result = problem = None
    try:
        result = work()
    except Exception as error:
        problem = f"rank {dist.get_rank()}: {_line(error)}"
    problems = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for problem in problems:
        if problem:
            raise MigrationError(f"{problem}; no layer has moved, the stage bounds are still {bounds}")
    return result


@contextlib.contextmanager
def _contact(rank: int):
    """Say in one line what became of a run one of whose ranks is gone."""
    try:
        yield
    except (UserError, MigrationError):
        raise
    except RuntimeError as error:
        raise MigrationError(
            f"rank {rank} lost another rank while layers moved ({_line(error)}); resume the last checkpoint"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _undisturbed():
    """Leave no trace but the migration: generators as they were, no log lines, no collection of all the garbage.

    Building a layer draws random numbers. DeepSpeed collects garbage each time it looks at the memory, several times while
    it wraps an optimizer, which takes longer than everything else; what is frozen is not looked through.
    """
    state, arrays = random.getstate(), np.random.get_state()
    accelerator = get_accelerator()
    devices = [accelerator.current_device()] if torch.cuda.is_available() else []
    log = logging.getLogger("DeepSpeed")
    level, frozen = log.level, gc.get_freeze_count()  # what others froze cannot be told apart from ours again
    log.setLevel(logging.ERROR)
    if not frozen:
        gc.freeze()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(arrays)
        log.setLevel(level)
        if not frozen:
            gc.unfreeze()
