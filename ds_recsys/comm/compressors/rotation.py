"""A randomised Hadamard rotation of blocks of 256 values, in torch, and its inverse from codes."""

import torch
from torch import Tensor

LIMIT = 2.0**118  # of a rotated value: below it no sum of the way back overflows
_SIGNS = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)  # the first bits of pi


def rotate(x: Tensor) -> Tensor:
    """fp32 [B, 256] -> [B, 256]: H D x / 16, with D the signs; the order of the result is `_hadamard`'s."""
    return _hadamard(x * (_signs(x.device) * 0.0625))


def rotate_back(codes: Tensor, scale: Tensor) -> Tensor:
    """The inverse for scale * codes: int8 [B, 256], fp32 [B, 1]. Sums of codes are exact, so no order of adding matters."""
    return _hadamard(codes.float()) * (scale * 0.0625) * _signs(codes.device)


def _signs(device: torch.device) -> Tensor:
    places = torch.arange(256, device=device)
    # Masked shifts of small constants, not a table on the host: nothing is copied to the device.
    words = torch.zeros_like(places)
    for index, word in enumerate(_SIGNS):
        words.masked_fill_(places // 64 == index, word - (1 << 64) if word >> 63 else word)
    return 1.0 - 2.0 * ((words >> places % 64) & 1)


def _hadamard(values: Tensor) -> Tensor:
    """The transform of each row as a 16 x 16 matrix M: F (F M)^T, F being the 16-point transform of the columns."""
    turned = _columns(values).view(-1, 16, 16).transpose(1, 2).reshape(-1, 256)
    return _columns(turned)


def _columns(values: Tensor) -> Tensor:
    for stride in (128, 64, 32, 16):
        first, second = values.view(-1, 128 // stride, 2, stride).unbind(2)
        values = torch.stack((first + second, first - second), dim=2)
    return values.view(-1, 256)
