"""One bit per value and one fp32 scale per block of 1024 values (https://arxiv.org/abs/1901.09847)."""

import torch
import torch.nn.functional as F

from ds_recsys.comm.compressors.blocks import TINY, DenseBlockCompressor, from_bytes, to_bytes


class Sign(DenseBlockCompressor):
    """x -> sign(x) * mean |x| of the block: wire_bytes(n) = ceil(n / 8) + 4 ceil(n / 1024).

    A row is the scale, then the bits, 1 for values with the sign bit set: bit b of byte j of a block of m values is of
    value j + b * ceil(m / 8). There is no code for zero: zeros of a block that has other values are sent as the scale.
    Blocks with max |x| < 2^-120 are sent as zero (scale 0), and all of x stays in the error; the contraction leaves
    them aside.
    """

    name = kernel = "sign"
    block = 1024

    def row_bytes(self, length):
        return 4 + (length + 7) // 8

    def contraction(self, numel):
        """1 - 1/m, m = min(numel, 1024): ||C(x) - x||^2 = ||x||_2^2 - ||x||_1^2 / m, and ||x||_1 >= ||x||_2.

        Rounding in fp32 adds 2^-16.
        """
        return 1 - 1 / max(1, min(numel, self.block)) + 2.0**-16

    def _encode_rows(self, x, rows, error, seed):
        length = x.shape[1]
        magnitudes = x.abs()
        top = magnitudes.amax(1, keepdim=True)
        sums = F.pad(magnitudes * (1 / self.block), (0, self.block - length))
        while sums.shape[1] > 1:  # this order of summing is part of the format
            first, second = sums.chunk(2, dim=1)
            sums = first + second
        scale = (sums * (self.block / length)).clamp_max_(torch.finfo(torch.float32).max).masked_fill_(top < TINY, 0.0)
        negative = torch.signbit(x)
        planes = F.pad(negative, (0, -length % 8)).view(len(x), 8, -1).to(torch.uint8)
        bits = planes[:, 0]
        for plane in range(1, 8):
            bits = bits | planes[:, plane] << plane
        rows[:, :4] = to_bytes(scale)
        rows[:, 4:] = bits
        if error is not None:
            torch.sub(x, torch.where(negative, -scale, scale), out=error)
        return ~(top < torch.inf).flatten()

    def _decode_rows(self, rows, length):
        scale, bits = from_bytes(rows[:, :4], torch.float32), rows[:, 4:]
        negative = torch.stack([(bits >> plane) & 1 for plane in range(8)], dim=1).view(len(rows), -1)[:, :length]
        return torch.where(negative.bool(), -scale, scale)
