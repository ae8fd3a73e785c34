"""Files of rows: what is a row, what is a bad one, and that reading can begin at any of them."""

import io
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import ConfigError
from app.scoring import formats
from app.scoring.formats import STRIDE, Bad, open_format

LIMIT = 64


def opened(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def rows_of(name: str, data: bytes, columns=("text",)) -> list:
    reader = open_format(name, LIMIT)
    header = reader.index(opened(data), columns).header
    begin = reader.index(opened(data), columns).places[:1] or [0]
    return list(reader.read(opened(data), columns, header, begin[0], 0))


def parquet(columns: dict, **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def test_a_line_of_jsonl_is_a_row_and_a_blank_one_is_none():
    data = '\ufeff{"text": "é"}\r\n\n  \n{"text": "b", "more": [1]}'.encode()
    assert rows_of("jsonl", data) == [{"text": "é"}, {"text": "b", "more": [1]}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[" * 60, "not JSON"),
        (b'["a"]', "not a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "' + b"x" * LIMIT + b'"}', "longer than 64 bytes"),
        (b"x" * 3 * LIMIT, "longer than 64 bytes"),
    ],
)
def test_a_bad_line_of_jsonl_takes_no_other_with_it(line, reason):
    good = {"text": "a"}
    assert rows_of("jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "a"}\n') == [good, reason, good]
    assert rows_of("jsonl", b'{"text": "a"}\n' + line) == [good, reason]


def test_a_value_of_csv_may_have_commas_quotes_and_line_breaks():
    data = '\ufeffid,text\r\n1,"a ""b"",\nc"\r\n\r\n2,d\n'.encode()
    assert rows_of("csv", data) == [{"id": "1", "text": 'a "b",\nc'}, {"id": "2", "text": "d"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1", "expected 2 columns, found 1"),
        (b"1,a,b", "expected 2 columns, found 3"),
        (b"1,\xff", "not UTF-8"),
        (b'1,"\xff\n"', "not UTF-8"),
        (b"1," + b"x" * LIMIT, "longer than 64 bytes"),
        (b"1,a\rb", "not CSV"),
    ],
)
def test_a_bad_row_of_csv_takes_no_other_with_it(line, reason):
    *_, before, bad, after = rows_of("csv", b"id,text\n0,a\n" + line + b"\n2,c\n")
    assert (before, after) == ({"id": "0", "text": "a"}, {"id": "2", "text": "c"})
    assert isinstance(bad, Bad)
    assert bad.startswith(reason)


def test_a_quote_that_is_never_closed_ends_where_a_row_is_too_long():
    rows = rows_of("csv", b'id,text\n0,"a\n' + b"1,b\n" * 50)
    assert isinstance(rows[0], Bad)
    assert rows[-1] == {"id": "1", "text": "b"}


def test_text_of_parquet_is_bad_by_itself():
    text = pa.array([b"a", b"\xff", b"x" * (LIMIT + 1), None]).cast(pa.large_binary())
    raw = pa.Array.from_buffers(pa.large_string(), 4, text.buffers())
    assert rows_of("parquet", parquet({"text": raw, "other": [1, 2, 3, 4]})) == [
        {"text": "a"}, "not UTF-8", "longer than 64 bytes", {"text": None},
    ]  # fmt: skip


def test_a_category_of_parquet_is_text():
    assert rows_of("parquet", parquet({"text": pa.array(["a", "b", "a"]).dictionary_encode()}))[2] == {"text": "a"}


DATA = {
    "jsonl": b"".join(b'{"text": "%d"}\n\n' % row for row in range(2500)),
    "csv": b"text,other\n" + b"".join(b'"%d\n",\n' % row for row in range(2500)),
    "parquet": parquet({"text": [str(row) for row in range(2500)]}, row_group_size=700),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("row", [0, 1, 699, 700, 999, 1000, 2100, 2499])
def test_reading_can_begin_at_any_row(name, row):
    reader = open_format(name, LIMIT)
    index = reader.index(opened(DATA[name]), ["text"])
    assert index.rows == 2500
    place, skip = (index.places[row // STRIDE], row % STRIDE) if index.places else (0, row)
    rows = reader.read(opened(DATA[name]), ["text"], index.header, place, skip)
    assert [each["text"].strip() for each in islice(rows, 3)] == [str(n) for n in range(row, min(row + 3, 2500))]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("csv", b"id,tekst\n1,a\n"),
        ("csv", b"text,text\na,b\n"),
        ("csv", b""),
        ("parquet", parquet({"tekst": ["a"]})),
        ("parquet", b"no such file"),
    ],
)
def test_a_file_without_the_column_is_refused(name, data):
    with pytest.raises(ConfigError):
        open_format(name, LIMIT).index(opened(data), ["text"])


def test_a_csv_file_that_is_written_is_one_that_can_be_read():
    file = io.BytesIO()
    writer = open_format("csv", LIMIT).writer(file, {"id": str, "labels": list, "truncated": bool})
    writer.write([{"id": 'a,"\nb', "labels": [{"label": "é"}]}, {"id": 7, "labels": [], "truncated": True}])
    writer.close()
    assert file.getvalue().decode() == ('id,labels,truncated\n"a,""\nb","[{""label"": ""é""}]",false\n7,[],true\n')


def test_a_parquet_file_has_a_row_group_for_many_answers(monkeypatch):
    monkeypatch.setattr("app.scoring.parquet.GROUP_ROWS", 4)
    file = io.BytesIO()
    writer = open_format("parquet", LIMIT).writer(file, {"id": int, "score": float, "truncated": bool})
    for start in range(0, 10, 2):
        writer.write([{"id": start, "score": 0.5}, {"id": start + 1, "score": 1.0, "truncated": True}])
    writer.close()
    found = pq.ParquetFile(io.BytesIO(file.getvalue()))
    assert found.num_row_groups == 3
    assert found.read().column("id").to_pylist() == list(range(10))
    assert found.read().column("truncated").to_pylist() == [False, True] * 5


def test_every_suffix_is_of_a_format():
    assert {open_format(name, 1).__class__.__name__ for name in formats.SUFFIXES.values()} == {
        "Jsonl",
        "Csv",
        "Parquet",
    }
