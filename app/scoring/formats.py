"""Rows of JSONL, CSV and Parquet files, from any row on, a bounded part in memory; and files of rows. Knows no tasks.

A row is its columns by name, or `Bad`: why it is none. Blank lines are no rows.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader, TextIOWrapper
from typing import Any, BinaryIO, Protocol

import msgspec

from app.errors import ConfigError


class Bad(str):
    """Why a row, or a value of one, cannot be scored; never what it holds."""

    __slots__ = ()


Row = dict[str, Any] | Bad
Answers = list[dict[str, Any]]
NOT_UTF8 = Bad("not UTF-8")
# How many rows apart the places in a file are that an index of it has.
STRIDE = 1000


class Index(msgspec.Struct):
    """Of one file. places: the byte at which every STRIDE-th row begins; none where rows are found otherwise."""

    rows: int
    places: list[int]
    header: list[str] = []


class Writer(Protocol):
    def write(self, answers: Answers) -> None: ...
    def close(self) -> None:
        """Ends what is written; leaves the file open."""


class Format(Protocol):
    """max_row_bytes: a longer row is bad."""

    def __init__(self, max_row_bytes: int) -> None: ...

    def index(self, file: BufferedReader, columns: Sequence[str]) -> Index:
        """One pass over a file. Raises ConfigError if it does not have the columns."""

    def read(
        self, file: BufferedReader, columns: Sequence[str], header: list[str], place: int, skip: int
    ) -> Iterator[Row]:
        """The rows from `skip` rows behind `place` on."""

    def writer(self, file: BinaryIO, fields: dict[str, Any]) -> Writer:
        """fields: names of the columns, and their types as `app.scoring.parquet` knows them."""


def _lines(file: BufferedReader, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Each line's size, and the line; None in the place of one that is longer than `most` bytes."""
    while line := file.readline(most):
        size = len(line)
        if size < most or line.endswith(b"\n"):
            yield size, line
            continue
        while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
            size += len(line)
        yield size, None


class _Text:
    """What files of lines share. `_rows` yields for each row where the next begins, and the row."""

    _rows: Callable[..., Iterator[tuple[int, Row]]]

    def __init__(self, max_row_bytes: int) -> None:
        self.max_row_bytes = max_row_bytes
        self._too_long = Bad(f"longer than {max_row_bytes} bytes")

    def _header(self, file: BufferedReader, columns: Sequence[str]) -> tuple[int, list[str]]:
        """Where the first row begins, and the names of the columns if the file has them at all."""
        return (3 if file.peek(3)[:3] == b"\xef\xbb\xbf" else 0), []

    def writer(self, file: BinaryIO, fields: dict[str, Any]) -> Writer:
        raise NotImplementedError

    def index(self, file: BufferedReader, columns: Sequence[str]) -> Index:
        begin, header = self._header(file, columns)
        file.seek(begin)
        index = Index(0, [], header)
        for end, _ in self._rows(file, begin, header, parse=False):
            if index.rows % STRIDE == 0:
                index.places.append(begin)
            index.rows, begin = index.rows + 1, end
        return index

    def read(
        self, file: BufferedReader, columns: Sequence[str], header: list[str], place: int, skip: int
    ) -> Iterator[Row]:
        file.seek(place)
        for number, (_, row) in enumerate(self._rows(file, place, header, parse=True)):
            if number >= skip:
                yield row


class Jsonl(_Text):
    """A JSON object in each line."""

    def _rows(self, file: BufferedReader, place: int, header: list[str], *, parse: bool) -> Iterator[tuple[int, Row]]:
        for size, line in _lines(file, self.max_row_bytes):
            place += size
            if line is None:
                yield place, self._too_long
            elif not line.isspace():
                yield place, _object(line) if parse else {}

    def writer(self, file: BinaryIO, fields: dict[str, Any]) -> Writer:
        return _JsonlWriter(file)


def _object(line: bytes) -> Row:
    try:
        found = msgspec.json.decode(line)
    except UnicodeDecodeError:
        return NOT_UTF8
    except (msgspec.DecodeError, RecursionError):
        return Bad("not JSON")
    return found if isinstance(found, dict) else Bad("not a JSON object")


class _JsonlWriter:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()

    def write(self, answers: Answers) -> None:
        self._file.write(self._encoder.encode_lines(answers))

    def close(self) -> None:
        pass


class _Records:
    """A CSV file's lines as `csv.reader` takes them, and what is wrong with those of the record it is at."""

    def __init__(self, file: BufferedReader, most: int, too_long: Bad) -> None:
        self._lines = _lines(file, most)
        self._too_long = too_long
        self.size = 0
        self.wrong: Bad | None = None

    def __iter__(self) -> Iterator[str]:
        for size, line in self._lines:
            self.size += size
            if line is None:
                self.wrong, line = self._too_long, b"\n"
            try:
                yield line.decode()
            except UnicodeDecodeError:
                self.wrong = NOT_UTF8
                yield line.decode(errors="replace")


class Csv(_Text):
    """As RFC 4180: commas, quotes, a header; a value may have line breaks in quotes."""

    def __init__(self, max_row_bytes: int) -> None:
        super().__init__(max_row_bytes)
        # Of the whole process, which reads nothing else; a quote that is never closed ends there.
        csv.field_size_limit(max_row_bytes)

    def _header(self, file: BufferedReader, columns: Sequence[str]) -> tuple[int, list[str]]:
        begin, _ = super()._header(file, columns)
        file.seek(begin)
        records = _Records(file, self.max_row_bytes, self._too_long)
        try:
            header = next(csv.reader(records), [])
        except csv.Error:
            header = []
        for column in columns:
            if header.count(column) != 1:
                raise ConfigError(f"expected one column {column!r} in the first line, found {header.count(column)}")
        return begin + records.size, header

    def _rows(self, file: BufferedReader, place: int, header: list[str], *, parse: bool) -> Iterator[tuple[int, Row]]:
        records = _Records(file, self.max_row_bytes, self._too_long)
        reader = csv.reader(records)
        while True:
            found: list[str] = []
            try:
                found = next(reader)
            except StopIteration:
                return
            except csv.Error:
                records.wrong = records.wrong or Bad("not CSV, or a value that is too long")
            wrong, records.wrong = records.wrong, None
            if wrong is not None:
                yield place + records.size, wrong
            elif found and len(found) != len(header):
                yield place + records.size, Bad(f"expected {len(header)} columns, found {len(found)}")
            elif found:
                yield place + records.size, dict(zip(header, found, strict=True)) if parse else {}

    def writer(self, file: BinaryIO, fields: dict[str, Any]) -> Writer:
        return _CsvWriter(file, fields)


class _CsvWriter:
    def __init__(self, file: BinaryIO, fields: dict[str, Any]) -> None:
        self._text = TextIOWrapper(file, "utf-8", newline="", write_through=True)
        self._rows = csv.writer(self._text, lineterminator="\n")
        self._names = list(fields)
        self._rows.writerow(self._names)

    def write(self, answers: Answers) -> None:
        self._rows.writerows([_cell(each.get(name, False)) for name in self._names] for each in answers)

    def close(self) -> None:
        self._text.detach()


def _cell(value: Any) -> str:
    """Text as it is, everything else as JSON has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def open_format(name: str, max_row_bytes: int) -> Format:
    """One of `jsonl`, `csv`, `parquet`."""
    if name == "parquet":
        # It takes longer to import than everything else together.
        from app.scoring.parquet import Parquet

        return Parquet(max_row_bytes)
    return {"jsonl": Jsonl, "csv": Csv}[name](max_row_bytes)


SUFFIXES = {"jsonl": "jsonl", "ndjson": "jsonl", "csv": "csv", "parquet": "parquet"}
