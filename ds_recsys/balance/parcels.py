"""A layer with its whole training state on its way to another rank: what is sent, the memory for it there, and its check."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import Parameter

from ds_recsys.balance.optimizer_state import Share

_CHECKSUM = 8  # bytes
_PARAMETER, _BUFFER, _STATE, _OTHER = "parameter", "buffer", "state", "other"

Others = Mapping[tuple, Tensor]  # what goes with a layer beside: error feedback of its gradients


@dataclass(frozen=True)
class Slot:
    """A tensor in a parcel: of which parameter or buffer, or under which key."""

    kind: str
    name: str
    key: str | tuple | None
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Note:
    """What goes with a parameter beside its tensors: flags that others put on it, and its place in the optimizer."""

    requires_grad: bool
    marks: dict[str, Any]
    share: Share | None  # without tensors
    on_device: frozenset[str]  # keys of the share's numbers that are tensors there, as a fused optimizer's step is


@dataclass(frozen=True)
class Label:
    """What is in a parcel; `names` are of the parameters and buffers inside the layer."""

    notes: dict[str, Note]
    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        """Bytes that travel: the tensors and their checksum."""
        return sum(slot.nbytes for slot in self.slots) + _CHECKSUM

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        return {kind: tuple(slot.name for slot in self.slots if slot.kind == kind) for kind in (_PARAMETER, _BUFFER)}


def label_of(layer: nn.Module, shares: Mapping[Parameter, Share], others: Others, tied: bool) -> Label:
    """Of a layer as it is now. A tied one leaves behind the mark on those copies that do not count in norms."""
    notes = {}
    slots = [Slot(*place, tensor.dtype, tuple(tensor.shape)) for *place, tensor in _tensors(layer, shares, others)]
    for name, parameter in layer.named_parameters():
        share = shares.get(parameter)
        marks = {key: value for key, value in vars(parameter).items() if isinstance(value, (bool, int, float, str))}
        if tied:
            marks.pop("ds_pipe_replicated", None)
        numbers = {key: _on_cpu(value) for key, value in share.numbers.items()} if share else {}
        moved = frozenset(key for key, value in numbers.items() if value is not share.numbers[key])
        plain = share and Share(share.group, share.start, share.numel, numbers=numbers)
        notes[name] = Note(parameter.requires_grad, marks, plain, moved)
    return Label(notes, tuple(slots))


def _on_cpu(value):
    return value.cpu() if torch.is_tensor(value) else value  # pickled, a tensor would come back on the sender's device


def _tensors(layer: nn.Module, shares: Mapping[Parameter, Share], others: Others):
    """(kind, name, key, tensor) of everything that a parcel holds, in its order."""
    for name, parameter in layer.named_parameters():
        yield _PARAMETER, name, None, parameter.detach()
        for key, value in shares[parameter].tensors.items() if parameter in shares else ():
            yield _STATE, name, key, value
    for name, buffer in layer.named_buffers():
        yield _BUFFER, name, None, buffer
    for key, value in others.items():
        yield _OTHER, "", key, value


def contents(layer: nn.Module, shares: Mapping[Parameter, Share], others: Others, device: torch.device) -> list[Tensor]:
    """What is sent of a layer: uint8 [bytes] for each slot of its label. No copies of what lies in one piece on the device."""
    return [as_bytes(tensor.to(device)) for *_, tensor in _tensors(layer, shares, others)]


def room_for(label: Label, device: torch.device) -> list[Tensor]:
    """The memory that a layer arrives in and lives in from then on: a tensor for each slot, of any values."""
    return [torch.empty(slot.shape, dtype=slot.dtype, device=device) for slot in label.slots]


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes], a view where the tensor lies in one piece."""
    return tensor.reshape(-1).view(torch.uint8)


def checksum(contents: Sequence[Tensor]) -> int:
    """XXH3 (64 bits, as an int64) of uint8 tensors, one after another."""
    found = xxhash.xxh3_64()
    for values in contents:
        found.update(values.cpu().numpy())
    return int.from_bytes(found.digest(), "big", signed=True)


def unpack(
    label: Label, tensors: Sequence[Tensor], layer: nn.Module
) -> tuple[dict[Parameter, Share], dict[tuple, Tensor]]:
    """Give a layer the weights and buffers that arrived, and return the shares of its parameters and the others.

    The parameters stay the same objects; the tensors become theirs.
    """
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    shares: dict[str, Share] = {}
    others: dict[tuple, Tensor] = {}
    for name, note in label.notes.items():
        parameters[name].requires_grad_(note.requires_grad)
        parameters[name].grad = None
        for key, value in note.marks.items():
            setattr(parameters[name], key, value)
        if note.share is not None:
            numbers = dict(note.share.numbers)
            numbers |= {key: numbers[key].to(tensors[0].device) for key in note.on_device}
            shares[name] = Share(note.share.group, note.share.start, note.share.numel, numbers=numbers)
    for slot, value in zip(label.slots, tensors, strict=True):
        if slot.kind == _STATE:
            shares[slot.name].tensors[slot.key] = value
        elif slot.kind == _OTHER:
            others[slot.key] = value
        else:
            (parameters if slot.kind == _PARAMETER else buffers)[slot.name].data = value
    return {parameters[name]: share for name, share in shares.items()}, others


def free(layer: nn.Module) -> None:
    """Give up the memory of a layer that lives elsewhere now; its parameters keep their shapes.

    The user's list may hold the layer for ever, and what a parameter views may be a buffer of all the stage's.
    """
    for parameter in layer.parameters():
        parameter.grad = None
        parameter.data = parameter.new_zeros(()).expand(parameter.shape)
