"""What a reader met on its way: rows read, rows rejected and where."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from tqdm import tqdm

from ds_recsys.errors import UserError

EXAMPLES = 3


@dataclass
class ReadReport:
    """Counts of one read. `rows` counts every data row, good and bad; `examples` holds the first three places
    ("file:line", or "file:row" where the file has no lines) of each reason in `bad`."""

    source: str
    rows: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def bad_rows(self) -> int:
        return sum(self.bad.values())

    def reject(self, reason: str, file: str, lines: Iterable[int], count: int = 1) -> None:
        """Record `count` bad rows of `file`; `lines` are their line numbers in ascending order."""
        self.bad[reason] = self.bad.get(reason, 0) + count
        shown = self.examples.setdefault(reason, [])
        shown.extend(f"{file}:{line}" for line in islice(lines, EXAMPLES - len(shown)))

    def describe(self) -> str:
        """One line: rows read, and the bad ones by reason with their first places."""
        text = f"{self.source}: {self.rows:,} rows read"
        if self.bad:
            shown = {reason: ", ".join(places) for reason, places in self.examples.items()}
            reasons = "; ".join(f"{reason} {count:,} ({shown[reason]})" for reason, count in self.bad.items())
            text += f", {self.bad_rows:,} malformed and left out: {reasons}"
        return ". ".join([text, *self.notes])

    def check(self, max_bad_fraction: float) -> None:
        """Raise UserError when nothing usable was read, or more than `max_bad_fraction` of the rows are bad."""
        if self.rows == 0:
            raise UserError(f"{self.source}: no interactions in it (empty, or only a header)")
        if self.bad_rows == self.rows or self.bad_rows > max_bad_fraction * self.rows:
            raise UserError(
                f"{self.describe()}. That is {self.bad_rows / self.rows:.1%} of the rows, more than "
                f"max_bad_fraction={max_bad_fraction:g}: mend the rows, or raise the limit"
            )


def is_first_rank() -> bool:
    """True in a single process and on rank 0 of a launched job: the one that talks to the terminal."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(what: str, total: int | None, unit: str) -> tqdm:
    """A bar on rank 0 when stderr is a terminal, shown only once the work has lasted a second."""
    disable = None if is_first_rank() else True  # None: unless stderr is a terminal
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, delay=1.0, leave=False, disable=disable)
