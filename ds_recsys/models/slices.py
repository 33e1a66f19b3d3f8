"""Names of rows of a parameter: `lm_head.weight[0:500]`. A split head's layers hold those, under HF's name and their place.

So whoever reads a checkpoint or gathers an export can put rows together again without knowing how the head was split.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ds_recsys.errors import UserError

_SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]")


def sliced(name: str, start: int, stop: int) -> str:
    """The name of rows start .. stop - 1 of parameter `name`."""
    return f"{name}[{start}:{stop}]"


def parse(name: str) -> tuple[str, tuple[int, int] | None]:
    """(HF name, (start, stop)), with None for the whole parameter."""
    match = _SLICE.fullmatch(name)
    return (match[1], (int(match[2]), int(match[3]))) if match else (name, None)


def overlaps(theirs: str, rows: int, own: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, slice, slice]]:
    """Which of the `own` rows tensor `theirs` of `rows` rows holds too: (own name, rows of own, rows of theirs).

    Args:
        own: name -> the rows (start, stop) of the whole parameter that it stands for.
    """
    base, place = parse(theirs)
    start, stop = place or (0, rows)
    for name, (first, last) in own.items():
        low, high = max(start, first), min(stop, last)
        if parse(name)[0] == base and low < high:
            yield name, slice(low - first, high - first), slice(low - start, high - start)


def joined(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HF name -> whole tensor, from tensors named by their rows; others stay as they are.

    Raises:
        UserError: rows are missing.
    """
    whole = {name: tensor for name, tensor in parts.items() if parse(name)[1] is None}
    for base in dict.fromkeys(parse(name)[0] for name in parts if name not in whole):
        rows = sorted(((parse(n)[1], t) for n, t in parts.items() if parse(n)[0] == base), key=lambda row: row[0])
        whole[base] = torch.cat([tensor for _, tensor in rows])
        ends = [0, *(stop for (_, stop), _ in rows)]
        if [start for (start, _), _ in rows] != ends[:-1]:
            raise UserError(f"rows of {base!r} are missing: there are {', '.join(str(place) for place, _ in rows)}")
    return whole
