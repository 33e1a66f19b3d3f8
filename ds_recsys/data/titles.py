"""Titles of items, from the file that comes with a log."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ds_recsys.data.encode import id_text
from ds_recsys.data.formats import choose_columns, first_lines, sniff_delimiter
from ds_recsys.data.text import blocks
from ds_recsys.errors import UserError


def find_titles(log: Path) -> Path | None:
    """The titles file beside a log: MovieLens, RecBole and Amazon Reviews 2023 names; None when there is none."""
    name = log.name.removesuffix(".gz")
    beside = {"u.data": ["u.item"], "ratings.dat": ["movies.dat"], "ratings.csv": ["movies.csv"]}.get(name, [])
    stem = Path(name).stem
    for candidate in (*beside, f"{stem}.item", f"meta_{stem}.jsonl", f"meta_{stem}.jsonl.gz"):
        if (log.parent / candidate).is_file():
            return log.parent / candidate
    return None


def read_titles(paths: list[Path], items: list[str], columns: Mapping[str, str | int | None]) -> tuple[list[str], int]:
    """(one title per item of `items`, how many were found), from files of titles or logs with a column of titles.

    An item without a title is called by its id. A column `release_year` or `year` is put after the title, "Heat
    (1995)", as MovieLens writes it: many films share a title. Lines that cannot be read are passed over: titles are
    decoration.
    """
    titles = list(items)
    index = {item: place for place, item in enumerate(items)}
    found: set[int] = set()
    named = {role: columns[role] for role in ("item", "title") if isinstance(columns.get(role), str)}
    for item, title, year in chain.from_iterable(_rows(path, named) for path in paths):
        place = index.get(id_text(item)) if item is not None else None
        text = " ".join(str(title).split()) if title is not None else ""
        if place is not None and place not in found and text:
            year = id_text(year) if year is not None else None
            titles[place] = f"{text} ({year})" if year else text
            found.add(place)
            if len(found) == len(items):
                break
    return titles, len(found)


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[object, object, object]]:
    """(item, title, year or None) of each row, by the kind of file that its name says."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of titles")
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    elif suffix in (".jsonl", ".json", ".ndjson"):
        yield from _json_rows(path, columns)
    elif name in ("movies.dat", "u.item"):
        for line in _text(path, "latin-1"):
            fields = line.split("::" if name == "movies.dat" else "|")
            if len(fields) >= 2:
                yield fields[0], fields[1], None
    else:
        yield from _delimited_rows(path, columns, suffix)


def _delimited_rows(path: Path, columns: Mapping[str, str], suffix: str) -> Iterator[tuple[str, str, str | None]]:
    header = next(iter(first_lines(path, 1)), "")
    delimiter = "\t" if suffix in (".item", ".tsv") else sniff_delimiter(header)
    quoting = csv.QUOTE_NONE if suffix == ".item" else csv.QUOTE_MINIMAL
    names, places = None, None
    for fields in csv.reader(_text(path, "utf-8"), delimiter=delimiter, quoting=quoting):
        if names is None:
            names = fields
            roles = _title_columns(names, columns, path)
            places = [names.index(roles[role]) if roles[role] else None for role in ("item", "title", "year")]
        elif len(fields) == len(names):
            yield tuple(None if place is None else fields[place] for place in places)


def _json_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[object, object, object]]:
    roles = None
    for line in _text(path, "utf-8"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            # No year here: Amazon's details hold dates of many meanings.
            roles = roles or _title_columns(list(row), columns, path)
            yield row.get(roles["item"]), row.get(roles["title"]), None


def _parquet_rows(path: Path, columns: Mapping[str, str]) -> Iterator[tuple[object, object, object]]:
    try:
        with pq.ParquetFile(path) as file:
            roles = _title_columns(file.schema_arrow.names, columns, path)
            names = [roles[role] for role in ("item", "title", "year") if roles[role]]
            for batch in file.iter_batches(columns=names):
                data = [batch.column(name).to_pylist() for name in names]
                yield from zip(*data, *[[None] * len(batch)] * (3 - len(data)), strict=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _title_columns(names: list[str], columns: Mapping[str, str], path: Path) -> dict[str, str | None]:
    roles = choose_columns(names, ("item", "title", "year"), columns, str(path))
    if roles["title"] is None:
        raise UserError(f"{path}: no column looks like a title; name it, columns={{'title': ...}}; it has {names[:12]}")
    return roles


def _text(path: Path, encoding: str) -> Iterator[str]:
    """Lines, decoded; bytes that cannot be are replaced."""
    for block, _ in blocks(path):
        for line in io.BytesIO(block):
            yield line.decode(encoding, "replace").rstrip("\r\n")
