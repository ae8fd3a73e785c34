"""Parquet files, read row group by row group and column by column, and written. Knows no tasks."""

from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import Any, BinaryIO, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import Struct

from app.artifact.datatypes import DTYPES
from app.artifact.manifest import TensorSpec
from app.errors import ConfigError
from app.scoring.formats import NOT_UTF8, Answers, Bad, Index, Row, Writer

BATCH_ROWS = 2048
# Answers that are kept until they become a row group.
GROUP_ROWS = 1 << 15
PLAIN = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}


class Parquet:
    """See `app.scoring.formats.Format`. A row's place is its number: every reader finds its own row groups."""

    def __init__(self, max_row_bytes: int) -> None:
        self._max_row_bytes = max_row_bytes

    def index(self, file: BufferedReader, columns: Sequence[str]) -> Index:
        try:
            found = pq.ParquetFile(file)
        except (ValueError, OSError) as error:
            raise ConfigError(f"not a Parquet file: {type(error).__name__}") from None
        schema = found.schema_arrow
        for column in columns:
            if len(schema.get_all_field_indices(column)) != 1:
                raise ConfigError(f"expected a column {column!r}, found {schema.names}")
        kinds = [schema.field(column).type for column in columns]
        return Index(found.metadata.num_rows, [], [str(getattr(kind, "value_type", kind)) for kind in kinds])

    def read(
        self, file: BufferedReader, columns: Sequence[str], header: list[str], place: int, skip: int
    ) -> Iterator[Row]:
        found, first = pq.ParquetFile(file, buffer_size=1 << 20), place + skip
        groups: list[int] = []
        for group in range(found.num_row_groups):
            rows = found.metadata.row_group(group).num_rows
            if first >= rows and not groups:
                first -= rows
            else:
                groups.append(group)
        for batch in found.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns)):
            part = batch.slice(min(first, len(batch)))
            first -= len(batch) - len(part)
            values = [self._values(part.column(column)) for column in columns]
            for row in zip(*values, strict=True):
                bad = next((value for value in row if isinstance(value, Bad)), None)
                yield dict(zip(columns, row, strict=True)) if bad is None else bad

    def _values(self, column: Any) -> list[Any]:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            found: list[Any] = column.to_pylist()
            return found
        # As bytes: one value that is not UTF-8 would take all others with it.
        return [None if value is None else self._text(value) for value in column.cast(pa.large_binary()).to_pylist()]

    def _text(self, value: bytes) -> str:
        if len(value) > self._max_row_bytes:
            return Bad(f"longer than {self._max_row_bytes} bytes")
        try:
            return value.decode()
        except UnicodeDecodeError:
            return NOT_UTF8

    def writer(self, file: BinaryIO, fields: dict[str, Any]) -> Writer:
        return _ParquetWriter(file, fields)


class _ParquetWriter:
    def __init__(self, file: BinaryIO, fields: dict[str, Any]) -> None:
        self._schema = pa.schema([(name, arrow_type(kind)) for name, kind in fields.items()])
        self._writer = pq.ParquetWriter(file, self._schema)
        self._waiting: Answers = []

    def write(self, answers: Answers) -> None:
        self._waiting += [{"truncated": False} | each for each in answers]
        if len(self._waiting) >= GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
        self._waiting = []

    def close(self) -> None:
        if self._waiting:
            self._write()
        self._writer.close()


def arrow_type(kind: Any) -> Any:
    """Of a TensorSpec without its rows, of a Struct, a type of one's fields or several by name, or of a column that
    was read. Raises ConfigError for a column of another kind than text or numbers."""
    if isinstance(kind, TensorSpec):
        found = pa.string() if kind.datatype == "BYTES" else pa.from_numpy_dtype(DTYPES[kind.datatype])
        for _ in kind.shape[1:]:
            found = pa.list_(found)
        return found
    if isinstance(kind, str):
        try:
            return pa.type_for_alias(kind)
        except ValueError:
            raise ConfigError(f"--id-column: expected a column of text or numbers, found {kind}") from None
    if isinstance(kind, dict):
        return pa.struct([(name, arrow_type(each)) for name, each in kind.items()])
    if get_origin(kind) is list:
        return pa.list_(arrow_type(get_args(kind)[0]))
    if isinstance(kind, type) and issubclass(kind, Struct):
        return arrow_type(get_type_hints(kind))
    return PLAIN[kind]
