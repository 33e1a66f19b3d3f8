"""Rows of a log, batch by batch, into compact integer columns."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ds_recsys.data.interactions import Interactions, from_columns
from ds_recsys.data.report import ReadReport
from ds_recsys.errors import UserError

# What pandas, SQL and JSON write where there is no value.
NO_ID = frozenset({"", "nan", "null", "none"})
EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


class RowBatch(NamedTuple):
    """Some consecutive rows of `file`: three columns as they were read, and the line (or row) number of each."""

    file: str
    lines: np.ndarray
    user: pa.Array
    item: pa.Array
    timestamp: pa.Array | None


class IdTable:
    """Ids to codes 0, 1, 2, ... in the order of first appearance."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def encode(self, column: pa.Array, what: str) -> np.ndarray:
        """int32 [n]: the code of each id, -1 where it is empty, null or NaN.

        Only the distinct values of the batch pass through Python.
        """
        try:
            encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
            raise UserError(f"{what} must be texts or numbers, the column's type is {column.type}") from error
        codes = [self._code(value) for value in encoded.dictionary.to_pylist()]
        codes.append(-1)
        where = encoded.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)
        return np.array(codes, dtype=np.int32)[where]

    def _code(self, value: object) -> int:
        text = id_text(value)
        return -1 if text is None else self._codes.setdefault(text, len(self._codes))

    def ids(self) -> list[str]:
        return list(self._codes)


def id_text(value: object) -> str | None:
    """The one spelling of an id whatever the file's type: 7, 7.0 and " 7 " are "7"; None for no id at all."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
        if "\ufffd" in value:
            return None
    text = value.strip() if isinstance(value, str) else str(value)
    return None if text.lower() in NO_ID else text


class RowEncoder:
    """Takes batches in file order, rejects bad rows into the report, and ends as `Interactions`."""

    def __init__(self, report: ReadReport, timed: bool) -> None:
        self.report = report
        self._users, self._items = IdTable(), IdTable()
        self._user_codes: list[np.ndarray] = []
        self._item_codes: list[np.ndarray] = []
        self._times: list[np.ndarray] | None = [] if timed else None
        self._dates: bool | None = None  # whether the log's times are dates; decided by its first good one

    def add(self, batch: RowBatch) -> None:
        if (batch.timestamp is None) != (self._times is None):
            raise UserError(f"{batch.file}: of the files read together, some have a column of times and some have not")
        self.report.rows += len(batch.lines)
        users = self._users.encode(batch.user, f"{batch.file}: user ids")
        items = self._items.encode(batch.item, f"{batch.file}: item ids")
        good = np.ones(len(batch.lines), dtype=bool)
        times = None
        checks = [("bad user id", users >= 0), ("bad item id", items >= 0)]
        if self._times is not None:
            times, readable, self._dates = parse_times(batch.timestamp, self._dates)
            checks.append(("bad timestamp", readable))
        for reason, fine in checks:
            bad = good & ~fine
            if bad.any():
                self.report.reject(reason, batch.file, batch.lines[bad], int(bad.sum()))
                good &= fine
        whole = good.all()
        self._user_codes.append(users if whole else users[good])
        self._item_codes.append(items if whole else items[good])
        if times is not None:
            self._times.append(times if whole else times[good])

    def finish(self, max_bad_fraction: float) -> Interactions:
        """The log, sorted; UserError when too many rows were bad. The encoder is empty afterwards."""
        self.report.check(max_bad_fraction)
        return from_columns(
            self._users.ids(), self._items.ids(), self._user_codes, self._item_codes, self._times, self.report
        )


def parse_times(column: pa.Array, dates: bool | None) -> tuple[np.ndarray, np.ndarray, bool | None]:
    """Times of one batch as numbers.

    column: integers, floats, dates, or any of them as text. dates: whether the log holds dates, None if not yet known.
    Returns (times [n]: int64, or float64 if one has a fraction; readable bool [n]; dates as now known). Dates become
    microseconds since 1970, UTC where no zone is given. A number among dates is unreadable, and a date among numbers.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        micros = pc.cast(column, pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
        return *_from_arrow(micros, pa.int64()), True
    if pa.types.is_integer(kind):
        return *_from_arrow(column, pa.int64()), False
    if pa.types.is_floating(kind):
        return *_whole(*_from_arrow(column, pa.float64())), False
    if (pa.types.is_string(kind) or pa.types.is_large_string(kind)) and not column.null_count:
        for target, holds_dates in ((pa.int64(), False), (pa.float64(), False),
                                    (pa.timestamp("us"), True), (pa.timestamp("us", "UTC"), True)):  # fmt: skip
            if dates is None or dates == holds_dates:
                try:
                    parsed = pc.cast(column, target)
                except pa.ArrowInvalid:
                    continue
                number = pa.int64() if holds_dates else target
                return *_whole(*_from_arrow(parsed, number)), holds_dates
    return _one_by_one(column, dates)


def _from_arrow(column: pa.Array, kind: pa.DataType) -> tuple[np.ndarray, np.ndarray]:
    readable = pc.is_valid(column).to_numpy(zero_copy_only=False)
    numbers = pc.cast(column, kind, safe=False).fill_null(0).to_numpy(zero_copy_only=False)
    return numbers, readable & _in_range(numbers)


def _in_range(numbers: np.ndarray) -> np.ndarray:
    """False for NaN, infinities and what is beyond 64 bits, whether it was read as an integer or as a float."""
    return np.abs(numbers) < 2.0**63 if numbers.dtype == np.float64 else np.ones(len(numbers), dtype=bool)


def _whole(numbers: np.ndarray, readable: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Floats that are all whole numbers as int64, so that 881250949.0 and 881250949 give the same log."""
    if numbers.dtype == np.float64:
        numbers = np.where(readable, numbers, 0.0)
        if (numbers == np.floor(numbers)).all() and (np.abs(numbers) < 2.0**53).all():
            numbers = numbers.astype(np.int64)
    return numbers, readable


def _one_by_one(column: pa.Array, dates: bool | None) -> tuple[np.ndarray, np.ndarray, bool | None]:
    """The slow way, for a batch that holds at least one unreadable time."""
    numbers: list[int | float] = []
    readable = np.zeros(len(column), dtype=bool)
    for row, value in enumerate(column.to_pylist()):
        number, is_date = _time(value)
        if number is not None and dates in (None, is_date):
            dates, readable[row] = is_date, True
            numbers.append(number)
        else:
            numbers.append(0)
    if any(isinstance(number, float) for number in numbers):
        return *_whole(np.array(numbers, dtype=np.float64), readable), dates
    return np.array(numbers, dtype=np.int64), readable, dates


def _time(value: object) -> tuple[int | float | None, bool]:
    """(number, whether it was a date); (None, False) when unreadable, not finite or beyond 64 bits."""
    text = str(value).strip()
    if "_" in text:  # Python reads 1_000 as a number; a log does not
        return None, False
    try:
        number = int(text)
        return (number, False) if abs(number) < 2**63 else (None, False)
    except ValueError:
        pass
    try:
        number = float(text)
        return (number, False) if abs(number) < 2**63 else (None, False)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None, False
    since = (date if date.tzinfo else date.replace(tzinfo=EPOCH.tzinfo)) - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds, True
