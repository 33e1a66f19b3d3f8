"""A layer with its whole training state as one block of bytes: packed at its sender, checked and unpacked elsewhere."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ds_recsys.balance.optimizer_state import Share

_CHECKSUM = 8  # bytes
_ALIGNMENT = 64  # bytes; what torch aligns memory of its own to, and matrix kernels may round differently without
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
    offset: int

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
    size: int  # bytes of a parcel: the tensors and, in the last eight, their checksum

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        return {kind: tuple(slot.name for slot in self.slots if slot.kind == kind) for kind in (_PARAMETER, _BUFFER)}


def label_of(layer: nn.Module, shares: Mapping[Parameter, Share], others: Others, tied: bool) -> Label:
    """Of a layer as it is now. A tied one leaves behind the mark on those copies that do not count in norms."""
    notes, slots, offset = {}, [], 0
    for kind, name, key, tensor in _tensors(layer, shares, others):
        slots.append(Slot(kind, name, key, tensor.dtype, tuple(tensor.shape), offset))
        offset += -(-slots[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
    for name, parameter in layer.named_parameters():
        share = shares.get(parameter)
        marks = {key: value for key, value in vars(parameter).items() if isinstance(value, (bool, int, float, str))}
        if tied:
            marks.pop("ds_pipe_replicated", None)
        numbers = {key: _on_cpu(value) for key, value in share.numbers.items()} if share else {}
        moved = frozenset(key for key, value in numbers.items() if value is not share.numbers[key])
        plain = share and Share(share.group, share.start, share.numel, numbers=numbers)
        notes[name] = Note(parameter.requires_grad, marks, plain, moved)
    return Label(notes, tuple(slots), offset + _CHECKSUM)


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


def room_for(size: int, device: torch.device) -> Tensor:
    """uint8 [size], of any values."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def pack(parcel: Tensor, label: Label, layer: nn.Module, shares: Mapping[Parameter, Share], others: Others) -> None:
    """Fill `parcel`, uint8 [label.size], with the layer's tensors and the checksum of their bytes."""
    for slot, (_, _, _, tensor) in zip(label.slots, _tensors(layer, shares, others), strict=True):
        _view(parcel, slot).copy_(tensor)
    parcel[-_CHECKSUM:] = torch.tensor([checksum(parcel[:-_CHECKSUM])]).view(torch.uint8)


def is_intact(parcel: Tensor) -> bool:
    """Whether the bytes are those that were packed."""
    return int(parcel[-_CHECKSUM:].cpu().clone().view(torch.int64)) == checksum(parcel[:-_CHECKSUM])


def checksum(values: Tensor) -> int:
    """CRC-32 of uint8 [n]."""
    return zlib.crc32(values.cpu().numpy().data)


def unpack(
    label: Label, parcel: Tensor, layer: nn.Module, copy: bool
) -> tuple[dict[Parameter, Share], dict[tuple, Tensor]]:
    """Give a layer the weights and buffers of a parcel, and return the shares of its parameters and the others.

    The parameters stay the same objects. All but the shares get memory of their own, and with `copy` the shares too.
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
            numbers |= {key: numbers[key].to(parcel.device) for key in note.on_device}
            shares[name] = Share(note.share.group, note.share.start, note.share.numel, numbers=numbers)
    for slot in label.slots:
        value = _view(parcel, slot)
        value = value.clone() if copy or slot.kind != _STATE else value
        if slot.kind == _STATE:
            shares[slot.name].tensors[slot.key] = value
        elif slot.kind == _OTHER:
            others[slot.key] = value
        else:
            (parameters if slot.kind == _PARAMETER else buffers)[slot.name].data = value
    return {parameters[name]: share for name, share in shares.items()}, others


def _view(parcel: Tensor, slot: Slot) -> Tensor:
    return parcel[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)


def free(layer: nn.Module) -> None:
    """Give up the memory of a layer that lives elsewhere now; its parameters keep their shapes.

    The user's list may hold the layer for ever, and what a parameter views may be a buffer of all the stage's.
    """
    for parameter in layer.parameters():
        parameter.grad = None
        parameter.data = parameter.new_zeros(()).expand(parameter.shape)
