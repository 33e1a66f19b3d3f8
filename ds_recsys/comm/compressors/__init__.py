"""Compressors by name."""

from ds_recsys.comm.compressors.base import Compressor
from ds_recsys.comm.compressors.dense import BFloat16
from ds_recsys.comm.compressors.quantise import Int4, Int8
from ds_recsys.comm.compressors.randomk import RandomK
from ds_recsys.comm.compressors.sign import Sign
from ds_recsys.comm.compressors.topk import TopK

_METHODS = {
    "bf16": (BFloat16, ()),
    "int8": (Int8, ("rotate",)),
    "int4": (Int4, ("rotate",)),
    "sign": (Sign, ()),
    "topk": (TopK, ("ratio", "values")),
    "randomk": (RandomK, ("ratio",)),
}


def compressor(method: str, **options) -> Compressor:
    """The compressor `method`: bf16, int8, int4 (option rotate), sign, topk (ratio, values) or randomk (ratio).

    Raises:
        ValueError: an unknown method, an option that the method does not have, or a value that it refuses.
    """
    if method not in _METHODS:
        raise ValueError(f'compression method "{method}" is none of {", ".join(_METHODS)}')
    kind, known = _METHODS[method]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"compression method {method} has no option {', '.join(unknown)}")
    return kind(**options)
