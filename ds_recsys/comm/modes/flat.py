"""A rank's trainable parameters as one flat fp32 buffer, in a fixed order."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import Parameter


class FlatParameters:
    """Parameters by name, and where each stands in a flat buffer.

    Attributes:
        names: in the order of the buffer.
        shapes: (name, shape) of each, as a `Reducer` wants them.
        numel: of the buffer.
    """

    def __init__(self, named: Iterable[tuple[str, Parameter]]):
        self._parameters = dict(named)
        self.names = tuple(self._parameters)
        self.shapes = tuple((name, tuple(parameter.shape)) for name, parameter in self._parameters.items())
        ends = list(accumulate(parameter.numel() for parameter in self._parameters.values()))
        self._places = dict(zip(self.names, zip([0, *ends], ends, strict=False), strict=True))
        self.numel = ends[-1] if ends else 0

    @classmethod
    def of(cls, module: torch.nn.Module) -> "FlatParameters":
        """All that are trained."""
        return cls((name, p) for name, p in module.named_parameters() if p.requires_grad and p.numel())

    def subset(self, names: set[str]) -> "FlatParameters":
        """Those in `names`, in the same order."""
        return FlatParameters((name, p) for name, p in self._parameters.items() if name in names)

    def items(self):
        """(name, parameter) in the order of the buffer."""
        return self._parameters.items()

    @property
    def parameters(self) -> list[Parameter]:
        """In the order of the buffer."""
        return list(self._parameters.values())

    def empty(self) -> Tensor:
        """fp32 [numel], uninitialised, where the parameters are."""
        device = self.parameters[0].device if self._parameters else "cpu"
        return torch.empty(self.numel, dtype=torch.float32, device=device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Of each parameter the part of `flat`, in its shape."""
        return [
            flat[start:end].view(shape)
            for (start, end), (_, shape) in zip(self._places.values(), self.shapes, strict=True)
        ]

    @torch.no_grad()
    def read(self, out: Tensor | None = None) -> Tensor:
        """The values now, fp32 [numel], in `out` or in new memory."""
        out = self.empty() if out is None else out
        for view, parameter in zip(self.views(out), self.parameters, strict=True):
            view.copy_(parameter)
        return out

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """The parameters <- `flat`."""
        for view, parameter in zip(self.views(flat), self.parameters, strict=True):
            parameter.copy_(view)

    def as_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """A copy of `flat` by name, as a checkpoint keeps it."""
        return {name: view.clone() for name, view in zip(self.names, self.views(flat), strict=True)}

    def from_dict(self, values: dict[str, Tensor]) -> Tensor:
        """The flat buffer of `as_dict`."""
        flat = self.empty()
        for name, view in zip(self.names, self.views(flat), strict=True):
            view.copy_(values[name])
        return flat
