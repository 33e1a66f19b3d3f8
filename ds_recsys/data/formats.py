"""Which format a path holds, and which of its columns are the user, the item and the time."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ds_recsys.errors import UserError

# A column of a file with a header is found by its name, after RecBole's ":type" and everything but letters and digits
# is taken off: userId, user_id and user_id:token are one name. The first that is present wins.
ALIASES = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "visitorid"),
    "item": ("itemid", "item", "iid", "movieid", "parentasin", "asin", "productid"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime", "datetime", "date", "sorttimestamp"),
    "title": ("title", "movietitle", "itemtitle", "name", "itemname", "productname"),
    "year": ("releaseyear", "year"),
}
OPTIONAL = frozenset({"timestamp", "title", "year"})

FORMATS = {
    "movielens-100k": "u.data: user, item, rating, time between tabs, no header",
    "movielens-1m": "ratings.dat: user::item::rating::time",
    "recbole": "NAME.inter with a typed header such as user_id:token",
    "s3rec": "lines of 'user item item ...', oldest first",
    "csv": "a header and columns; MovieLens 20M+ ratings.csv, Amazon Reviews 2023",
    "tsv": "the same between tabs",
    "jsonl": "one JSON object a line; Amazon Reviews 2023",
    "parquet": "one file, or a folder of them",
    "datasets": "what datasets.load_dataset opens: a Hub name or a path",
}
BY_NAME = {"u.data": "movielens-100k", "ratings.dat": "movielens-1m"}
BY_SUFFIX = {
    ".inter": "recbole", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
}  # fmt: skip
# What is looked for in a folder, in this order; several files of one kind are read together only if they are shards.
IN_FOLDER = ("u.data", "ratings.dat", "ratings.csv", "*.inter", "*.parquet", "*.jsonl", "*.jsonl.gz", "*.csv", "*.tsv")


class Layout(NamedTuple):
    """How a delimited text file is laid out: `width` fields a row, the places of the columns, a header or none."""

    delimiter: str
    quoted: bool
    header: bool
    width: int
    user: int
    item: int
    timestamp: int | None


def locate(path: Path, format: str) -> tuple[str, list[Path]]:
    """(format name, files in the order to read) of a file or folder; UserError when it cannot be told."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (a data set on the Hub is read with format='datasets')")
    files = _in_folder(path) if path.is_dir() else [path]
    found = [format if format != "auto" else detect(file) for file in files]
    if len(set(found)) != 1:
        raise UserError(f"{path}: its files are of different formats ({', '.join(sorted(set(found)))}); name one file")
    return found[0], files


def _in_folder(folder: Path) -> list[Path]:
    for pattern in IN_FOLDER:
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("meta_"))
        named = [file for file in files if file.stem == folder.name]
        if len(files) > 1 and pattern not in ("*.parquet", "*.jsonl", "*.jsonl.gz"):
            if len(named) != 1:
                raise UserError(f"{folder}: several logs in it ({', '.join(f.name for f in files[:5])}); name one file")
            files = named
        if files:
            return files
    raise UserError(f"{folder}: no log in it; looked for {', '.join(IN_FOLDER)}")


def detect(path: Path) -> str:
    """The format of one file, by its name and then by its first lines."""
    name = path.name.removesuffix(".gz")
    known = BY_NAME.get(name) or BY_SUFFIX.get(Path(name).suffix)
    if known:
        return known
    lines = [line for line in first_lines(path, 100) if line.strip()]
    if not lines:
        raise UserError(f"{path}: no interactions in it (empty)")
    first = lines[0]
    if first.startswith("PAR1"):
        return "parquet"
    if first.lstrip().startswith("{"):
        return "jsonl"
    if "::" in first and first.count("::") >= 2:
        return "movielens-1m"
    if re.search(r":(token|float)(_seq)?(\t|$)", first):
        return "recbole"
    delimiter = sniff_delimiter(first)
    names = [plain_name(field) for field in first.split(delimiter)]
    if any(name in ALIASES["user"] for name in names) and any(name in ALIASES["item"] for name in names):
        return "tsv" if delimiter == "\t" else "csv"
    if all(re.fullmatch(r"\d+\t\d+\t[\d.]+\t\d+", line) for line in lines):
        return "movielens-100k"
    widths = {len(line.split()) for line in lines}
    if len(widths) > 1 and min(widths) >= 2 and not re.search(r"[\t,;|]", "".join(lines)):
        return "s3rec"
    raise UserError(f"{path}: cannot tell its format; say which: {', '.join(FORMATS)}")


def first_lines(path: Path, count: int, encoding: str = "utf-8") -> list[str]:
    """The first lines, without line ends or a byte order mark; undecodable bytes are replaced.

    Reads at most 1 MB, so that a file that is one endless line does no harm.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(1 << 20)
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    lines = head.decode(encoding, "replace").removeprefix("\ufeff").split("\n")
    return [line.rstrip("\r") for line in lines[:count]]


def sniff_delimiter(header: str) -> str:
    return max(("\t", ",", ";", "|"), key=header.count)


def plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.split(":")[0].lower())


def text_layout(path: Path, format: str, columns: Mapping[str, str | int | None]) -> Layout:
    """The layout of a delimited text file, from its format and header; `columns` given as numbers mean no header."""
    header = next((line for line in first_lines(path, 1)), "")
    if format in ("movielens-100k", "movielens-1m"):
        return Layout("\t" if format == "movielens-100k" else "::", False, False, 4, 0, 1, 3)
    if not header.strip():
        raise UserError(f"{path}: no interactions in it (its first line is empty)")
    delimiter = "\t" if format in ("tsv", "recbole") else sniff_delimiter(header)
    quoted = format != "recbole"
    try:
        names = next(csv.reader([header], delimiter=delimiter)) if quoted else header.split(delimiter)
    except csv.Error as error:
        raise UserError(f"{path}:1: unreadable header ({error}); lines end in \\n or \\r\\n") from error
    names = [name.strip() for name in names]
    if any(isinstance(column, int) for column in columns.values()):
        places = {role: columns.get(role) for role in ("user", "item", "timestamp")}
        for role, place in places.items():
            if (place is None and role not in OPTIONAL) or (place is not None and place not in range(len(names))):
                raise UserError(f"{path}: columns[{role!r}] must be a number from 0 to {len(names) - 1}, not {place!r}")
        return Layout(delimiter, quoted, False, len(names), **places)
    roles = choose_columns(names, ("user", "item", "timestamp"), columns, str(path))
    places = {role: None if name is None else names.index(name) for role, name in roles.items()}
    return Layout(delimiter, quoted, True, len(names), **places)


def choose_columns(
    names: Sequence[str], roles: Sequence[str], columns: Mapping[str, str | int | None], where: str
) -> dict[str, str | None]:
    """The name of the column that plays each role, from `columns` or else by its usual names."""
    chosen: dict[str, str | None] = {}
    for role in roles:
        if columns.get(role) is not None:
            name = next((n for n in names if columns[role] in (n, n.split(":")[0])), None)
            if name is None:
                raise UserError(f"{where}: no column {columns[role]!r} for the {role}; it has {_listed(names)}")
        elif role in columns:  # given as None: not wanted
            name = None
        else:
            ranked = [(ALIASES[role].index(plain_name(n)), n) for n in names if plain_name(n) in ALIASES[role]]
            name = min(ranked)[1] if ranked else None
        if name is None and role not in OPTIONAL:
            raise UserError(
                f"{where}: no column looks like the {role}; name it, columns={{{role!r}: ...}}; it has {_listed(names)}"
            )
        chosen[role] = name
    return chosen


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:12]) + (", ..." if len(names) > 12 else "")
