"""Histories cut into training windows, kept on disk and mapped into memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.table import MemoryMappedTable
from filelock import FileLock

from ds_recsys.data.interactions import Interactions, digest_of
from ds_recsys.data.splits import Split
from ds_recsys.errors import UserError

# Part of the cache key: raise it whenever the same inputs would give different windows.
FORMAT_VERSION = 2
FEATURES = Features(
    {"user": Value("int32"), "first": Value("int64"), "context": Value("int32"), "items": List(Value("int32"))}
)


def build_windows(
    interactions: Interactions,
    split: Split,
    *,
    max_length: int,
    stride: int | None = None,
    recent_only: bool = False,
    cache_dir: str | Path,
) -> Dataset:
    """The training windows of a split as a memory-mapped data set, in the order of users, newest window first.

    A row is `user` (int32), `items` (2 to max_length + 1 model indices, oldest first), `first` (int64, where its oldest
    item stands in `Interactions.sequence`) and `context` (int32). The inputs are items[:-1], the labels items[1:], and
    the first `context` labels are not supervised.

    stride=None: the windows of a user meet at one item, the last label of the older and the first input of the newer;
        context is 0. The newest window is full and the oldest takes what is left.
    stride=s < max_length: a window starts every s items; it supervises only its s newest labels, the others are left
        context. Every supervised position then sees at least max_length - s items before it, at max_length / s times
        the cost.
    In both cases every training position but the first of a user, which has no history, is supervised exactly once.
    recent_only: only the newest window of each user, all of it supervised, as SASRec trains.

    The file in `cache_dir` is named by the content of log and split and by these parameters. It is built once, by
    whichever process takes the lock first, and appears whole or not at all; all others map the same bytes.

    UserError: a length or stride that makes no sense, or no user with two training interactions.
    """
    if max_length < 1 or (stride is not None and not 1 <= stride <= max_length):
        raise UserError(f"max_length={max_length} must be at least 1 and stride={stride} between 1 and max_length")
    if recent_only and stride is not None:
        raise UserError(f"stride={stride} has no meaning with recent_only: there is one window a user")
    stride = stride or max_length
    key = digest_of(
        FORMAT_VERSION, interactions.content_hash, split.hash, max_length, stride, int(recent_only)
    ).hexdigest()
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"windows-{key}.arrow"
    if not path.exists():
        with FileLock(folder / f"windows-{key}.lock"):
            if not path.exists():
                _write(_window_table(interactions, split, max_length, stride, recent_only), path)
    try:
        return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=key)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: the cached windows are damaged ({error}); delete the file and run again") from error


def _window_table(x: Interactions, split: Split, max_length: int, stride: int, recent_only: bool) -> pa.Table:
    starts, targets = x.offsets[:-1], split.train_stop - x.offsets[:-1] - 1  # targets: supervised positions of a user
    windows = np.where(targets > 0, 1 + np.maximum(0, -(-(targets - max_length) // stride)), 0)
    if recent_only:
        windows = np.minimum(windows, 1)
    if not windows.any():
        raise UserError(f"{x.report.source}: no user has two training interactions, there is nothing to learn from")
    user = np.repeat(np.arange(x.num_users), windows)
    newer = np.arange(len(user)) - np.repeat(np.cumsum(windows) - windows, windows)  # how many newer ones the user has
    last = split.train_stop[user] - 1 - newer * stride
    first = np.maximum(starts[user], last - max_length)
    oldest = np.zeros(len(user), dtype=bool)
    oldest[np.cumsum(windows)[windows > 0] - 1] = True
    context = np.where(oldest, 0, max_length - stride)
    lengths = last - first + 1
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    if offsets[-1] >= 2**31:
        raise UserError(f"{x.report.source}: {offsets[-1]:,} tokens in windows, more than 2^31; take a larger stride")
    tokens = np.empty(offsets[-1], dtype=np.int32)
    for begin in range(0, len(user), 1 << 16):  # in pieces: the index below takes 8 bytes a token
        end = min(begin + (1 << 16), len(user))
        low, high = offsets[begin], offsets[end]
        source = np.arange(low, high) + np.repeat(first[begin:end] - offsets[begin:end], lengths[begin:end])
        tokens[low:high] = x.sequence[source]
    items = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(tokens))
    columns = [pa.array(user.astype(np.int32)), pa.array(first), pa.array(context.astype(np.int32)), items]
    return pa.table(columns, schema=FEATURES.arrow_schema)


def _write(table: pa.Table, path: Path) -> None:
    """One record batch in Arrow's stream format, so that each column maps as one array; in place only when whole."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
