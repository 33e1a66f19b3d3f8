"""Parquet files and Hugging Face data sets as batches of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ds_recsys.data.encode import RowBatch
from ds_recsys.data.formats import choose_columns
from ds_recsys.data.report import progress_bar
from ds_recsys.errors import UserError

ROLES = ("user", "item", "timestamp")
BATCH_ROWS = 1 << 18


def read_parquet(path: Path, columns: Mapping[str, str | None]) -> Iterator[RowBatch]:
    """Batches of one Parquet file; rows are numbered from 1."""
    try:
        with pq.ParquetFile(path) as file, progress_bar(f"reading {path.name}", file.metadata.num_rows, "row") as bar:
            roles = choose_columns(file.schema_arrow.names, ROLES, columns, str(path))
            names = [name for name in roles.values() if name]
            row = 1
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield _row_batch(str(path), row, pa.table(batch), roles)
                row += len(batch)
                bar.update(len(batch))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error


def read_dataset(path: str, columns: Mapping[str, str | None], options: Mapping[str, object]) -> Iterator[RowBatch]:
    """Batches of whatever `datasets.load_dataset(path, **options)` opens, or `load_from_disk` for a saved folder.

    A data set of several splits needs options={"split": ...}. Rows are numbered from 1, file is the name of the set.
    """
    import datasets  # slow to import, and only this reader needs it

    saved = any(Path(path, name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(path)
            if isinstance(data, datasets.DatasetDict) and "split" in options:
                data = data[options["split"]]
        else:
            data = datasets.load_dataset(path, **options)
    except Exception as error:  # whatever a builder raises: its reason is the user's to know
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path}: datasets cannot open it: {type(error).__name__}: {reason}") from error
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        if len(data) != 1:
            raise UserError(f"{path}: several splits ({', '.join(data)}); choose by datasets_options={{'split': ...}}")
        data = next(iter(data.values()))
    names = data.column_names
    if names is None:
        raise UserError(f"{path}: a streamed data set without known columns; open it without streaming=True")
    roles = choose_columns(names, ROLES, columns, path)
    data = data.select_columns([name for name in roles.values() if name]).with_format("arrow")
    row = 1
    total = len(data) if isinstance(data, datasets.Dataset) else None
    with progress_bar(f"reading {path}", total, "row") as bar:
        for table in data.iter(BATCH_ROWS):
            yield _row_batch(path, row, table, roles)
            row += table.num_rows
            bar.update(table.num_rows)


def _row_batch(file: str, first: int, table: pa.Table, roles: Mapping[str, str | None]) -> RowBatch:
    columns = {role: _whole_column(table, name) for role, name in roles.items() if name}
    lines = np.arange(first, first + table.num_rows)
    return RowBatch(file, lines, columns["user"], columns["item"], columns.get("timestamp"))


def _whole_column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
