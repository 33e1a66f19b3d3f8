"""Whole numbers of 8 or 4 bits with one fp32 scale per block of 256 values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_recsys.comm.compressors.blocks import TINY, DenseBlockCompressor, from_bytes, to_bytes
from ds_recsys.comm.compressors.rotation import LIMIT, rotate, rotate_back
from ds_recsys.comm.kernels import native


class Quantiser(DenseBlockCompressor):
    """x -> scale * round(x / scale), half to even, with scale = max |x| / levels over the block.

    A row is the scale, then the codes. Blocks with max |x| < 2^-120 are sent as zero (scale 0), and all of x stays in
    the error; the contraction leaves them aside.

    With `rotate` every whole block is first multiplied by random but fixed signs and the Hadamard matrix / 16
    (https://arxiv.org/abs/1611.00429), which spreads an outlier over the block; a last short block is not. All of the
    above then holds of the rotated values. Such a block counts as not finite if a rotated value reaches 2^118, as no
    values below 2^114 can.
    """

    block = 256
    levels: int

    def __init__(self, rotate: bool = False):
        self.rotate = rotate

    def contraction(self, numel):
        """t / (1 + t) with t = (m - 1) / (2 levels)^2, m = min(numel, 256).

        The maximum A is exact and every other error is at most e = A / (2 levels) and at most |x|, so ||C(x) - x||^2 is
        at most E = (m - 1) e^2 = t A^2 while ||x||^2 is at least A^2 + E. A rotation keeps both norms: the bound holds
        as it is, and is approached less often. Rounding in fp32 adds 2^-12 of it, and 2^-40.
        """
        return quantiser_contraction(min(numel, self.block), self.levels)

    def kernel_options(self, numel):
        return int(self.rotate), 0

    def sum(self, payloads, out, *, seed=0):
        """In one pass, where there are kernels."""
        if (kernels := self._kernels(payloads, out)) is None:
            return super().sum(payloads, out, seed=seed)
        return kernels.sum(self.kernel, self.kernel_options(out.numel()), payloads, out, seed)

    def recode(self, payloads, payload, values, *, residual=None, multiplier=1.0, error=None, seed=0):
        """In one pass, where there are kernels: the sum stays in a core's cache."""
        if (kernels := self._kernels(payloads, values)) is None:
            given = {"residual": residual, "multiplier": multiplier, "error": error, "seed": seed}
            return super().recode(payloads, payload, values, **given)
        self._check(values, payload, residual, error)
        options, numel = self.kernel_options(values.numel()), values.numel()
        return kernels.recode(self.kernel, options, payloads, payload, numel, residual, multiplier, error, seed)

    def _kernels(self, payloads, values: Tensor):
        """Those that take several payloads at once; None where torch has to."""
        for one in payloads:
            self._check(values, one)
        return native.library() if values.device.type == "cpu" and values.numel() else None

    def _encode_rows(self, x, rows, error, seed):
        rotated = self._rotated(x.shape[1])
        turned = rotate(x) if rotated else x
        top = turned.abs().amax(1, keepdim=True)
        scale = scale_of(top, self.levels)
        codes = codes_of(turned, scale)
        rows[:, :4] = to_bytes(scale)
        rows[:, 4:] = self._pack(codes)
        if error is not None:
            torch.sub(x, self._values(codes, scale), out=error)
        return ~(top < (LIMIT if rotated else torch.inf)).flatten()

    def _decode_rows(self, rows, length):
        return self._values(self._unpack(rows[:, 4:], length), from_bytes(rows[:, :4], torch.float32))

    def _rotated(self, length: int) -> bool:
        return self.rotate and length == self.block

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return rotate_back(codes, scale) if self._rotated(codes.shape[1]) else codes * scale

    def _pack(self, codes: Tensor) -> Tensor:
        """int8 [B, length] -> uint8 [B, bytes]."""
        raise NotImplementedError

    def _unpack(self, packed: Tensor, length: int) -> Tensor:
        raise NotImplementedError


class Int8(Quantiser):
    """Codes -127 to 127: wire_bytes(n) = n + 4 ceil(n / 256)."""

    name = kernel = "int8"
    levels = 127

    def row_bytes(self, length):
        return 4 + length

    def _pack(self, codes):
        return codes.view(torch.uint8)

    def _unpack(self, packed, length):
        return packed.view(torch.int8)


class Int4(Quantiser):
    """Codes -7 to 7, two per byte: wire_bytes(n) = ceil(n / 2) + 4 ceil(n / 256).

    Byte j of a block of m values holds code j in its low half and code j + ceil(m / 2) in its high half.
    """

    name = kernel = "int4"
    levels = 7

    def row_bytes(self, length):
        return 4 + (length + 1) // 2

    def _pack(self, codes):
        low, high = F.pad(codes, (0, codes.shape[1] % 2)).chunk(2, dim=1)
        return ((low & 15) | (high << 4)).view(torch.uint8)

    def _unpack(self, packed, length):
        packed = packed.view(torch.int8)
        return torch.cat(((packed << 4) >> 4, packed >> 4), dim=1)[:, :length]


def scale_of(top: Tensor, levels: int) -> Tensor:
    """fp32: the scale of blocks whose largest magnitude is `top`; 0 for tiny ones. levels * scale is finite for any top."""
    return (top * (1 / levels)).masked_fill_(top < TINY, 0.0)


def codes_of(x: Tensor, scale: Tensor) -> Tensor:
    """int8: x / scale by the reciprocal, rounded half to even; 0 where the scale is."""
    return (x * scale.reciprocal().masked_fill_(scale == 0, 0.0)).round_().to(torch.int8)


def quantiser_contraction(length: int, levels: int) -> float:
    t = max(0, length - 1) / (2 * levels) ** 2
    return t / (1 + t) * (1 + 2.0**-12) + 2.0**-40
