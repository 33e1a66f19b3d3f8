"""The values of largest magnitude, with their positions; the values may be rounded or quantised."""

import math

import torch
from torch import Tensor

from ds_recsys.comm.compressors.blocks import BlockCompressor, from_bytes, to_bytes
from ds_recsys.comm.compressors.dense import BFLOAT16_CONTRACTION, from_bfloat16, to_bfloat16
from ds_recsys.comm.compressors.quantise import Int8, codes_of, quantiser_contraction, scale_of

_VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
_POSITION_BITS = 14


class SparseCompressor(BlockCompressor):
    """Sends k = ceil(ratio * m) values of every block of m <= 16384.

    Raises:
        ValueError: a ratio that is not above 0 and at most 1.
    """

    block = 1 << _POSITION_BITS

    def __init__(self, ratio: float = 0.01):
        if not 0 < ratio <= 1:
            raise ValueError(f"{self.name}: ratio {ratio} is not above 0 and at most 1")
        self.ratio = ratio

    def kept(self, length: int) -> int:
        """k of a block of `length` values."""
        return min(length, math.ceil(self.ratio * length))

    def kernel_options(self, numel):
        return self.kept(self.block), self.kept(numel % self.block)

    def _lengths(self, numel: int) -> set[int]:
        """The lengths that the blocks of a part have."""
        return {length for length in (min(numel, self.block), numel % self.block) if length}


class TopK(SparseCompressor):
    """Exactly the k largest magnitudes of a block; of equal ones those that come first.

    A row is a scale (int8 values only, fp32), k values ("fp32", "bf16" or "int8" as by the compressors of these names,
    but one int8 scale for the whole row), then k positions in the block, rising, uint16. wire_bytes(n) = sum over blocks
    of k (2 + v), v = 4, 2 or 1, and 4 more for int8. int8: blocks with max |x| < 2^-120 are sent as zeros (scale 0),
    and all of x stays in the error; the contraction leaves them aside.

    Top-k with error feedback: https://arxiv.org/abs/1809.07599.

    Raises:
        ValueError: `values` is none of these; see SparseCompressor.
    """

    name = "topk"

    def __init__(self, ratio: float = 0.01, values: str = "fp32"):
        if values not in _VALUE_BYTES:
            raise ValueError(f'topk: values "{values}" is none of {", ".join(_VALUE_BYTES)}')
        super().__init__(ratio)
        self.values = values
        self.kernel = f"topk_{values}"
        self._head = 4 if values == "int8" else 0

    def row_bytes(self, length):
        return self._head + self.kept(length) * (_VALUE_BYTES[self.values] + 2)

    def contraction(self, numel):
        """1 - (k / m)(1 - q) in the block where that is most, q being the contraction of the values' own rounding.

        The k largest hold at least k / m of ||x||^2, and q of what they hold stays behind.
        """
        return max(
            (1 - self.kept(m) / m * (1 - self._of_values(self.kept(m))) for m in self._lengths(numel)), default=0.0
        )

    def _of_values(self, k: int) -> float:
        return {"fp32": 0.0, "bf16": BFLOAT16_CONTRACTION, "int8": quantiser_contraction(k, Int8.levels)}[self.values]

    def _encode_rows(self, x, rows, error, seed):
        k = self.kept(x.shape[1])
        magnitude = x.view(torch.int32) & 0x7FFFFFFF
        # Keys that differ also where magnitudes are equal, the first one's being larger: one selection, exact, no sort.
        place = torch.arange(self.block - 1, self.block - 1 - x.shape[1], -1, device=x.device)
        chosen = ((magnitude.long() << _POSITION_BITS) | place).topk(k, dim=1, sorted=False).values
        position = (self.block - 1 - (chosen & (self.block - 1))).sort(dim=1).values
        value = x.gather(1, position)
        sent = self._put_values(value, rows)
        rows[:, -2 * k :] = to_bytes(position.to(torch.int16))
        if error is not None:
            error.copy_(x).scatter_(1, position, value - sent)
        return magnitude.amax(1) >= 0x7F800000

    def _put_values(self, value: Tensor, rows: Tensor) -> Tensor:
        """fp32 [B, k] into the front of the rows; what they decode to."""
        k = value.shape[1]
        if self.values == "fp32":
            rows[:, : 4 * k] = to_bytes(value)
            return value
        if self.values == "bf16":
            codes = to_bfloat16(value)
            rows[:, : 2 * k] = to_bytes(codes)
            return from_bfloat16(codes)
        scale = scale_of(value.abs().amax(1, keepdim=True), Int8.levels)
        codes = codes_of(value, scale)
        rows[:, :4], rows[:, 4 : 4 + k] = to_bytes(scale), to_bytes(codes)
        return codes * scale

    def _get_values(self, rows: Tensor, k: int) -> Tensor:
        if self.values == "fp32":
            return from_bytes(rows[:, : 4 * k], torch.float32)
        if self.values == "bf16":
            return from_bfloat16(from_bytes(rows[:, : 2 * k], torch.int16))
        return from_bytes(rows[:, 4 : 4 + k], torch.int8) * from_bytes(rows[:, :4], torch.float32)

    def _decode_chunk(self, rows, out, add, seed):
        k = self.kept(out.shape[1])
        position = from_bytes(rows[:, -2 * k :], torch.int16).long()
        put(out, position, self._get_values(rows, k), add)

    def _not_finite(self, length):
        k = self.kept(length)
        row = torch.zeros(1, self.row_bytes(length), dtype=torch.uint8)
        if self.values == "int8":
            row[:, :4] = to_bytes(torch.tensor([[torch.nan]]))
        else:
            dtype = torch.float32 if self.values == "fp32" else torch.bfloat16
            row[:, : k * dtype.itemsize] = to_bytes(torch.full((1, k), torch.nan, dtype=dtype))
        row[:, -2 * k :] = to_bytes(torch.arange(k, dtype=torch.int16)[None])
        return row[0]


def put(out: Tensor, position: Tensor, values: Tensor, add: bool) -> None:
    """out [B, m] with values [B, k] at, or added at, int64 [B, k] positions; without `add`, zero elsewhere."""
    out.scatter_add_(1, position, values) if add else out.zero_().scatter_(1, position, values)
