"""Rows that are not well formed, counted and placed; and files that are odd as a whole."""

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest
from test_data_readers import HISTORIES, histories, lines, write

from ds_recsys.data import read_interactions, text
from ds_recsys.errors import UserError

GOOD = "u{n},i{n},{n}\n"
BAD = {
    3: (b",i,1\n", "bad user id"),
    5: (b"u,NaN,1\n", "bad item id"),
    8: (b"u,i,yesterday\n", "bad timestamp"),
    9: (b"u,i,nan\n", "bad timestamp"),
    12: (b"u,i\n", "missing column"),
    13: (b"u,i,1,4\n", "too many columns"),
    16: (b"u\xff,i,1\n", "bad UTF-8"),
    17: (b'"u,i,1\n', "quote not closed on its line"),
    20: (b"u,i,99999999999999999999\n", "bad timestamp"),
    22: (b"u,i,inf\n", "bad timestamp"),
}


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("kinds", [set(BAD), {3, 5}, {8, 9, 20, 22}, {12}, {12, 13}, {16}, {17}])
@pytest.mark.parametrize("blank", [30, None])
def test_bad_rows_are_counted_and_placed(tmp_path, monkeypatch, block, kinds, blank):
    monkeypatch.setattr(text, "BLOCK", block)
    content, expected, blanks = b"user_id,item_id,timestamp\n", {}, 0
    for n in range(2, 40):
        if n in kinds:
            content += BAD[n][0]
            expected.setdefault(BAD[n][1], []).append(f"{tmp_path}/log.csv:{n}")
        elif n == blank:
            content, blanks = content + b"\n", 1
        else:
            content += GOOD.format(n=n).encode()
    x = read_interactions(write(tmp_path / "log.csv", content), max_bad_fraction=0.5)
    assert x.report.bad == {reason: len(places) for reason, places in expected.items()}
    assert x.report.examples == {reason: places[:3] for reason, places in expected.items()}
    assert x.report.rows == 38 - blanks
    assert x.users == [f"u{n}" for n in range(2, 40) if n not in kinds and n != blank], "bad rows leave no id behind"
    assert x.timestamps.tolist() == [int(user[1:]) for user in x.users]


def test_bad_json_rows(tmp_path, caplog):
    good = b'{"user_id": "u", "item_id": 7, "timestamp": 1}\n'
    bad = [b"{\n", b'{"user_id": "u", "timestamp": 1}\n', b'{"user_id": "\xff", "item_id": 7, "timestamp": 1}\n',
           b'{"user_id": null, "item_id": 7, "timestamp": 1}\n', b'{"user_id": "u", "item_id": 7, "timestamp": "x"}\n',
           b"[1]\n", b'{"user_id": "u", "item_id": [7], "timestamp": 1}\n']  # fmt: skip
    path = write(tmp_path / "log.jsonl", good + b"".join(bad) + good * 20)
    x = read_interactions(path, max_bad_fraction=0.5)
    assert x.report.examples == {
        "bad JSON": [f"{path}:2", f"{path}:7"], "missing column": [f"{path}:3"], "bad UTF-8": [f"{path}:4"],
        "bad user id": [f"{path}:5"], "bad timestamp": [f"{path}:6"], "bad item id": [f"{path}:8"],
    }  # fmt: skip
    assert len(x) == 21 and x.items == ["7"]
    assert f"bad JSON 2 ({path}:2, {path}:7)" in caplog.text, "the user is told"


def test_bad_item_lines(tmp_path):
    path = write(tmp_path / "log.txt", b"1 5 6\n2\n3 \xff 7\n" + b"4 5 6\n" * 30)
    x = read_interactions(path, "s3rec", max_bad_fraction=0.1)
    assert x.report.examples == {"bad UTF-8": [f"{path}:3"], "user without items": [f"{path}:2"]}
    assert x.users == ["1", "4"] and x.report.rows == 2 + 62


def test_too_many_bad_rows_stop_the_run(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id\n" + "u,i\n" * 98 + ",i\n" * 2)
    with pytest.raises(UserError, match=rf"bad user id 2 \({path}:100, {path}:101\).*2\.0% .*max_bad_fraction=0\.01"):
        read_interactions(path)
    assert len(read_interactions(path, max_bad_fraction=0.02)) == 98


def test_a_tab_is_no_separator_between_colons(tmp_path):
    x = read_interactions(write(tmp_path / "ratings.dat", "1::2::3::4\n" * 3 + "1::2::3\t4\n"), max_bad_fraction=0.5)
    assert x.report.examples == {"missing column": [f"{tmp_path}/ratings.dat:4"]} and len(x) == 3


# --- odd files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log", "u.data", "ratings.dat", "log.inter", "log.csv.gz"])
def test_empty_file(tmp_path, name):
    content = gzip.compress(b"") if name.endswith("gz") else b""
    with pytest.raises(UserError, match="no interactions in it"):
        read_interactions(write(tmp_path / name, content))


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_header_only(tmp_path, end):
    with pytest.raises(UserError, match="no interactions in it"):
        read_interactions(write(tmp_path / "log.csv", "user_id,item_id" + end))


@pytest.mark.parametrize("block", [16, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_and_byte_order_mark(tmp_path, monkeypatch, block, mark, end, last):
    monkeypatch.setattr(text, "BLOCK", block)
    content = lines("{u},{i},{t}", "user_id,item_id,timestamp\n").replace("\n", end)
    content = content if last else content.removesuffix(end)
    x = read_interactions(write(tmp_path / "log.csv", mark + content.encode()))
    assert histories(x) == HISTORIES and not x.report.bad
    bare = content.split(end, 1)[1].encode()
    x = read_interactions(write(tmp_path / "bare.csv", mark + bare), columns={"user": 0, "item": 1, "timestamp": 2})
    assert histories(x) == HISTORIES and not x.report.bad


def test_byte_order_mark_is_no_part_of_an_id(tmp_path):
    assert read_interactions(write(tmp_path / "log.txt", b"\xef\xbb\xbf1 2 3\n2 3\n")).users == ["1", "2"]


def test_ids_as_they_come(tmp_path):
    huge = "x" * 300_000
    long = "12345678901234567890123"
    content = f'user_id,item_id,t\n"a, b",  c d ,1\n"say ""hi""",{huge},2\n007,7,3\n7,7,4\n{long},é,5\n'
    x = read_interactions(write(tmp_path / "log.csv", content))
    assert x.users == ["a, b", 'say "hi"', "007", "7", long]
    assert x.items == ["c d", huge, "7", "é"]


@pytest.mark.parametrize(
    "column, expected",
    [
        (["1.5", "1", "3"], [1.0, 1.5, 3.0]),
        (["1e9", "5", " 7"], [5, 7, 10**9]),
        (["2020-01-02", "1970-01-01", "1970-01-01 00:00:01.5"], [0, 1_500_000, 1_577_923_200_000_000]),
        (["1970-01-01T00:00:02Z", "1970-01-01T00:00:01Z", "1970-01-01T01:00:00+01:00"], [0, 1_000_000, 2_000_000]),
        (["1e300", "4", "9999999999999999999999"], [4]),
        (["9007199254740993", "9007199254740992", "1"], [1, 9007199254740992, 9007199254740993]),
    ],
)
def test_timestamps(tmp_path, column, expected):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp\n" + "".join(f"u,i,{t}\n" for t in column))
    x = read_interactions(path, max_bad_fraction=0.7)
    assert x.timestamps.tolist() == expected
    assert x.timestamps.dtype == (np.float64 if 1.5 in expected else np.int64)


def test_one_kind_of_time(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp\nu,i,5\nu,i,2020-01-01\nu,i,6\n")
    x = read_interactions(path, max_bad_fraction=0.5)
    assert x.report.examples == {"bad timestamp": [f"{path}:3"]} and x.timestamps.tolist() == [5, 6]


def test_repeated_rows_are_kept_and_no_times_noted(tmp_path):
    x = read_interactions(write(tmp_path / "log.csv", "user,item\n" + "u,i\n" * 3))
    assert len(x) == 3 and x.num_users == 1 and "order of the rows" in x.report.describe()


def test_old_mac_line_ends(tmp_path):
    with pytest.raises(UserError, match="log.csv:1: unreadable header"):
        read_interactions(write(tmp_path / "log.csv", "user_id,item_id\ru,i\r"))


def test_endless_line(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 100)
    monkeypatch.setattr(text, "LONGEST_LINE", 1000)
    with pytest.raises(UserError, match="log.csv:2: a line of more than"):
        read_interactions(write(tmp_path / "log.csv", "user_id,item_id\n" + "u" * 3000))


def test_settings_without_effect(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id\nu,i\n")
    with pytest.raises(UserError, match="datasets_options are for format='datasets'"):
        read_interactions(path, datasets_options={"split": "train"})
    with pytest.raises(UserError, match="a s3rec log has no column of titles"):
        read_interactions(write(tmp_path / "log.txt", "1 2\n3 4 5\n"), columns={"title": "t"})


def test_the_command_that_measures_memory():
    done = subprocess.run(
        [sys.executable, "-m", "ds_recsys.data.stress", "--rows", "20000"], capture_output=True, text=True, check=True
    )
    assert re.search(r"20,000 interactions in [\d.]+ s, peak resident memory [\d.]+ GB", done.stdout)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"user_id,item_id\n" + b"u,i\n" * 10_000)
    with pytest.raises(UserError, match="log.csv.gz: cannot be read"):
        read_interactions(write(tmp_path / "log.csv.gz", whole[:-20]))
    with pytest.raises(UserError, match="log.csv.gz: cannot be read"):
        read_interactions(write(tmp_path / "log.csv.gz", b"not gzip at all"))
