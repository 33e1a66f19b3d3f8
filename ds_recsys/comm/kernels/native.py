"""The compiled encoders and decoders, or None where torch does the work."""

import ctypes
import logging
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from ds_recsys.comm.kernels.build import BuildError, build

logger = logging.getLogger("ds_recsys")

_ENCODE = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p),
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64),
)
_DECODE = (
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int),
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64),
)
_RECODE = (ctypes.c_void_p, ctypes.c_int64, *_ENCODE[1:])
_SUM = (
    *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    *(ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64),
)
_AHEAD = (*[ctypes.c_void_p] * 5, ctypes.c_int64, *[ctypes.c_float] * 6)
_ADD, _LAST = 1, 2
SUMMED = ("int8", "int4")
METHODS = ("bf16", "int8", "int4", "sign", "topk_fp32", "topk_bf16", "topk_int8", "randomk")


class Kernels:
    """Calls into the library; they release the GIL, run on the calling thread, and check nothing.

    Arguments are those of `Compressor.encode` and `decode`, as contiguous CPU tensors; `options` are the method's two
    whole numbers.
    """

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self._encode, self._decode, self._recode, self._sum = {}, {}, {}, {}
        for method in METHODS:
            self._encode[method] = encode = library[f"{method}_encode"]
            self._decode[method] = decode = library[f"{method}_decode"]
            encode.argtypes, encode.restype = _ENCODE, ctypes.c_int
            decode.argtypes, decode.restype = _DECODE, None
        for method in SUMMED:
            self._recode[method] = recode = library[f"{method}_recode"]
            self._sum[method] = summed = library[f"{method}_sum"]
            recode.argtypes, recode.restype = _RECODE, ctypes.c_int
            summed.argtypes, summed.restype = _SUM, None
        self._ahead = library["adamw_ahead"]
        self._ahead.argtypes, self._ahead.restype = _AHEAD, None

    def encode(
        self,
        method: str,
        options: tuple[int, int],
        gradient: Tensor,
        payload: Tensor,
        residual: Tensor | None,
        multiplier: float,
        error: Tensor | None,
        seed: int,
    ) -> bool:
        return bool(
            self._encode[method](
                gradient.data_ptr(),
                None if residual is None else residual.data_ptr(),
                multiplier,
                None if error is None else error.data_ptr(),
                payload.data_ptr(),
                gradient.numel(),
                *options,
                seed,
            )
        )

    def decode(
        self, method: str, options: tuple[int, int], payload: Tensor, out: Tensor, add: bool, last: bool, seed: int
    ) -> None:
        how = _ADD * add | _LAST * last
        self._decode[method](payload.data_ptr(), out.data_ptr(), out.numel(), how, *options, seed)

    def sum(self, method: str, options: tuple[int, int], payloads: Sequence[Tensor], out: Tensor, seed: int) -> None:
        self._sum[method](_pointers(payloads), len(payloads), out.data_ptr(), out.numel(), *options, seed)

    def recode(
        self,
        method: str,
        options: tuple[int, int],
        payloads: Sequence[Tensor],
        payload: Tensor,
        numel: int,
        residual: Tensor | None,
        multiplier: float,
        error: Tensor | None,
        seed: int,
    ) -> bool:
        return bool(
            self._recode[method](
                _pointers(payloads),
                len(payloads),
                None if residual is None else residual.data_ptr(),
                multiplier,
                None if error is None else error.data_ptr(),
                payload.data_ptr(),
                numel,
                *options,
                seed,
            )
        )

    def adamw_ahead(
        self,
        weight: Tensor,
        kept: Tensor,
        gradient: Tensor,
        mean: Tensor | None,
        square: Tensor | None,
        *numbers: float,
    ) -> None:
        """`kept` <- the weight, and that <- what AdamW makes of it; numbers: beta1, beta2, decay, rate, root, eps."""
        mean, square = (None if moment is None else moment.data_ptr() for moment in (mean, square))
        self._ahead(weight.data_ptr(), kept.data_ptr(), gradient.data_ptr(), mean, square, weight.numel(), *numbers)


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


@cache
def library() -> Kernels | None:
    """The kernels, compiled at the first use (1 to 2 s) into `$TORCH_EXTENSIONS_DIR` or ~/.cache/torch_extensions.

    None, with one line in the log, where they cannot be built or DS_RECSYS_KERNELS=0; asked once per process.
    """
    if os.environ.get("DS_RECSYS_KERNELS") == "0":
        logger.info("compression runs in torch: DS_RECSYS_KERNELS=0")
        return None
    try:
        return load(folder())
    except (BuildError, OSError) as error:
        logger.info(f"compression runs in torch, several times slower: {error}")
        return None


def folder() -> Path:
    """Where torch's own extensions are built, a folder of ours below it."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root).expanduser() / "ds_recsys"


def load(folder: Path) -> Kernels:
    """The kernels below `folder`. Raises BuildError, or OSError for a fresh build that cannot be loaded."""
    try:
        return Kernels(build(folder))
    except (OSError, AttributeError):  # a damaged file, as a full disk leaves it
        return Kernels(build(folder, again=True))
