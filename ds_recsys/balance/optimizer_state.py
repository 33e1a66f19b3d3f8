"""What an optimizer knows of each parameter on this rank: read from one of DeepSpeed's wrappers, given to the next."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ds_recsys import compat, compat_stages

MASTER = "master weight"  # key of the fp32 copy of a weight that is of another dtype itself


@dataclass
class Share:
    """This rank's part of the state of one parameter.

    Attributes:
        group: index of the optimizer's parameter group.
        start, numel: which of the parameter's flattened values the tensors are about; on a data axis that shares the
            state out, the ranks' parts together are all of them.
        tensors: moments and the fp32 copy; [numel], or in the optimizer's own shape where it keeps one per parameter.
        numbers: the rest, such as the step.
    """

    group: int
    start: int
    numel: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


def read_shares(engine) -> dict[Parameter, Share]:
    """The shares of all parameters that the engine's optimizer updates; views of what the optimizer holds."""
    state, shares = compat_stages.torch_optimizer(engine).state, {}
    for parameter, fragment in compat_stages.fragments(engine).items():
        holder, share = fragment.holder, Share(fragment.group, fragment.start, fragment.numel)
        own = _is_whole(parameter, fragment)
        for key, value in state.get(holder, {}).items():
            if not torch.is_tensor(value) or not value.dim():
                share.numbers[key] = value
            else:
                share.tensors[key] = value if own else _piece(value, fragment)
        if holder.dtype != parameter.dtype:
            share.tensors[MASTER] = holder.detach() if own else _piece(holder.detach(), fragment)
        shares[parameter] = share
    return shares


def unshareable_state(engine) -> str | None:
    """Why the state of the engine's optimizer cannot be told apart by parameter, or None."""
    state = compat_stages.torch_optimizer(engine).state
    for parameter, fragment in compat_stages.fragments(engine).items():
        own = _is_whole(parameter, fragment)
        for key, value in state.get(fragment.holder, {}).items():
            if not own and torch.is_tensor(value) and value.dim() and value.shape != fragment.holder.shape:
                return (
                    f"layers cannot move between stages: the optimizer keeps {key!r} in a shape of its own, "
                    f"{list(value.shape)}, for many weights at once; use ZeRO stage 0 with fp32"
                )
    return None


def _is_whole(parameter: Parameter, fragment: compat_stages.Fragment) -> bool:
    return fragment.holder.shape == parameter.shape and fragment.numel == parameter.numel()


def _piece(flat: Tensor, fragment) -> Tensor:
    return flat.view(-1)[fragment.begin : fragment.begin + fragment.numel]


def rebuild_optimizer(
    engine, shares: dict[Parameter, Share], make_optimizer: Callable[[list[dict]], torch.optim.Optimizer] | None
) -> int:
    """Let the engine's optimizer update the parameters of `shares`, with the state that is in them. Collective.

    The torch optimizer stays the same object, with its groups' options, unless `make_optimizer` makes another one.

    Returns:
        Bytes that this rank sent to others of the data axis, whose parts of the state are cut anew.
    """
    optimizer = compat_stages.torch_optimizer(engine)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    names = dict.fromkeys(shares)
    names.update((parameter, name) for name, parameter in engine.module.named_parameters())
    groups: list[list[Parameter]] = [[] for _ in options]
    for parameter in engine.module.parameters():
        if parameter in shares:
            groups[shares[parameter].group].append(parameter)
    if make_optimizer is not None:
        given = [{**option, "params": group} for option, group in zip(options, groups, strict=True)]
        optimizer = _replace(engine, optimizer, make_optimizer(given))
    optimizer.state.clear()
    for group, option, parameters in zip(optimizer.param_groups, options, groups, strict=True):
        if "param_names" in option:  # torch keeps them beside the parameters
            option["param_names"] = [names[parameter] for parameter in parameters]
        group.update(option, params=parameters)
    if compat_stages.is_unwrapped(engine):
        for parameter, share in shares.items():
            if share.tensors or share.numbers:
                optimizer.state[parameter] = {**share.numbers, **share.tensors}
        return 0
    compat_stages.wrap_again(engine, optimizer)
    optimizer = compat_stages.torch_optimizer(engine)
    for group, option in zip(optimizer.param_groups, options, strict=False):
        group.update(option)
    sent = _write(engine, optimizer.state, shares)
    if any(share.tensors.keys() - {MASTER} or share.numbers for share in shares.values()):
        compat_stages.link_optimizer_state(engine)
    return sent


def _replace(engine, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    scheduler = engine.lr_scheduler
    if scheduler is not None and getattr(scheduler, "optimizer", None) is old:
        scheduler.optimizer = new
    if compat_stages.is_unwrapped(engine):
        engine.optimizer = engine.basic_optimizer = new
    if engine.client_optimizer is not None:
        engine.client_optimizer = new
    return new


@torch.no_grad()
def _write(engine, state: dict, shares: dict[Parameter, Share]) -> int:
    """Fill a new wrapper's buffers, one kind of state after the other, and free what it came from."""
    found = compat_stages.fragments(engine)
    state.clear()  # fp16's wrappers have made a step with gradients of zero
    for parameter, fragment in found.items():
        for key, value in shares[parameter].numbers.items():
            own = state.setdefault(fragment.holder, {})
            own.setdefault(key, value.clone() if torch.is_tensor(value) else value)
    exchange = _Exchange(compat.data_parallel_group(engine), [(shares[p], f) for p, f in found.items()])
    for key in sorted({key for share in shares.values() for key in share.tensors}):
        targets = []
        for parameter, fragment in found.items():
            value = shares[parameter].tensors.pop(key, None)
            if value is None:
                targets.append(None)
            elif value.dim() and value.numel() != shares[parameter].numel:  # factored, of a holder of its own
                state.setdefault(fragment.holder, {})[key] = value.clone()
                targets.append(None)
            else:
                targets.append((value.reshape(-1), _buffer(state, key, fragment.holder, value.dtype)))
        exchange.run(targets)
    return exchange.bytes_sent


def _buffer(state: dict, key: str, holder: Tensor, dtype: torch.dtype) -> Tensor:
    if key == MASTER:
        return holder.data.view(-1)
    own = state.setdefault(holder, {})
    if key not in own:
        own[key] = torch.zeros_like(holder, dtype=dtype, requires_grad=False)
    return own[key].view(-1)


class _Exchange:
    """From how the ranks of the data axis shared the state out before to how they do now: what a rank lacks, others send."""

    def __init__(self, group: dist.ProcessGroup, parts: list[tuple[Share, compat_stages.Fragment]]):
        self._group, self._me, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self._begins = [fragment.begin for _, fragment in parts]
        mine = [[old.start, old.start + old.numel, new.start, new.start + new.numel] for old, new in parts]
        self._ranges = [mine]
        self.bytes_sent = 0
        if self._size > 1:
            self._ranges = [None] * self._size
            dist.all_gather_object(self._ranges, mine, group=group)

    def _overlaps(self, sender: int, receiver: int) -> Iterable[tuple[int, int, int]]:
        """(index of the parameter, from, to) of what `sender` had and `receiver` has now and had not before."""
        pairs = zip(self._ranges[sender], self._ranges[receiver], strict=True)
        for index, ((start, stop, _, _), (had_start, had_stop, new_start, new_stop)) in enumerate(pairs):
            low, high = max(start, new_start), min(stop, new_stop)
            had = had_start <= new_start and new_stop <= had_stop
            if low < high and (sender == receiver or not had):
                yield index, low, high

    def run(self, targets: list[tuple[Tensor, Tensor] | None]) -> None:
        """`targets`: (values that this rank had, flat buffer to fill) of each parameter, or None where there is nothing."""
        own = self._ranges[self._me]

        def before(index: int, low: int, high: int) -> Tensor:
            return targets[index][0][low - own[index][0] : high - own[index][0]]

        def now(index: int, low: int, high: int) -> Tensor:
            begin = self._begins[index] - own[index][2]
            return targets[index][1][begin + low : begin + high]

        work, arriving = [], []
        for peer in range(self._size):
            out = [span for span in self._overlaps(self._me, peer) if targets[span[0]] is not None]
            into = [span for span in self._overlaps(peer, self._me) if targets[span[0]] is not None]
            if peer == self._me:
                for span in out:
                    now(*span).copy_(before(*span))
                continue
            rank = dist.get_global_rank(self._group, peer)
            if out:
                payload = torch.cat([before(*span).view(torch.uint8) for span in out])
                work.append(dist.P2POp(dist.isend, payload, rank, self._group))
                self.bytes_sent += payload.numel()
            if into:
                sample = now(*into[0])
                values = sample.new_empty(sum(high - low for _, low, high in into))
                work.append(dist.P2POp(dist.irecv, values.view(torch.uint8), rank, self._group))
                arriving.append((values, into))
        for pending in dist.batch_isend_irecv(work) if work else ():
            pending.wait()
        for values, into in arriving:
            for span, piece in zip(into, values.split([high - low for _, low, high in into]), strict=True):
                now(*span).copy_(piece)
