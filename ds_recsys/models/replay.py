"""One pass through HF's forward over stubs: what the stubs answer, what is recorded, where it stops."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ds_recsys.models.skeleton import Skeleton


@dataclass
class Call:
    """How HF calls one decoder layer; `at` says where the hidden states go (position or keyword)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    at: int | str

    def apply(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on `hidden` [B, S, H] as HF would; layers that return tuples put the hidden states first."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.at, int):
            args[self.at] = hidden
        else:
            kwargs[self.at] = hidden
        out = layer(*args, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out


class Done(Exception):
    """Leaves HF's forward early with the value that was wanted."""

    def __init__(self, value: Any):
        self.value = value


class Replay:
    """One pass through HF's forward: answers for the stubs, records, injects values and stops where told."""

    def __init__(self, skeleton: "Skeleton", inject: dict[Any, Tensor], stop: int | str | None = None):
        self.skeleton, self.inject, self.stop = skeleton, inject, stop
        self.calls: list[Call] = []
        self.order: list[int] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.trunk_out: Any = None
        self.embeds = 0

    def embed(self, args: tuple, kwargs: dict) -> Tensor:
        self.embeds += 1
        return self.inject["embed"].clone()  # CTRL scales it in place

    def block(self, index: int, args: tuple, kwargs: dict) -> Any:
        at: int | str = 0 if args else "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        hidden = args[0] if args else kwargs[at]
        if self.stop == index:
            raise Done(hidden)
        if args:
            args = (None, *args[1:])
        else:
            kwargs = {**kwargs, at: None}
        self.calls.append(Call(args, kwargs, at))
        self.order.append(index)
        self.inputs.append(hidden)
        out = self.inject[index].clone() if index in self.inject else hidden
        self.outputs.append(out)
        return self.skeleton.wrap(out)  # the probe's finding: a tensor, or a tuple as long as HF's caller unpacks

    def trunk(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
        skeleton = self.skeleton
        if skeleton.trunk_name is None:
            skeleton.trunk_name = name
        if name != skeleton.trunk_name:
            return forward(*args, **kwargs)
        if "trunk" in self.inject:
            return with_hidden(skeleton.canned, self.inject["trunk"])
        out = forward(*args, **kwargs)
        self.trunk_out = out
        if self.stop == "trunk":
            raise Done(hidden_of(out))
        return out

    def linear(self, forward: Callable, args: tuple, kwargs: dict) -> Tensor:
        """The product with the item table at the end: its input is asked for, its output given, or it is computed."""
        if self.stop == "linear":
            raise Done(args[0])
        return self.inject["linear"] if "linear" in self.inject else forward(*args, **kwargs)


def hidden_of(out: Any) -> Tensor:
    """`last_hidden_state` of a trunk's output, which is a ModelOutput, a tuple or a tensor."""
    if isinstance(out, Tensor):
        return out
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]


def with_hidden(out: Any, hidden: Tensor | None) -> Any:
    """A copy of the trunk's output `out` that carries `hidden` instead."""
    if isinstance(out, Tensor) or out is None:
        return hidden
    if hasattr(out, "last_hidden_state"):
        changed = copy.copy(out)
        changed["last_hidden_state"] = hidden
        return changed
    return (hidden, *out[1:])
