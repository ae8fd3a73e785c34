"""Tensors as the Open Inference Protocol declares them, and their raw bytes, whatever carries them. Knows no model.

Raw is little-endian and row-major; of BYTES each element is behind its length as uint32.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from app.artifact.datatypes import DATATYPES, Array
from app.errors import BadRequest, Invalid

# What numpy can hold.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 40
# Of inputs, and of outputs asked for.
MAX_TENSORS, MAX_NAME_CHARACTERS = 1024, 1024
# It comes back in the answer.
MAX_ID_CHARACTERS = 256
# In one request, and so of objects, which have names: each costs far more than its bytes.
MAX_STRINGS = 32768


class DeclaredInputs:
    """What one request says of its inputs, checked before any of their data is read."""

    def __init__(self, request_id: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """inputs, outputs: their names. Raises BadRequest for what makes an answer larger than its question: an output
        named twice, a long id."""
        if len(request_id) > MAX_ID_CHARACTERS:
            raise BadRequest(f"id: expected at most {MAX_ID_CHARACTERS} characters")
        _check_names("inputs", inputs)
        _check_names("outputs", outputs)
        self._strings = 0

    def check(self, where: str, datatype: str, shape: Sequence[int] | None, *, shared_memory: bool) -> list[int]:
        """The shape of an input. where: its place in the request, as a name is the client's own text and not repeated
        in errors. shape: None for one that could not be read. Raises BadRequest; Invalid for an input without elements
        and for more strings than MAX_STRINGS in all inputs together."""
        if datatype not in DATATYPES:
            raise BadRequest(f"{where}: datatype: expected one of {', '.join(DATATYPES)}")
        sizes = _checked_shape(where, shape)
        self._strings += prod(sizes) if datatype == "BYTES" else 0
        if self._strings > MAX_STRINGS:
            raise Invalid(f"{where}: expected at most {MAX_STRINGS} BYTES elements in one request")
        if shared_memory:
            raise BadRequest(f"{where}: parameter shared_memory_region is not supported")
        return sizes


def _check_names(where: str, names: Sequence[str]) -> None:
    if len(names) > MAX_TENSORS or any(len(name) > MAX_NAME_CHARACTERS for name in names):
        raise BadRequest(f"{where}: expected at most {MAX_TENSORS}, names of at most {MAX_NAME_CHARACTERS} characters")
    if len(set(names)) != len(names):
        raise BadRequest(f"{where}: one is named twice")


def _checked_shape(where: str, shape: Sequence[int] | None) -> list[int]:
    if shape is None or len(shape) > MAX_RANK or any(not 0 <= size <= MAX_ELEMENTS for size in shape):
        raise BadRequest(f"{where}: shape: expected at most {MAX_RANK} sizes of 1 to {MAX_ELEMENTS}")
    if prod(max(1, size) for size in shape) > MAX_ELEMENTS:
        raise BadRequest(f"{where}: shape: expected at most {MAX_ELEMENTS} elements")
    # Beside a size of 0 any other would fit the data, also one that rows are made by.
    if 0 in shape:
        raise Invalid(f"{where}: shape: expected no size of 0")
    return list(shape)


def array_from_raw(where: str, datatype: str, shape: list[int], raw: memoryview) -> Array:
    """The tensor. Raises BadRequest if its bytes are not as datatype and shape say."""
    count = prod(shape)
    if datatype == "BYTES":
        return _split_bytes(where, raw, count).reshape(shape)
    dtype = DATATYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(f"{where}: expected {count * dtype.itemsize} bytes as shape says, found {len(raw)}")
    if datatype == "BOOL":
        flags: Array = np.frombuffer(raw, np.uint8) != 0
        return flags.reshape(shape)
    array = np.frombuffer(raw, dtype.newbyteorder("<"))
    # Where a tensor starts is said by what stands before it; ONNX Runtime wants it where its elements align.
    return np.require(array, dtype, ["A", "C"]).reshape(shape)


def _split_bytes(where: str, raw: memoryview, count: int) -> Array:
    # Each element takes at least its length: a lying shape must not allocate.
    if count * 4 > len(raw):
        raise BadRequest(f"{where}: expected {count} BYTES elements as shape says, found too few bytes")
    elements = np.empty(count, np.object_)
    offset = 0
    for index in range(count):
        end = offset + 4
        length = int.from_bytes(raw[offset:end], "little")
        if end + length > len(raw):
            raise BadRequest(f"{where}: BYTES element {index} is longer than what is left")
        elements[index] = bytes(raw[end : end + length])
        offset = end + length
    if offset != len(raw):
        raise BadRequest(f"{where}: {len(raw) - offset} bytes after the last BYTES element")
    return elements
