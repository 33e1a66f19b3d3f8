"""Values as they are (fp32), or rounded to bf16."""

import torch
from torch import Tensor

from ds_recsys.comm.compressors.base import Compressor
from ds_recsys.comm.compressors.blocks import DenseBlockCompressor, from_bytes, to_bytes

BFLOAT16_CONTRACTION = 2.0**-16


class Float32(Compressor):
    """4 bytes a value, lossless: wire_bytes(n) = 4n, contraction 0. What vectors and small tensors are sent as."""

    name = "fp32"
    block = 1

    def wire_bytes(self, numel):
        return 4 * numel

    def contraction(self, numel):
        return 0.0

    def encode(self, gradient, payload, *, residual=None, multiplier=1.0, error=None, seed=0):
        values = payload.view(torch.float32)
        values.copy_(gradient)
        if residual is not None:
            values.add_(residual * multiplier)
        if error is not None:
            error.zero_()
        return bool(torch.isfinite(values).all())

    def decode(self, payload, out, *, add=False, last=False, seed=0):
        values = payload.view(torch.float32)
        out.add_(values) if add else out.copy_(values)


class BFloat16(DenseBlockCompressor):
    """Rounded to bf16, half to even: wire_bytes(n) = 2n. What would round to infinity is sent as the largest bf16, about
    3.39e38; infinities and NaN as NaN."""

    name = kernel = "bf16"
    block = 1

    def row_bytes(self, length):
        return 2 * length

    def contraction(self, numel):
        """2^-16: bf16 has 8 significant bits, so |C(x) - x| <= 2^-8 |x|, for |x| from 2^-126; smaller are left aside."""
        return BFLOAT16_CONTRACTION

    def _encode_rows(self, x, rows, error, seed):
        codes = to_bfloat16(x)
        rows[:] = to_bytes(codes)
        if error is not None:
            torch.sub(x, from_bfloat16(codes), out=error)
        return ~(x.abs() < torch.inf).flatten()

    def _decode_rows(self, rows, length):
        return from_bfloat16(from_bytes(rows, torch.int16))

    def _not_finite(self, length):
        return to_bytes(torch.tensor([[torch.nan]], dtype=torch.bfloat16))[0]


def to_bfloat16(x: Tensor) -> Tensor:
    """fp32 -> the bits of bf16, int16. In whole numbers: what hardware does with denormals differs."""
    bits = x.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    return (rounded.clamp_max_(0x7F7F) | ((bits >> 16) & 0x8000)).to(torch.int16)


def from_bfloat16(codes: Tensor) -> Tensor:
    """The bits of bf16, int16 -> fp32."""
    return (codes.int() << 16).view(torch.float32)
