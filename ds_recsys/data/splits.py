"""Which part of each history trains, validates and tests."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ds_recsys.data.interactions import Interactions, digest_of
from ds_recsys.errors import UserError

Which = Literal["valid", "test"]


@dataclass(frozen=True, eq=False)
class Split:
    """Absolute positions in `Interactions.sequence`, int64 [U]: offsets[u] <= train_stop <= valid_stop <= test_stop.

    User u trains on [offsets[u], train_stop[u]). Its validation target is sequence[train_stop[u]] if valid_stop[u] >
    train_stop[u], its test target sequence[valid_stop[u]] if test_stop[u] > valid_stop[u]; the history of a target is
    everything of the user before it, so the test history includes the validation item. A target without any history
    cannot be predicted from one and is not evaluated: `targets` leaves it out.
    """

    protocol: str
    offsets: np.ndarray
    train_stop: np.ndarray
    valid_stop: np.ndarray
    test_stop: np.ndarray

    def targets(self, which: Which) -> tuple[np.ndarray, np.ndarray]:
        """(users, positions), int64 [n] each: the users evaluated and where in `sequence` their target stands."""
        starts, stops = {"valid": (self.train_stop, self.valid_stop), "test": (self.valid_stop, self.test_stop)}[which]
        users = np.flatnonzero((stops > starts) & (starts > self.offsets[:-1]))
        return users, starts[users]

    @cached_property
    def hash(self) -> str:
        """32 hex digits of the positions: two splits with the same hash train and test on the same positions."""
        return digest_of(self.offsets, self.train_stop, self.valid_stop, self.test_stop).hexdigest()

    def _count(self, which: Which) -> int:
        return len(self.targets(which)[0])

    def describe(self) -> str:
        """The protocol in one line, with sizes and the hash, as it stands over every table of results."""
        train, valid, test = int((self.train_stop - self.offsets[:-1]).sum()), *map(self._count, ("valid", "test"))
        return (
            f"{self.protocol}, ties in time keep file order: {train:,} training interactions, {valid:,} validation and "
            f"{test:,} test targets (split {self.hash[:12]})"
        )


def leave_one_out(interactions: Interactions) -> Split:
    """The last interaction of every user tests, the one before it validates, the rest train.

    A user with fewer than three interactions only trains.
    """
    starts, stops = interactions.offsets[:-1], interactions.offsets[1:]
    held = np.where(stops - starts >= 3, 1, 0)
    return Split("leave-one-out", interactions.offsets, stops - 2 * held, stops - held, stops)


def global_time(interactions: Interactions, *, valid_fraction: float = 0.1, test_fraction: float = 0.1) -> Split:
    """Two moments split all users alike: the newest `test_fraction` of all interactions test, the `valid_fraction`
    before them validate, the older ones train, so nothing is learned from another user's future.

    A moment never falls between equal timestamps: those interactions go to the later part together. The target of a
    user is the first interaction in the part. UserError without timestamps, or when a part is empty.
    """
    times = interactions.timestamps
    if times is None:
        raise UserError(f"{interactions.report.source}: a split by global time needs timestamps; use leave-one-out")
    if not (0 < valid_fraction < 1 and 0 < test_fraction < 1 and valid_fraction + test_fraction < 1):
        raise UserError(
            f"valid_fraction={valid_fraction} and test_fraction={test_fraction} must leave a part to train on"
        )
    newest = 1 - np.array([valid_fraction + test_fraction, test_fraction])
    ranks = np.minimum(np.round(len(times) * newest).astype(int), len(times) - 1)
    valid_from, test_from = np.partition(times, ranks)[ranks]
    starts, stops = interactions.offsets[:-1], interactions.offsets[1:]
    train_stop = starts + np.add.reduceat(times < valid_from, starts, dtype=np.int64)
    valid_stop = starts + np.add.reduceat(times < test_from, starts, dtype=np.int64)
    split = Split(
        f"global time (validation from {valid_from}, test from {test_from})",
        interactions.offsets, train_stop, valid_stop, stops.copy(),
    )  # fmt: skip
    for part, size in (
        ("to train on", int((train_stop - starts).sum())),
        ("to validate on", len(split.targets("valid")[0])),
        ("to test on", len(split.targets("test")[0])),
    ):
        if not size:
            raise UserError(f"{interactions.report.source}: the split by global time leaves nothing {part}; "
                            f"change valid_fraction={valid_fraction} or test_fraction={test_fraction}")  # fmt: skip
    return split


def train_positions(interactions: Interactions, split: Split) -> np.ndarray:
    """int64: the places in `sequence` of all training interactions."""
    lengths = split.train_stop - split.offsets[:-1]
    starts = np.repeat(split.offsets[:-1] - (np.cumsum(lengths) - lengths), lengths)
    return starts + np.arange(len(starts))


def train_counts(interactions: Interactions, split: Split) -> np.ndarray:
    """int64 [I + 1]: how often each item occurs in the training part; 0 for padding."""
    return np.bincount(
        interactions.sequence[train_positions(interactions, split)], minlength=interactions.num_items + 1
    )
