"""Text logs as batches of rows: blocks of whole lines, parsed by pyarrow, line by line where a block has trouble.

A row is a line: a quoted field may not hold a line end. So every row has a line number, and one bad row spoils nothing
but itself. Memory is bounded by a few blocks whatever the size of the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.json as arrow_json

from ds_recsys.data.encode import RowBatch, id_text
from ds_recsys.data.formats import Layout, choose_columns
from ds_recsys.data.report import ReadReport, progress_bar
from ds_recsys.errors import UserError

BLOCK = 8 << 20
LONGEST_LINE = 64 << 20


def blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """(whole lines, each ending in a line feed; the number of the first line), without a byte order mark."""
    rest, line = b"", 1
    try:
        with path.open("rb") as raw, progress_bar(f"reading {path.name}", path.stat().st_size, "B") as bar:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            while chunk := stream.read(BLOCK):
                if line == 1 and not rest:
                    chunk = chunk.removeprefix(b"\xef\xbb\xbf")
                bar.update(raw.tell() - bar.n)
                cut = chunk.rfind(b"\n") + 1
                if cut:
                    block = rest + chunk[:cut]
                    yield block, line
                    rest, line = chunk[cut:], line + block.count(b"\n")
                elif len(rest) > LONGEST_LINE:
                    raise UserError(f"{path}:{line}: a line of more than {LONGEST_LINE >> 20} MB; is this a text file?")
                else:
                    rest += chunk
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read on after line {line}: {error}") from error
    if rest:
        yield rest + b"\n", line


def _lines(block: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    """(number, line without its end) of the lines of a block that are not blank."""
    for number, line in enumerate(io.BytesIO(block), first):
        line = line.rstrip(b"\r\n")
        if line.strip():
            yield number, line


# --- delimited ------------------------------------------------------------------------------------------------------


def read_delimited(path: Path, layout: Layout, report: ReadReport) -> Iterator[RowBatch]:
    """Batches of a delimited file, ids and times as text; rows that do not have `layout.width` fields are rejected."""
    wanted = [place for place in (layout.user, layout.item, layout.timestamp) if place is not None]
    for block, first in blocks(path):
        if first == 1 and layout.header:
            block, first = block[block.index(b"\n") + 1 :], 2
        if not block:
            continue
        parsed = _parse_block(block, first, layout, wanted, str(path), report)
        lines, columns = parsed or _parse_lines(block, first, layout, wanted, str(path), report)
        yield RowBatch(str(path), lines, columns[0], columns[1], columns[2] if len(columns) > 2 else None)


def _parse_block(
    block: bytes, first: int, layout: Layout, wanted: list[int], file: str, report: ReadReport
) -> tuple[np.ndarray, list[pa.Array]] | None:
    """(line numbers, wanted columns) of the rows with the right number of fields; the others are rejected.

    None, and nothing rejected, unless every line is one row of readable text.
    """
    if b"\r" in block and block.count(b"\r") != block.count(b"\r\n"):
        return None
    rows = block.count(b"\n")
    if layout.delimiter == "::":  # pyarrow takes one character
        if b"\t" in block:
            return None
        block = block.replace(b"::", b"\t")
    names = [str(place) for place in range(layout.width)]
    misshapen: list[arrow_csv.InvalidRow] = []
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(block),
            arrow_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            arrow_csv.ParseOptions(
                delimiter="\t" if layout.delimiter == "::" else layout.delimiter,
                quote_char='"' if layout.quoted else False,
                invalid_row_handler=lambda row: misshapen.append(row) or "skip",
            ),
            arrow_csv.ConvertOptions(
                include_columns=[names[place] for place in wanted],
                column_types={name: pa.string() for name in names},
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows + len(misshapen) != rows:  # blank lines, or a quote that swallowed line ends
        return None
    for row in misshapen:
        _reject(_misfit(row.actual_columns, layout), file, first + row.number - 1, report)
    lines = np.delete(np.arange(first, first + rows), [row.number - 1 for row in misshapen])
    return lines, [column.combine_chunks() for column in table.columns]


def _misfit(fields: int, layout: Layout) -> str:
    return "missing column" if fields < layout.width else "too many columns"


def _reject(reason: str, file: str, line: int, report: ReadReport) -> None:
    report.rows += 1
    report.reject(reason, file, [line])


def _parse_lines(
    block: bytes, first: int, layout: Layout, wanted: list[int], file: str, report: ReadReport
) -> tuple[np.ndarray, list[pa.Array]]:
    numbers: list[int] = []
    rows: list[list[str]] = []
    for number, line in _lines(block, first):
        fields = _fields(line.decode("utf-8", "surrogateescape"), layout)
        if fields is None:
            trouble = "quote not closed on its line"
        elif len(fields) != layout.width:
            trouble = _misfit(len(fields), layout)
        else:
            fields = [fields[place] for place in wanted]
            trouble = "" if _is_unicode("".join(fields)) else "bad UTF-8"
        if trouble:
            _reject(trouble, file, number, report)
        else:
            numbers.append(number)
            rows.append(fields)
    columns = zip(*rows, strict=True) if rows else [()] * len(wanted)
    return np.array(numbers, dtype=np.int64), [pa.array(column, pa.string()) for column in columns]


def _fields(text: str, layout: Layout) -> list[str] | None:
    if layout.quoted and '"' in text:
        try:
            return next(csv.reader([text], delimiter=layout.delimiter, strict=True))
        except csv.Error:
            return None
    return text.split(layout.delimiter)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- JSON lines -----------------------------------------------------------------------------------------------------


def read_json_lines(path: Path, columns: dict[str, str | None], report: ReadReport) -> Iterator[RowBatch]:
    """Batches of a file of one JSON object a line. `columns` as in `read_interactions`."""
    schema = None
    for block, first in blocks(path):
        if schema is None:
            roles, schema = _json_schema(path, block, columns)
        table = _parse_json_block(block, schema)
        if table is None:
            lines, values = _parse_json_lines(block, first, roles, str(path), report)
        else:
            lines = np.arange(first, first + table.num_rows)
            values = {role: table.column(name).combine_chunks() for role, name in roles.items() if name}
        yield RowBatch(str(path), lines, values["user"], values["item"], values.get("timestamp"))


def _json_schema(path: Path, block: bytes, columns: dict) -> tuple[dict[str, str | None], pa.Schema]:
    """Roles and their Arrow types, by the first line that is an object: pyarrow then reads only these fields."""
    for _, line in _lines(block, 1):
        if line.lstrip().startswith(b"["):
            raise UserError(f"{path}: a JSON array; one object a line is needed")
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            roles = choose_columns(list(row), ("user", "item", "timestamp"), columns, str(path))
            types = {int: pa.int64(), float: pa.float64()}
            names = [name for name in roles.values() if name]
            return roles, pa.schema([(name, types.get(type(row[name]), pa.string())) for name in names])
    raise UserError(f"{path}: none of its first lines is a JSON object")


def _parse_json_block(block: bytes, schema: pa.Schema) -> pa.Table | None:
    try:
        block.decode()
        table = arrow_json.read_json(
            pa.BufferReader(block),
            arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    return table if table.num_rows == block.count(b"\n") else None


def _parse_json_lines(
    block: bytes, first: int, roles: dict[str, str | None], file: str, report: ReadReport
) -> tuple[np.ndarray, dict[str, pa.Array]]:
    numbers: list[int] = []
    values: dict[str, list[str | None]] = {role: [] for role, name in roles.items() if name}
    for number, line in _lines(block, first):
        try:
            row = json.loads(line)
            trouble = "" if isinstance(row, dict) else "bad JSON"
        except UnicodeDecodeError:
            trouble = "bad UTF-8"
        except ValueError:
            trouble = "bad JSON"
        if not trouble and any(roles[role] not in row for role in values):
            trouble = "missing column"
        if trouble:
            _reject(trouble, file, number, report)
            continue
        numbers.append(number)
        for role, column in values.items():
            value = row[roles[role]]
            text = id_text(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None
            column.append(text if text is None or _is_unicode(text) else None)
    return np.array(numbers, dtype=np.int64), {role: pa.array(column, pa.string()) for role, column in values.items()}


# --- S3-Rec ---------------------------------------------------------------------------------------------------------


def read_item_lines(path: Path, report: ReadReport) -> Iterator[RowBatch]:
    """Batches of a file of lines 'user item item ...', oldest first, as in https://github.com/RUCAIBox/CIKM2020-S3Rec."""
    for block, first in blocks(path):
        numbers: list[int] = []
        texts: list[str] = []
        for number, line in _lines(block, first):
            try:
                texts.append(line.decode().strip())
                numbers.append(number)
            except UnicodeDecodeError:
                _reject("bad UTF-8", str(path), number, report)
        words = pc.utf8_split_whitespace(pa.array(texts, pa.string()))
        counts = words.value_lengths().to_numpy(zero_copy_only=False)
        lines = np.array(numbers, dtype=np.int64)
        if (alone := counts < 2).any():
            report.rows += int(alone.sum())
            report.reject("user without items", str(path), lines[alone], int(alone.sum()))
        starts = words.offsets.to_numpy()[:-1]
        owners = np.repeat(np.arange(len(counts)), counts - 1)
        flat = words.flatten()
        is_item = np.ones(len(flat), dtype=bool)
        is_item[starts] = False
        users = flat.take(pa.array(starts)).take(pa.array(owners))
        yield RowBatch(str(path), lines[owners], users, flat.filter(pa.array(is_item)), None)
