"""What compression left out of the gradients so far, to be added to the next ones (https://arxiv.org/abs/1901.09847).

A step reads the residuals of the last one and writes its own beside them. Only `commit` makes those the residuals;
`discard` forgets them, for a step that the optimizer skips has not happened. So there are two fp32 copies.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

WORKER, SERVER = "worker", "server"


class ErrorFeedback:
    """Residuals by side, parameter name and range of its flattened values.

    The worker's side is what a rank did not send of its own gradient; the server's what the owner of a range did not send
    of the sum. Both are in the units of the gradients times `scale`.

    Attributes:
        scale: by what the gradients are multiplied now (the loss scale); residuals of another scale are converted.
    """

    def __init__(self, enabled: bool = True, device: torch.device | str = "cpu"):
        self.enabled = enabled
        self.scale = 1.0
        self._device = device
        self._kept: dict[tuple, Tensor] = {}  # (side, name, start, stop)
        self._kept_scale = 1.0
        self._staged: dict[tuple, Tensor] = {}
        self._spare: dict[int, list[Tensor]] = {}  # memory of dropped residuals, by number of values

    @property
    def multiplier(self) -> float:
        """What residuals are to be multiplied by; a ratio of loss scales, so a power of two."""
        return self.scale / self._kept_scale

    def worker(self, part) -> tuple[Tensor | None, Tensor | None]:
        """(residual to read, error to write) of `part.name`, values part.start to part.stop; fp32, different memory."""
        return self._slot(WORKER, part)

    def server(self, part) -> tuple[Tensor | None, Tensor | None]:
        """As `worker`, of the sum over the ranks."""
        return self._slot(SERVER, part)

    def _slot(self, side: str, part) -> tuple[Tensor | None, Tensor | None]:
        if not self.enabled:
            return None, None
        key = (side, part.name, part.start, part.stop)
        residual = self._staged.get(key)
        if residual is None:
            residual = self._kept.get(key)
            if residual is None and (residual := self._assembled(key)) is not None:
                self._kept[key] = residual
        elif self.multiplier != 1.0:  # reduced twice within a step: what is staged has the present scale already
            residual = residual / self.multiplier
        size = part.stop - part.start
        spare = self._spare.get(size)
        error = spare.pop() if spare else torch.empty(size, dtype=torch.float32, device=self._device)
        self._staged[key] = error
        return residual, error

    def _assembled(self, key: tuple) -> Tensor | None:
        """The residual of a range that was cut otherwise before, None where nothing of it is known."""
        side, name, start, stop = key
        assembled = None
        for (other, of, low, high), value in self._kept.items():
            begin, end = max(low, start), min(high, stop)
            if (other, of) == (side, name) and begin < end:
                if assembled is None:
                    assembled = torch.zeros(stop - start, dtype=torch.float32, device=self._device)
                assembled[begin - start : end - start] = value[begin - low : end - low]
        return assembled

    def commit(self) -> None:
        """The step took place: its errors are the residuals from now on."""
        if not self._staged:
            return
        if self.multiplier != 1.0:
            for key in self._kept.keys() - self._staged.keys():
                self._kept[key] = self._kept[key] * self.multiplier
        renewed: dict[tuple, list[tuple]] = {}
        for side, name, start, stop in self._staged:
            renewed.setdefault((side, name), []).append((start, stop))
        for key in list(self._kept):
            side, name, start, stop = key
            ranges = renewed.get((side, name), ())
            if key in self._staged:
                self._recycle(self._kept.pop(key))
            elif any(low < stop and start < high for low, high in ranges):
                self._keep_rest(key, ranges)
        self._kept.update(self._staged)
        self._staged, self._kept_scale = {}, self.scale

    def _keep_rest(self, key: tuple, ranges: Iterable[tuple[int, int]]) -> None:
        """Of a residual that was cut otherwise before, keep what the step did not renew."""
        side, name, start, stop = key
        value = self._kept.pop(key)
        for low, high in [*sorted(ranges), (stop, stop)]:
            end = min(low, stop)
            if start < end:
                self._kept[(side, name, start, end)] = value[start - key[2] : end - key[2]].clone()
            start = max(start, high)

    def discard(self) -> None:
        """The step was skipped: the residuals stay what they were."""
        for value in self._staged.values():
            self._recycle(value)
        self._staged = {}

    def _recycle(self, value: Tensor) -> None:
        self._spare.setdefault(value.numel(), []).append(value)

    def errors(self) -> dict[tuple, tuple[Tensor | None, Tensor]]:
        """(side, name, start, stop) -> (residual that was read, error) of the step that is neither committed nor discarded."""
        return {key: (self._kept.get(key), error) for key, error in self._staged.items()}

    def norm_squared(self) -> float:
        """Of all residuals of this rank's own gradients, in unscaled units."""
        squares = [float(value.double().square().sum()) for key, value in self._kept.items() if key[0] == WORKER]
        return sum(squares) / self._kept_scale**2

    def state_dict(self) -> dict[tuple, Tensor]:
        """(side, name, start, stop) -> fp32 residual, in unscaled units."""
        return {key: value / self._kept_scale for key, value in self._kept.items()}

    def load_state_dict(self, state: dict[tuple, Tensor]) -> None:
        """Replace all residuals."""
        self._staged, self._spare, self._kept_scale = {}, {}, 1.0
        self._kept = {key: value.to(self._device, torch.float32, copy=True) for key, value in state.items()}
