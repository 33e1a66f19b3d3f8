"""A log in memory: per user, the items in the order of time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ds_recsys.data.report import ReadReport
from ds_recsys.errors import UserError


@dataclass(frozen=True, eq=False)
class Interactions:
    """A log of U users, I items and N interactions.

    users: the U original user ids; items: the I original item ids. The model's index of `items[j]` is j + 1, because
        index 0 is padding. Both are in the order of first appearance in the log.
    titles: one text per item, or None when the log came without titles.
    offsets: int64 [U + 1]; user u owns the positions offsets[u] .. offsets[u + 1] of the arrays below (at least one).
    sequence: int32 [N], model indices 1..I, oldest first; interactions at the same time keep the order of the file.
        An interaction that occurs twice is kept twice.
    timestamps: [N] or None. int64 in the log's own unit, float64 if a value has a fraction; microseconds since 1970
        (int64) when the log holds dates. None means that the order of the file is the order of time.
    report: what reading met.
    """

    users: list[str]
    items: list[str]
    titles: list[str] | None
    offsets: np.ndarray
    sequence: np.ndarray
    timestamps: np.ndarray | None
    report: ReadReport = field(repr=False)

    @property
    def num_users(self) -> int:
        return len(self.users)

    @property
    def num_items(self) -> int:
        return len(self.items)

    def __len__(self) -> int:
        return len(self.sequence)

    def history(self, user: int) -> np.ndarray:
        """int32 [n]: the model indices of everything user number `user` did, oldest first (a view)."""
        return self.sequence[self.offsets[user] : self.offsets[user + 1]]

    def history_of(self, user_id: str) -> list[str]:
        """The original ids of everything the user with this original id did, oldest first; UserError if unknown."""
        if user_id not in self.users:
            raise UserError(f"{self.report.source}: no user {user_id!r}; its first user is {self.users[0]!r}")
        return [self.items[item - 1] for item in self.history(self.users.index(user_id))]

    @cached_property
    def content_hash(self) -> str:
        """32 hex digits that change whenever an id, the order of a history or a timestamp does; titles do not count."""
        digest = digest_of(self.offsets, self.sequence, np.zeros(0) if self.timestamps is None else self.timestamps)
        for ids in (self.users, self.items):
            for text in ids:
                raw = text.encode()
                digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.hexdigest()

    def describe(self) -> str:
        return f"{self.num_users:,} users, {self.num_items:,} items, {len(self):,} interactions"


def digest_of(*parts: np.ndarray | str | int) -> hashlib.blake2b:
    """A running BLAKE2b-128 over arrays (dtype and shape included), strings and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(f"{type(part).__name__}:{part};".encode())
    return digest


def from_columns(
    users: list[str],
    items: list[str],
    user_codes: list[np.ndarray],
    item_codes: list[np.ndarray],
    timestamps: list[np.ndarray] | None,
    report: ReadReport,
) -> Interactions:
    """Sort rows by (user, time, place in the file) and index them.

    users, items: the ids that the codes point to. user_codes, item_codes: int32 pieces of two columns of N rows, in
    file order; timestamps: their times. The three lists are emptied on the way, to hold pieces and whole of one column
    only.
    """
    user, item = _joined(user_codes), _joined(item_codes)
    times = None if timestamps is None else _joined(timestamps)
    # Both sorts are stable: rows that tie in time keep the order of the file, which decides leave-one-out's targets.
    order = np.argsort(user, kind="stable") if times is None else np.lexsort((times, user))
    counts = np.bincount(user, minlength=len(users))
    del user
    sequence = item[order]
    sequence += 1
    del item
    if times is not None:
        times = times[order]
    del order
    offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    return _compact(Interactions(users, items, None, offsets, sequence, times, report))


def k_core(interactions: Interactions, k: int) -> Interactions:
    """The largest part of the log in which every user and every item has at least `k` interactions.

    Users and items are dropped in turns until nothing changes; the order of what stays is kept. UserError if nothing
    stays.
    """
    if k <= 1:
        return interactions
    user = np.repeat(np.arange(interactions.num_users, dtype=np.int32), np.diff(interactions.offsets))
    keep = np.arange(len(interactions))
    while len(keep):
        users_kept, items_kept = user[keep], interactions.sequence[keep]
        good = (np.bincount(users_kept) >= k)[users_kept] & (np.bincount(items_kept) >= k)[items_kept]
        if good.all():
            break
        keep = keep[good]
    if not len(keep):
        raise UserError(
            f"{interactions.report.source}: no user or item is left with min_count={k}; take a smaller one "
            f"(the log has {interactions.describe()})"
        )
    counts = np.bincount(user[keep], minlength=interactions.num_users)
    offsets = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    times = None if interactions.timestamps is None else interactions.timestamps[keep]
    return _compact(replace(interactions, offsets=offsets, sequence=interactions.sequence[keep], timestamps=times))


def pad_catalogue(interactions: Interactions, num_items: int) -> Interactions:
    """The same log over a catalogue of at least `num_items` items: the new ones, `synthetic-1` on, nobody has met."""
    missing = num_items - interactions.num_items
    if missing <= 0:
        return interactions
    ids = [f"synthetic-{number}" for number in range(1, missing + 1)]
    titles = None if interactions.titles is None else [*interactions.titles, *ids]
    return replace(interactions, items=[*interactions.items, *ids], titles=titles)


def _compact(x: Interactions) -> Interactions:
    """Drop users and items that own no interaction, and renumber."""
    used = np.bincount(x.sequence, minlength=x.num_items + 1) > 0
    used[0] = True
    if not used.all():
        x = replace(
            x,
            items=_chosen(x.items, used[1:]),
            titles=None if x.titles is None else _chosen(x.titles, used[1:]),
            sequence=(np.cumsum(used, dtype=np.int32) - 1)[x.sequence].astype(np.int32),
        )
    active = np.diff(x.offsets) > 0
    if not active.all():
        x = replace(x, users=_chosen(x.users, active), offsets=np.concatenate((x.offsets[:-1][active], x.offsets[-1:])))
    return x


def _chosen(values: list[str], mask: Iterable[bool]) -> list[str]:
    return [value for value, kept in zip(values, mask, strict=True) if kept]


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole
