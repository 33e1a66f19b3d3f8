"""One function that reads any supported log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ds_recsys.data.encode import RowBatch, RowEncoder
from ds_recsys.data.formats import FORMATS, locate, text_layout
from ds_recsys.data.interactions import Interactions, k_core
from ds_recsys.data.report import ReadReport, is_first_rank
from ds_recsys.data.tables import read_dataset, read_parquet
from ds_recsys.data.text import read_delimited, read_item_lines, read_json_lines
from ds_recsys.data.titles import find_titles, read_titles
from ds_recsys.errors import UserError

logger = logging.getLogger("ds_recsys")

COLUMN_ROLES = ("user", "item", "timestamp", "title")


def read_interactions(
    path: str | Path,
    format: str = "auto",
    *,
    columns: Mapping[str, str | int | None] | None = None,
    titles: str | Path | None = "auto",
    min_count: int = 0,
    max_bad_fraction: float = 0.01,
    datasets_options: Mapping[str, object] | None = None,
) -> Interactions:
    """Read a log of who did what when.

    path: a file, a folder, or with format="datasets" whatever `datasets.load_dataset` takes.
    format: "auto" (by name, then by content) or a key of `ds_recsys.data.FORMATS`.
    columns: names of the columns {"user", "item", "timestamp", "title"} where the usual ones do not fit. A log without
        a header takes numbers from 0. {"timestamp": None} ignores the times: the order of the file is then that of
        time.
    titles: the file of titles, None for no titles, "auto" for the file beside the log that goes with its format, or
        else the log's own column columns["title"].
    min_count: keep the k-core, see `k_core`.
    max_bad_fraction: stop when more than this fraction of the rows is malformed; up to it they are left out, counted in
        `Interactions.report` and shown with file:line in a warning.
    datasets_options: keywords of `datasets.load_dataset`, such as {"name": ..., "split": "train"}.

    Ratings are not looked at: an interaction is an interaction. Memory: the integer columns, about 45 bytes a row at
    the peak, and a few blocks of text; ids are held once each.

    UserError: nothing there, an unknown format, no such column, too many malformed rows, nothing left by min_count.
    """
    columns = dict(columns or {})
    if unknown := set(columns) - set(COLUMN_ROLES):
        raise UserError(f"columns: no role {sorted(unknown)[0]!r}; there are {', '.join(COLUMN_ROLES)}")
    if format != "auto" and format not in FORMATS:
        raise UserError(f"format {format!r} is not known; there are auto, {', '.join(FORMATS)}")
    if format == "datasets" or _is_saved_dataset(Path(path)):
        format, files = "datasets", [Path(path)]
    else:
        format, files = locate(Path(path).expanduser(), format)
    if datasets_options and format != "datasets":
        raise UserError(f"datasets_options are for format='datasets', {path} is read as {format}; remove them")
    report = ReadReport(str(path))
    encoder = None
    for file in files:
        # The location of a data set is a name, which Path would keep, and may be a URL, which it would not.
        location = str(path) if format == "datasets" else file
        for batch in _batches(location, format, columns, dict(datasets_options or {}), report):
            encoder = encoder or RowEncoder(report, timed=batch.timestamp is not None)
            encoder.add(batch)
    if encoder is None:
        report.check(max_bad_fraction)
        raise AssertionError("a reader counted rows and gave none")
    interactions = encoder.finish(max_bad_fraction)
    if interactions.timestamps is None and format != "s3rec" and "timestamp" not in columns:
        report.notes.append("No column of times: the order of the rows is taken as the order of time")
    interactions = k_core(interactions, min_count)
    if sources := _title_sources(titles, files, format, columns):
        interactions = _with_titles(interactions, sources, columns)
    if is_first_rank() and (report.bad or report.notes):
        logger.warning(report.describe())
    return interactions


def _batches(location: str | Path, format: str, columns: dict, options: dict, report: ReadReport) -> Iterator[RowBatch]:
    if format == "datasets":
        return read_dataset(location, columns, options)
    if format == "parquet":
        return read_parquet(location, columns)
    if format == "jsonl":
        return read_json_lines(location, columns, report)
    if format == "s3rec":
        return read_item_lines(location, report)
    return read_delimited(location, text_layout(location, format, columns), report)


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _title_sources(titles: str | Path | None, files: list[Path], format: str, columns: dict) -> list[Path]:
    if titles != "auto":
        return [] if titles is None else [Path(titles)]
    if beside := find_titles(files[0]):
        return [beside]
    if not columns.get("title"):
        return []
    if format not in ("csv", "tsv", "jsonl", "parquet"):
        raise UserError(f"columns: a {format} log has no column of titles; give a file of titles instead")
    return files


def _with_titles(interactions: Interactions, sources: list[Path], columns: dict) -> Interactions:
    titles, found = read_titles(sources, interactions.items, columns)
    if missing := interactions.num_items - found:
        interactions.report.notes.append(
            f"{missing:,} of {interactions.num_items:,} items have no title in {sources[0]}: they go by their ids"
        )
    return replace(interactions, titles=titles)
