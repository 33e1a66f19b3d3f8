"""Values at random positions that every rank can work out, so that only the values are sent."""

import math

import torch
from torch import Tensor

from ds_recsys.comm.compressors.blocks import from_bytes, to_bytes
from ds_recsys.comm.compressors.topk import SparseCompressor, put


class RandomK(SparseCompressor):
    """k values of a block of m, fp32 and unscaled (so biased; error feedback makes up for it, arXiv:1809.07599).

    Position j is (offset + j * stride) mod m with offset and stride, which is coprime to m, from `seed` + the index of
    the block in the part. wire_bytes(n) = sum over blocks of 4 k. A block that is not finite is sent as k NaNs.
    """

    name = kernel = "randomk"

    def row_bytes(self, length):
        return 4 * self.kept(length)

    def contraction(self, numel):
        """1 - k/m in the block where that is most: in expectation over seeds every value is sent with probability k/m."""
        return max((1 - self.kept(m) / m for m in self._lengths(numel)), default=0.0)

    def _encode_rows(self, x, rows, error, seed):
        position = self._positions(len(x), x.shape[1], seed, x.device)
        rows[:] = to_bytes(x.gather(1, position))
        if error is not None:
            error.copy_(x).scatter_(1, position, 0.0)
        return ~(x.abs().amax(1) < torch.inf)

    def _decode_chunk(self, rows, out, add, seed):
        position = self._positions(len(rows), out.shape[1], seed, out.device)
        put(out, position, from_bytes(rows, torch.float32), add)

    def _not_finite(self, length):
        return to_bytes(torch.full((1, self.kept(length)), torch.nan))[0]

    def _positions(self, blocks: int, length: int, seed: int, device: torch.device) -> Tensor:
        """int64 [blocks, k]."""
        if length == self.block:  # a power of two: coprime to it is what is odd
            hashes = _splitmix(torch.arange(blocks, device=device) + _signed(seed))
            offset, stride = _split(hashes, length)
            stride = stride | 1
        else:  # the last block alone; its numbers are made on the host, so that no device is waited for
            (offset,), (stride,) = (part.tolist() for part in _split(_splitmix(torch.tensor([_signed(seed)])), length))
            while math.gcd(stride, length) != 1:
                stride += 1
            offset, stride = (torch.full((1,), number, device=device) for number in (offset, stride))
        steps = torch.arange(self.kept(length), device=device)
        return (offset[:, None] + stride[:, None] * steps) % length


def _signed(seed: int) -> int:
    """The int64 with the low 64 bits of `seed`."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _split(hashes: Tensor, length: int) -> tuple[Tensor, Tensor]:
    return (hashes & 0xFFFFFFFF) % length, _shift(hashes, 32) % length


def _splitmix(state: Tensor) -> Tensor:
    """int64 standing for uint64: https://prng.di.unimi.it/splitmix64.c"""
    state = state + _signed(0x9E3779B97F4A7C15)
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift(state, 31)


def _shift(state: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in."""
    return (state >> places) & ((1 << (64 - places)) - 1)
