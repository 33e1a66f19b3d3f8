"""What compressors that work block by block share: the layout of the payload, the choice of C or torch, the loop in torch."""

import torch
from torch import Tensor

from ds_recsys.comm.compressors.base import Compressor
from ds_recsys.comm.kernels import native

TINY = 2.0**-120  # blocks with a smaller maximum are sent as zero: a reciprocal of their scale would overflow
_CPU_CHUNK = 1 << 16  # values: five such tensors stay in a core's cache
_DEVICE_CHUNK = 1 << 24  # bounds the memory


class BlockCompressor(Compressor):
    """A payload is one row of bytes per block, in order; only the last block may be shorter.

    On CPU the kernels of `ds_recsys.comm.kernels` encode and decode; otherwise, and where they cannot be built, the
    torch below, which gives the same bits. It runs on any device; there the one wait of `encode` is for what it returns.
    """

    kernel: str  # the C functions' prefix

    def row_bytes(self, length: int) -> int:
        """Bytes of the row of a block of `length` values, 1 <= length <= block."""
        raise NotImplementedError

    def kernel_options(self, numel: int) -> tuple[int, int]:
        """The C functions' `first` and `second`."""
        return 0, 0

    def _encode_rows(self, x: Tensor, rows: Tensor, error: Tensor | None, seed: int) -> Tensor:
        """x fp32 [B, length] (not to be changed) -> rows uint8 [B, row_bytes], error fp32 [B, length]; bool [B], which
        of x are not finite. `seed` is the first block's. Must not wait for the device."""
        raise NotImplementedError

    def _decode_chunk(self, rows: Tensor, out: Tensor, add: bool, seed: int) -> None:
        """out fp32 [B, length] <- the values of rows uint8 [B, row_bytes], or out + them. `seed` is the first block's."""
        raise NotImplementedError

    def _not_finite(self, length: int) -> Tensor:
        """uint8 [row_bytes], a row that decodes to NaN. Here: a NaN for a scale, then zeros."""
        row = torch.zeros(self.row_bytes(length), dtype=torch.uint8)
        row[:4] = to_bytes(torch.tensor([[torch.nan]]))[0]
        return row

    def wire_bytes(self, numel):
        blocks, rest = divmod(numel, self.block)
        return blocks * self.row_bytes(self.block) + (self.row_bytes(rest) if rest else 0)

    def encode(self, gradient, payload, *, residual=None, multiplier=1.0, error=None, seed=0):
        self._check(gradient, payload, residual, error)
        if gradient.numel() == 0:
            return True
        if gradient.device.type == "cpu" and (kernels := native.library()):
            options = self.kernel_options(gradient.numel())
            return kernels.encode(self.kernel, options, gradient, payload, residual, multiplier, error, seed)
        return self._encode_in_torch(gradient, payload, residual, multiplier, error, seed)

    def decode(self, payload, out, *, add=False, last=False, seed=0):
        self._check(out, payload)
        if out.numel() == 0:
            return
        if out.device.type == "cpu" and (kernels := native.library()):
            kernels.decode(self.kernel, self.kernel_options(out.numel()), payload, out, add, last, seed)
            return
        for start, stop, rows in self._chunks(payload, out):
            self._decode_chunk(rows, out[start:stop].view(len(rows), -1), add, seed + start // self.block)

    def _encode_in_torch(self, gradient, payload, residual, multiplier, error, seed) -> bool:
        outcomes = []
        for start, stop, rows in self._chunks(payload, gradient):
            x = gradient[start:stop]
            if residual is not None:  # two roundings, as in C: a fused multiply-add would give other bits
                x = x + residual[start:stop] * multiplier
            x = x.view(len(rows), -1)
            error_rows = None if error is None else error[start:stop].view_as(x)
            outcomes.append((self._encode_rows(x, rows, error_rows, seed + start // self.block), rows, x.shape[1]))
        if not torch.cat([bad for bad, _, _ in outcomes]).any():
            return True
        for bad, rows, length in outcomes:
            rows[bad] = self._not_finite(length).to(rows.device)
        return False

    def _chunks(self, payload: Tensor, values: Tensor):
        """(start, stop, their rows [B, bytes]) of a few blocks at a time, all of one length."""
        numel, size = values.numel(), _CPU_CHUNK if values.device.type == "cpu" else _DEVICE_CHUNK
        whole, size = numel - numel % self.block, size - size % self.block
        bounds = [(start, min(start + size, whole)) for start in range(0, whole, size)]
        for start, stop in bounds + [(whole, numel)] * (whole < numel):
            rows = max(1, (stop - start) // self.block)
            yield start, stop, payload[self.wire_bytes(start) : self.wire_bytes(stop)].view(rows, -1)

    def _check(self, values: Tensor, payload: Tensor, *others: Tensor | None) -> None:
        numel = values.numel()
        assert payload.dtype == torch.uint8 and payload.is_contiguous() and payload.numel() == self.wire_bytes(numel), (
            f"{self.name}: the payload of {numel} values is {self.wire_bytes(numel)} contiguous bytes"
        )
        for tensor in (values, *others):
            assert tensor is None or (
                tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.numel() == numel
            ), f"{self.name}: values are contiguous and fp32, {numel} of them"


class DenseBlockCompressor(BlockCompressor):
    """A row holds every value of its block."""

    def _decode_rows(self, rows: Tensor, length: int) -> Tensor:
        """uint8 [B, row_bytes] -> fp32 [B, length]."""
        raise NotImplementedError

    def _decode_chunk(self, rows, out, add, seed):
        values = self._decode_rows(rows, out.shape[1])
        out.add_(values) if add else out.copy_(values)


def to_bytes(values: Tensor) -> Tensor:
    """[B, n] of any dtype -> uint8 [B, n * itemsize]."""
    return values.contiguous().view(torch.uint8)


def from_bytes(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [B, n * itemsize], a slice at any address -> [B, n]."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
