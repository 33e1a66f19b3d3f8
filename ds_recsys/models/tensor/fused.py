"""Query, key and value in one projection: which of its outputs a rank's heads need."""

from torch import nn

from ds_recsys.errors import UserError
from ds_recsys.models.shards import Ranges, Shard
from ds_recsys.models.tensor.split import HeadSplit

# `parts`: all queries, then all keys, then all values. `grouped`: for each key-value head its queries, key and value.
# `flags`: the first for multi-query attention and the second otherwise, as the module's attributes say.
LAYOUTS = ("qkv_parts", "qkv_grouped", "qkv_flags")


def layout_of(module: nn.Module, style: str) -> str:
    """`qkv_parts` or `qkv_grouped`."""
    if style != "qkv_flags":
        return style
    return (
        "qkv_parts" if module.multi_query and not getattr(module, "new_decoder_architecture", False) else "qkv_grouped"
    )


def fused_shard(layout: str, heads: HeadSplit, rows: int, path: str) -> Shard:
    """The `rows` outputs of a fused projection that each rank's heads read; ranks that share a key-value head overlap.

    Raises:
        UserError: the rows are not that many heads.
    """
    query, kv = heads.query.count, heads.kv.count
    if rows % (query + 2 * kv):
        raise UserError(f"{rows} rows of {path!r} are not {query} + 2 x {kv} heads; set tensor to 1")
    width = rows // (query + 2 * kv)
    cut = _parts if layout == "qkv_parts" else _grouped
    return Shard(0, tuple(cut(heads, rank, width) for rank in range(len(heads.kv.bounds))))


def _parts(heads: HeadSplit, rank: int, width: int) -> Ranges:
    (first, last), (kv_first, kv_last) = heads.query.bounds[rank], heads.kv.bounds[rank]
    keys = heads.query.count
    values = keys + heads.kv.count
    bounds = (first, last), (keys + kv_first, keys + kv_last), (values + kv_first, values + kv_last)
    return tuple((a * width, b * width) for a, b in bounds)


def _grouped(heads: HeadSplit, rank: int, width: int) -> Ranges:
    group = heads.query.count // heads.kv.count
    (first, last), (kv_first, kv_last) = heads.query.bounds[rank], heads.kv.bounds[rank]
    ranges = []
    for head in range(kv_first, kv_last):
        start = head * (group + 2)
        own = max(first, head * group) - head * group, min(last, (head + 1) * group) - head * group
        ranges += [(start + own[0], start + own[1]), (start + group, start + group + 2)]
    return tuple((a * width, b * width) for a, b in ranges)
