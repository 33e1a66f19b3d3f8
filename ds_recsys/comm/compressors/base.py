"""What every compressor is: bytes from one part of one tensor's gradient, and back. Pure: no process group, no state."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Compressor:
    """A method, with its options.

    A *part* is a range of one tensor's flattened values that starts at a multiple of `block`, counted from the tensor's
    first value. What is encoded together never crosses a tensor's boundary, so the bits that a tensor is sent as do not
    depend on what lies beside it: tied and tensor-replicated weights stay equal.

    `seed` is a whole number that all ranks derive from (step, tensor), plus the index of the part's first block in the
    tensor: block b of a part uses seed + b, so that bits do not depend on the cuts. Methods without chance ignore it.
    """

    name: str
    block: int

    def wire_bytes(self, numel: int) -> int:
        """Bytes of the payload of a part of `numel` values: what `encode` fills, no more and no less."""
        raise NotImplementedError

    def contraction(self, numel: int) -> float:
        """A bound b < 1 with E||C(x) - x||^2 <= b ||x||^2 for every part x of `numel` values: 1 - delta of the analyses
        of error feedback (https://arxiv.org/abs/1901.09847)."""
        raise NotImplementedError

    def encode(
        self,
        gradient: Tensor,
        payload: Tensor,
        *,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
        error: Tensor | None = None,
        seed: int = 0,
    ) -> bool:
        """payload <- C(x) and error <- x - decode(payload) for x = gradient + multiplier * residual, in one pass.

        Args:
            gradient, residual, error: fp32 [n], contiguous; `residual` and `error` are different memory.
            payload: uint8 [wire_bytes(n)], contiguous.

        Returns:
            Whether all of x is finite. If not, every block with such values decodes to NaNs (a sparse one where it sends
            values), all others as ever, and `error` means nothing.
        """
        raise NotImplementedError

    def decode(self, payload: Tensor, out: Tensor, *, add: bool = False, last: bool = False, seed: int = 0) -> None:
        """out <- C(x), or out <- out + C(x) with `add`; payload uint8 [wire_bytes(n)], out fp32 [n].

        `last`: nothing reads `out` soon, so that it need not pass through the caches.
        """
        raise NotImplementedError

    def sum(self, payloads: Sequence[Tensor], out: Tensor, *, seed: int = 0) -> None:
        """out <- the sum of what `payloads` decode to, added in their order; nothing reads it soon."""
        for number, one in enumerate(payloads):
            self.decode(one, out, add=number > 0, seed=seed)

    def recode(
        self,
        payloads: Sequence[Tensor],
        payload: Tensor,
        values: Tensor,
        *,
        residual: Tensor | None = None,
        multiplier: float = 1.0,
        error: Tensor | None = None,
        seed: int = 0,
    ) -> bool:
        """As `encode`, of the sum of what `payloads` decode to, in their order; `values`, fp32 [n], means nothing after."""
        Compressor.sum(self, payloads, values, seed=seed)
        return self.encode(values, payload, residual=residual, multiplier=multiplier, error=error, seed=seed)

    def compress(self, tensor: Tensor, seed: int = 0) -> Tensor:
        """The payload of a part: fp32 [n] -> uint8 [wire_bytes(n)]. ValueError where it is not finite."""
        payload = torch.empty(self.wire_bytes(tensor.numel()), dtype=torch.uint8, device=tensor.device)
        if not self.encode(tensor, payload, seed=seed):
            raise ValueError(f"{self.name} cannot compress infinities or NaN")
        return payload

    def decompress(self, payload: Tensor, numel: int, seed: int = 0) -> Tensor:
        """uint8 [wire_bytes(numel)] -> fp32 [numel]."""
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.decode(payload, out, seed=seed)
        return out
