"""Payloads: the encoded parts of one owner one after another, and perhaps a checksum; how they are written and read."""

import hashlib
import zlib

import torch
from torch import Tensor

from ds_recsys.comm.layout import Part

_CHECKSUM_BYTES = 4


class ChecksumError(RuntimeError):
    """A payload is not what its sender sent."""


class Codec:
    """Writes and reads the payloads of one call on one flat buffer.

    Args:
        flat: fp32 [n]; the parts' values are read from it and written to it.
        feedback: an `ErrorFeedback`.
        step: what chance is derived from, with the tensor's name.
        checksum: whether a crc32 follows each payload.

    Attributes:
        finite: whether all values encoded so far were.
    """

    def __init__(self, flat: Tensor, feedback, step: int, checksum: bool = False):
        self.flat, self.feedback, self.step, self.checksum = flat, feedback, step, checksum
        self.finite = True
        self._seeds: dict[str, int] = {}
        self._shared: dict[tuple[str, int], Tensor] = {}  # encoded once, sent to several owners

    def message_bytes(self, payload_bytes: int) -> int:
        return payload_bytes + _CHECKSUM_BYTES if self.checksum and payload_bytes else payload_bytes

    def encode(self, parts: tuple[Part, ...], message: Tensor, residuals=None) -> None:
        """message <- the parts' values in `flat`; `residuals`: `feedback.worker` or `.server`."""
        place = 0
        for part in parts:
            payload = message[place : place + part.wire_bytes]
            if part.shared and (part.name, part.start) in self._shared:
                payload.copy_(self._shared[part.name, part.start])
            else:
                self._encode(part, payload, residuals)
            place += part.padded_bytes
        if self.checksum and place:
            message[place:].copy_(_crc(message[:place]))

    def _encode(self, part: Part, payload: Tensor, residuals) -> None:
        finite = part.compressor.encode(self._values(part), payload, **self._kept(part, residuals))
        self.finite = finite and self.finite
        if part.shared:
            self._shared[part.name, part.start] = payload.clone()

    def sum(self, parts: tuple[Part, ...], messages: list[Tensor], elsewhere: dict | None = None) -> None:
        """`flat` <- the sum of what `messages` hold of the parts, in their order. Shared parts go to `elsewhere[part]`."""
        place = 0
        for part in parts:
            payloads = [one[place : place + part.wire_bytes] for one in messages]
            out = elsewhere[part] if part.shared else self._values(part)
            part.compressor.sum(payloads, out, seed=self._seed(part))
            place += part.padded_bytes

    def recode(self, parts: tuple[Part, ...], messages: list[Tensor], message: Tensor, residuals=None) -> None:
        """message <- the sum of what `messages` hold of the parts, in their order; `flat` means nothing there afterwards."""
        place = 0
        for part in parts:
            payloads = [one[place : place + part.wire_bytes] for one in messages]
            payload = message[place : place + part.wire_bytes]
            kept = self._kept(part, residuals)
            self.finite = part.compressor.recode(payloads, payload, self._values(part), **kept) and self.finite
            place += part.padded_bytes
        if self.checksum and place:
            message[place:].copy_(_crc(message[:place]))

    def _kept(self, part: Part, residuals) -> dict:
        """What a part is encoded with beside its values."""
        residual, error = (None, None) if residuals is None or part.lossless else residuals(part)
        multiplier = self.feedback.multiplier
        return {"residual": residual, "multiplier": multiplier, "error": error, "seed": self._seed(part)}

    def decode(self, parts: tuple[Part, ...], message: Tensor, last: bool = False) -> None:
        """`flat` <- the values in `message`; `last`: they are not read again here."""
        place = 0
        for part in parts:
            payload = message[place : place + part.wire_bytes]
            part.compressor.decode(payload, self._values(part), last=last, seed=self._seed(part))
            place += part.padded_bytes

    def check(self, message: Tensor, sender: int, chunk: int) -> None:
        """Raises ChecksumError where `message` did not arrive as it was sent."""
        if self.checksum and message.numel():
            if not torch.equal(_crc(message[:-_CHECKSUM_BYTES]), message[-_CHECKSUM_BYTES:].cpu()):
                raise ChecksumError(f"chunk {chunk} from rank {sender} of the group is damaged: its crc32 differs")

    def _values(self, part: Part) -> Tensor:
        return self.flat[part.offset : part.offset + part.numel]

    def _seed(self, part: Part) -> int:
        """One for each block of each tensor: a part's blocks count on from it."""
        if part.name not in self._seeds:
            digest = hashlib.blake2b(f"{self.step}:{part.name}".encode(), digest_size=7).digest()
            self._seeds[part.name] = int.from_bytes(digest, "big") >> 4  # leaves room to count within 63 bits
        return self._seeds[part.name] + part.start // part.compressor.block


def _crc(payload: Tensor) -> Tensor:
    value = zlib.crc32(payload.cpu().numpy())
    return torch.frombuffer(bytearray(value.to_bytes(_CHECKSUM_BYTES, "little")), dtype=torch.uint8)


def all_finite(flat: Tensor, segments) -> bool:
    """Whether the values of `segments` are all finite."""
    return all(bool(torch.isfinite(flat[one.offset : one.offset + one.numel]).all()) for one in segments)
