"""JSON `data` of one tensor → an array, in pieces so that no other thread waits long. Knows no names, no requests."""

import re
from math import prod
from typing import Any

import msgspec
import numpy as np

from app.artifact.datatypes import DATATYPES, Array
from app.errors import BadRequest
from app.oip.tensors import MAX_STRINGS

# Numbers are parsed so much at a time: a parser holds every other thread, and some numbers take 10 microseconds.
PIECE_BYTES = 1024
_LISTS = {"b": list[bool], "u": list[int], "i": list[int], "f": list[float]}
_NUMBERS: dict[str, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(of) for kind, of in _LISTS.items()}
_TEXTS = msgspec.json.Decoder(list[str])
_SCALARS = bytes(set(range(256)) - set(b"[],"))
_NESTED = re.compile(rb"\[\s*\[")


def array_of(where: str, datatype: str, shape: list[int], text: bytes) -> Array:
    """`text`, a JSON value, may be flat or nested as the shape says. Numbers are of the datatype: 1.5 is no INT64.

    Raises BadRequest naming what was expected.
    """
    dtype = DATATYPES[datatype]
    try:
        if not text.startswith(b"["):
            raise BadRequest(f"{where}: data: expected a list")
        array = _texts(where, shape, text) if dtype.kind == "O" else _numbers(where, shape, text, dtype)
    # The parser's own words may have the client's in them.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadRequest(f"{where}: data: expected only {datatype} values, flat or nested as shape says") from None
    except (OverflowError, ValueError):
        raise BadRequest(f"{where}: data: a value does not fit {datatype}") from None
    if array.size != prod(shape):
        raise BadRequest(f"{where}: data: expected {prod(shape)} elements as shape says, found {array.size}")
    # JSON has no infinities: one here is a number too large for the datatype.
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"{where}: data: a value does not fit {datatype}")
    return array.reshape(shape)


def _texts(where: str, shape: list[int], text: bytes) -> Array:
    if not _NESTED.match(text):
        texts = _TEXTS.decode(text)
        flat = np.empty(len(texts), np.object_)
        flat[:] = texts
        return flat
    if text.count(b"[") > MAX_STRINGS:
        raise BadRequest(f"{where}: data: expected at most {MAX_STRINGS} lists; send it flat")
    kind: Any = str
    for _ in shape:
        kind = list[kind]
    nested = np.array(msgspec.json.decode(text, type=kind), np.object_)
    if nested.shape != tuple(shape):
        raise BadRequest(f"{where}: data is not nested as shape says")
    return nested


def _numbers(where: str, shape: list[int], text: bytes, dtype: np.dtype[Any]) -> Array:
    # The outer text is JSON: without its scalars, each comma is behind one element.
    structure = text.translate(None, _SCALARS)
    if (found := structure.count(b",") + 1) != prod(shape):
        raise BadRequest(f"{where}: data: expected {prod(shape)} elements as shape says, found {found}")
    if (lists := structure.count(b"[")) > 1:
        if lists != sum(prod(shape[:level]) for level in range(len(shape))) or structure != _structure(shape):
            raise BadRequest(f"{where}: data is not nested as shape says")
        text = text.translate(None, b"[]")
    else:
        text = text[1:-1]
    decoder, parts, start = _NUMBERS[dtype.kind], [], 0
    while start <= len(text):
        end = text.find(b",", start + PIECE_BYTES)
        end = len(text) if end < 0 else end
        with np.errstate(all="ignore"):
            parts.append(np.array(decoder.decode(b"[%b]" % text[start:end]), dtype))
        start = end + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _structure(shape: list[int]) -> bytes:
    """What is left of JSON data nested as the shape says when its scalars are gone."""
    text = b""
    for size in reversed(shape):
        text = b"[%b]" % ((text + b",") * size)[:-1]
    return text
