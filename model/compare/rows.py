"""The labelled data set: JSONL or CSV with `text`, `label` and perhaps `slice`. Knows no model."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct

from app.errors import ConfigError

# Where a data set has no slices: by the characters of a text.
LENGTHS = (32, 64, 128, 256)


class Row(Struct, frozen=True):
    """number: from 1, as it stands in the file, blank lines left out."""

    number: int
    text: str
    label: str
    slice: str


def read_rows(path: Path) -> list[Row]:
    """Raises ConfigError, which names the row and never quotes it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                found = [_row(path, number, row) for number, row in enumerate(csv.DictReader(file), start=1)]
            elif path.suffix == ".jsonl":
                found = [_row(path, number, row) for number, row in enumerate(_json_rows(path, file), start=1)]
            else:
                raise ConfigError(f"{path}: expected a file named .jsonl or .csv")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8") from None
    except csv.Error as error:
        raise ConfigError(f"{path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise ConfigError(f"{path}: expected at least one row, found none")
    return found


def _json_rows(path: Path, lines: Iterable[str]) -> Iterable[Any]:
    for number, line in enumerate(filter(str.strip, lines), start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise ConfigError(f"{path}: row {number}: expected one JSON object on a line") from None


def _row(path: Path, number: int, row: Any) -> Row:
    values = row if isinstance(row, dict) else {}
    text, label, part = values.get("text"), values.get("label"), values.get("slice")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{path}: row {number}: `text`: expected a string that is not blank")
    if not isinstance(label, str) or not label:
        raise ConfigError(f"{path}: row {number}: `label`: expected a string")
    if part is not None and not isinstance(part, str):
        raise ConfigError(f"{path}: row {number}: `slice`: expected a string")
    return Row(number, text, label, part or _by_length(text))


def _by_length(text: str) -> str:
    low = 0
    for high in LENGTHS:
        if len(text) <= high:
            return f"{low + 1} to {high} characters"
        low = high
    return f"over {low} characters"
