"""Random numbers inside a tensor-parallel region: different on every rank there, the same everywhere outside.

Ranks hold different heads, so dropout on attention weights must differ between them; dropout on hidden states, which
every rank has whole, must not (Megatron-LM, section 3, https://arxiv.org/abs/1909.08053). Here nothing has to be kept
between steps: a seed is drawn from the generator that all ranks share, so what a region draws is a function of that
generator's state, and recomputation, which restores that state, draws it again.
"""

import torch

SEEDS = 2**48


class RegionRandom:
    """The device's generator, replaced by one of this rank's own between `enter` and `leave`."""

    def __init__(self, rank: int):
        self.rank = rank
        self._kept: tuple[torch.Generator, torch.Tensor] | None = None

    def enter(self, device: torch.device) -> None:
        """Draw a seed from the common CPU generator (on a GPU, asking the device's would wait for it) and switch."""
        if self._kept is None:
            seed = int(torch.randint(SEEDS, ())) * 2**8 + self.rank
            generator = _generator(device)
            self._kept = generator, generator.get_state()
            generator.manual_seed(seed)

    def leave(self) -> None:
        """Back to the common generator, as it was after the draw."""
        if self._kept is not None:
            generator, state = self._kept
            generator.set_state(state)
            self._kept = None


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[module.current_device() if device.index is None else device.index]
