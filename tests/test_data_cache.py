"""A log is parsed once, and again when anything that changes it changes."""

import numpy as np
import pytest
from distributed import run_on_grid
from logs import write_log

from ds_recsys.data import read_interactions
from ds_recsys.data.cache import cached

COLUMNS = {"user": "user", "item": "item", "timestamp": "timestamp", "title": "title"}


@pytest.fixture
def reader(tmp_path):
    """(read through the cache, how often the text was parsed)"""
    calls = []

    def read(path, **options):
        def parse():
            calls.append(path)
            return read_interactions(path, columns=COLUMNS, **options)

        return cached(parse, path, options, tmp_path / "cache")

    return read, calls


def test_same_content_mapped_from_disk(reader, tmp_path):
    read, calls = reader
    log = write_log(tmp_path / "log.csv")
    plain, first, second = read_interactions(log, columns=COLUMNS), read(log), read(log)
    assert len(calls) == 1
    for mapped in (first, second):
        assert isinstance(mapped.sequence, np.memmap)
        assert (mapped.users, mapped.items, mapped.titles) == (plain.users, plain.items, plain.titles)
        assert np.array_equal(mapped.sequence, plain.sequence) and np.array_equal(mapped.timestamps, plain.timestamps)
        assert mapped.content_hash == plain.content_hash and mapped.report == plain.report


def test_changed_log_or_options_are_read_again(reader, tmp_path):
    read, calls = reader
    log = write_log(tmp_path / "log.csv")
    before = read(log)
    write_log(log, users=61)
    assert read(log).content_hash != before.content_hash
    read(log, min_count=5)
    assert len(calls) == 3


def _read_on_rank(folder):
    log, calls = folder / "log.csv", []

    def parse():
        calls.append(1)
        return read_interactions(log, columns=COLUMNS)

    return len(calls), cached(parse, log, None, folder / "cache").content_hash, len(calls)


def test_one_rank_parses_for_all(tmp_path):
    write_log(tmp_path / "log.csv")
    results = run_on_grid(_read_on_rank, 3, folder=tmp_path)
    assert sum(after for _, _, after in results) == 1
    assert len({content for _, content, _ in results}) == 1
