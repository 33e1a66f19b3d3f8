"""Every format on a small file."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_recsys.data import read_interactions, tables
from ds_recsys.errors import UserError

# (user, item, time) in file order. u2 is first seen second; u1's rows of time 20 tie and must keep this order.
ROWS = [("u1", "b", 20), ("u2", "a", 5), ("u1", "a", 20), ("u1", "c", 10), ("u2", "c", 4), ("u1", "d", 20)]
HISTORIES = {"u1": ["c", "b", "a", "d"], "u2": ["c", "a"]}
NUMBERS = {"u1": "1", "u2": "2", "a": "11", "b": "12", "c": "13", "d": "14"}


def histories(x) -> dict[str, list[str]]:
    return {user: x.history_of(user) for user in x.users}


def numbered(data):
    return {NUMBERS[user]: [NUMBERS[item] for item in items] for user, items in data.items()}


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(pattern: str, header: str = "", rows=ROWS) -> str:
    return header + "".join(pattern.format(u=u, i=i, t=t, un=NUMBERS[u], in_=NUMBERS[i]) + "\n" for u, i, t in rows)


def test_layout_of_interactions(tmp_path):
    x = read_interactions(write(tmp_path / "log.csv", lines("{u},{i},{t}", "user_id,item_id,timestamp\n")))
    assert x.users == ["u1", "u2"] and x.items == ["b", "a", "c", "d"]
    assert x.offsets.tolist() == [0, 4, 6] and x.offsets.dtype == np.int64
    assert x.sequence.tolist() == [3, 1, 2, 4, 3, 2] and x.sequence.dtype == np.int32
    assert x.timestamps.tolist() == [10, 20, 20, 20, 4, 5] and x.timestamps.dtype == np.int64
    assert (x.report.rows, x.report.bad_rows, x.num_users, x.num_items, len(x)) == (6, 0, 2, 4, 6)
    assert x.history(1).tolist() == [3, 2]
    with pytest.raises(UserError, match="no user 'u9'"):
        x.history_of("u9")


def test_movielens_100k(tmp_path):
    write(tmp_path / "ml/u.data", lines("{un}\t{in_}\t3\t{t}"))
    write(tmp_path / "ml/u.item", "11|Café (1995)|x|\n12|B|\n13|C|\n14|D|\n".encode("latin-1"))
    x = read_interactions(tmp_path / "ml")
    assert histories(x) == numbered(HISTORIES)
    assert x.titles == ["B", "Café (1995)", "C", "D"]


def test_movielens_1m(tmp_path):
    write(tmp_path / "ratings.dat", lines("{un}::{in_}::3::{t}"))
    write(tmp_path / "movies.dat", "11::Léon: A (1994)::Drama\n12::B::x\n13::C::x\n".encode("latin-1"))
    x = read_interactions(tmp_path)
    assert histories(x) == numbered(HISTORIES)
    assert x.titles == ["B", "Léon: A (1994)", "C", "14"], "an item without a title goes by its id"
    assert "1 of 4 items have no title" in x.report.describe()
    assert histories(read_interactions(tmp_path / "ratings.dat", "movielens-1m", titles=None)) == numbered(HISTORIES)


def test_movielens_20m(tmp_path):
    write(tmp_path / "ratings.csv", lines("{un},{in_},3.5,{t}", "userId,movieId,rating,timestamp\n"))
    write(tmp_path / "tags.csv", "userId,movieId,tag,timestamp\n9,9,x,1\n")
    write(tmp_path / "movies.csv", 'movieId,title,genres\n11,"A, the (1995)",x\n12,B,x\n13,C,x\n14,D,x\n')
    x = read_interactions(tmp_path)
    assert histories(x) == numbered(HISTORIES)
    assert x.titles == ["B", "A, the (1995)", "C", "D"]


def test_recbole(tmp_path):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(tmp_path / "shop/shop.inter", lines("{u}\t{i}\t3\t{t}.0", header))
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    write(tmp_path / "shop/shop.item", header + 'a\tA "q\t1999\nb\tB\t\n')
    x = read_interactions(tmp_path / "shop")
    assert histories(x) == HISTORIES
    assert x.titles == ["B", 'A "q (1999)', "c", "d"]
    assert x.timestamps.dtype == np.int64, "whole floats are whole numbers"


def test_s3rec_lines(tmp_path):
    x = read_interactions(write(tmp_path / "beauty.txt", "1 5 6 5\n2 6\n\n3 7 5\r\n"))
    assert histories(x) == {"1": ["5", "6", "5"], "2": ["6"], "3": ["7", "5"]}
    assert x.timestamps is None and not x.report.notes


def test_amazon_2023(tmp_path):
    rows = [{"rating": 5.0, "title": "t{", "images": [{"a": 1}], "asin": "x", "parent_asin": i, "user_id": u,
             "timestamp": t * 1000} for u, i, t in ROWS]  # fmt: skip
    path = tmp_path / "All_Beauty.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    meta = "".join(json.dumps({"title": f"Title {i}", "parent_asin": i}) + "\n" for i in "abcd")
    write(tmp_path / "meta_All_Beauty.jsonl", meta)
    x = read_interactions(path)
    assert histories(x) == HISTORIES
    assert x.titles == ["Title b", "Title a", "Title c", "Title d"]
    assert histories(read_interactions(tmp_path)) == HISTORIES, "the folder, meta file and all"
    csv = write(tmp_path / "Beauty.csv", lines("{u},{i},5.0,{t}000", "user_id,parent_asin,rating,timestamp\n"))
    assert read_interactions(csv).content_hash == x.content_hash


def test_named_columns(tmp_path):
    path = write(tmp_path / "log.tsv", lines("{t}\t{u}\t{i}", "when\twho\twhat\n"))
    names = {"user": "who", "item": "what", "timestamp": "when"}
    assert histories(read_interactions(path, columns=names)) == HISTORIES
    x = read_interactions(path, columns={**names, "timestamp": None})
    assert x.timestamps is None and histories(x)["u1"] == ["b", "a", "c", "d"]
    bare = write(tmp_path / "bare.csv", lines("{u},{i},5,{t}"))
    assert histories(read_interactions(bare, columns={"user": 0, "item": 1, "timestamp": 3})) == HISTORIES
    with pytest.raises(UserError, match="no column looks like the user.*'when', 'who', 'what'"):
        read_interactions(path)
    with pytest.raises(UserError, match="no column 'whom' for the user"):
        read_interactions(path, columns={"user": "whom", "item": "what"})
    with pytest.raises(UserError, match="no role 'usr'"):
        read_interactions(path, columns={"usr": "who"})


def test_titles_in_the_log_or_in_a_given_file(tmp_path):
    path = write(tmp_path / "log.csv", lines('{u},{i},"The {i}, 2"', "user_id,item_id,what\n"))
    assert read_interactions(path).titles is None
    named = {"title": "what"}
    assert read_interactions(path, columns=named).titles == ["The b, 2", "The a, 2", "The c, 2", "The d, 2"]
    pq.write_table(pa.table({"item_id": ["a", "b"], "title": ["A", "B"], "year": [1999, None]}), tmp_path / "t.parquet")
    assert read_interactions(path, titles=tmp_path / "t.parquet").titles == ["B", "A (1999)", "c", "d"]
    assert read_interactions(path, columns=named, titles=None).titles is None
    with pytest.raises(UserError, match="no such file of titles"):
        read_interactions(path, titles=tmp_path / "absent.csv")
    with pytest.raises(UserError, match="no column looks like a title"):
        read_interactions(path, titles=path)


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    users, items, times = zip(*ROWS, strict=True)
    stamps = pa.array(np.array(times) * 1_000_000).cast(pa.timestamp("us", "UTC"))
    users = pa.array(users).dictionary_encode()
    table = pa.table({"user_id": users, "item_id": items, "timestamp": stamps, "x": times})
    pq.write_table(table.slice(0, 3), write(tmp_path / "shards/0.parquet", ""))
    pq.write_table(table.slice(3), write(tmp_path / "shards/1.parquet", ""))
    x = read_interactions(tmp_path / "shards")
    assert histories(x) == HISTORIES and x.timestamps.tolist()[0] == 10_000_000
    numbers = pa.table({"user_id": [1.0, 2.0, float("nan"), None], "item_id": [7, 8, 7, 7]})
    pq.write_table(numbers, tmp_path / "n.parquet")
    x = read_interactions(tmp_path / "n.parquet", max_bad_fraction=0.5)
    assert x.users == ["1", "2"] and x.report.examples == {"bad user id": [f"{tmp_path}/n.parquet:{n}" for n in (3, 4)]}
    raw = pa.table({"user_id": [b" a", b"\xff", b"c"], "item_id": [7, 8, 7]})
    pq.write_table(raw, tmp_path / "raw.parquet")
    assert read_interactions(tmp_path / "raw.parquet", max_bad_fraction=0.5).users == ["a", "c"]
    pq.write_table(pa.table({"user_id": [[1]], "item_id": [7]}), tmp_path / "lists.parquet")
    with pytest.raises(UserError, match="lists.parquet: user ids must be texts or numbers"):
        read_interactions(tmp_path / "lists.parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_interactions(write(tmp_path / "broken.parquet", "PAR1 no"))


def test_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "hub/train.csv", lines("{u},{i},{t}", "user_id,item_id,timestamp\n"))
    x = read_interactions(tmp_path / "hub", "datasets")
    assert histories(x) == HISTORIES
    streamed = read_interactions(tmp_path / "hub", "datasets", datasets_options={"streaming": True, "split": "train"})
    assert streamed.content_hash == x.content_hash
    data = datasets.Dataset.from_dict({"user_id": ["u", "u", None], "item_id": [3, 4, 5]})
    data.save_to_disk(tmp_path / "saved")
    saved = read_interactions(tmp_path / "saved", max_bad_fraction=0.5)
    assert histories(saved) == {"u": ["3", "4"]} and saved.report.examples == {"bad user id": [f"{tmp_path}/saved:3"]}
    datasets.DatasetDict(a=data, b=data).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several splits"):
        read_interactions(tmp_path / "two")
    assert len(read_interactions(tmp_path / "two", datasets_options={"split": "a"}, max_bad_fraction=0.5)) == 2
    with pytest.raises(UserError, match="datasets cannot open it"):
        read_interactions(tmp_path / "nothing here", "datasets")


@pytest.mark.parametrize(
    "content, format",
    [
        (lines("{un}\t{in_}\t3\t{t}"), "movielens-100k"),
        (lines("{un}::{in_}::3::{t}"), "movielens-1m"),
        (lines("{u},{i},{t}", "user_id,item_id,timestamp\n"), "csv"),
        (lines("{u};{i};{t}", "user_id;item_id;timestamp\n"), "csv"),
        (lines("{u}\t{i}\t{t}", "user_id:token\titem_id:token\ttimestamp:float\n"), "recbole"),
        ("1 12 11 14\n2 13\n", "s3rec"),
        (lines('{{"user_id": "{u}", "item_id": "{i}", "timestamp": {t}}}'), "jsonl"),
    ],
)
def test_format_by_content(tmp_path, content, format):
    path = write(tmp_path / "a file", content)
    assert read_interactions(path).content_hash == read_interactions(path, format).content_hash


def test_what_cannot_be_told(tmp_path):
    with pytest.raises(UserError, match=r"cannot tell its format.*movielens-100k.*s3rec.*datasets"):
        read_interactions(write(tmp_path / "x", "a b c\nd e f\n"))
    with pytest.raises(UserError, match="no such file"):
        read_interactions(tmp_path / "absent.csv")
    with pytest.raises(UserError, match="format 'ml' is not known"):
        read_interactions(tmp_path / "x", "ml")
    with pytest.raises(UserError, match="no log in it"):
        read_interactions(write(tmp_path / "empty/readme.md", "x").parent)
    write(tmp_path / "two/a.csv", "x"), write(tmp_path / "two/b.csv", "x")
    with pytest.raises(UserError, match="several logs"):
        read_interactions(tmp_path / "two")
