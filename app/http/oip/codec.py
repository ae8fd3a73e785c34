"""Open Inference Protocol v2 bodies ↔ tensors, JSON and the binary tensor extension. Knows no model and no HTTP.

Sources: the protocol's "Inference Request" and "Inference Response" objects, and Triton's binary tensor data extension
(raw little-endian tensors after the JSON header; BYTES elements each behind their length as uint32).
"""

from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from app.artifact.datatypes import DATATYPES, Array, Tensors, datatype_of
from app.errors import BadRequest, Invalid

Parameters = dict[str, Any]
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "u": {int}, "i": {int}, "f": {int, float}, "O": {str}}
# What numpy can hold.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 40
# It comes back in the answer.
MAX_ID_CHARACTERS = 256
_UNSUPPORTED = ("shared_memory_region", "classification")


class InputTensor(Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters = {}
    data: list[Any] | None = None


class RequestedOutput(Struct):
    name: str
    parameters: Parameters = {}


class InferRequest(Struct):
    """The JSON part of a request."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[RequestedOutput] = []


class OutputTensor(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: list[Any] | None = None


class InferResponse(Struct, omit_defaults=True):
    """The JSON part of a response."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON part and the binary part. header_length: the `Inference-Header-Content-Length` header, if any.

    Raises BadRequest if it is not a length within the body.
    """
    if header_length is None:
        return body, memoryview(b"")
    valid = header_length.isascii() and header_length.isdigit() and len(header_length) < 16
    if not valid or int(header_length) > len(body):
        raise BadRequest(f"Inference-Header-Content-Length: expected 0 to {len(body)}, the body's size")
    view = memoryview(body)
    return bytes(view[: int(header_length)]), view[int(header_length) :]


def decode_tensors(request: InferRequest, binary: memoryview) -> Tensors:
    """The request's inputs.

    Raises BadRequest naming the input whose data do not fit its shape and datatype, Invalid for one without elements;
    BadRequest also for what makes an answer larger than its question: an output named twice, a long id.
    """
    if len(request.id) > MAX_ID_CHARACTERS:
        raise BadRequest(f"id: expected at most {MAX_ID_CHARACTERS} characters")
    if len({output.name for output in request.outputs}) != len(request.outputs):
        raise BadRequest("outputs: one is named twice")
    tensors: Tensors = {}
    offset = 0
    for index, spec in enumerate(request.inputs):
        # A name is the client's own text: it is not repeated in errors.
        where = f"inputs[{index}]"
        if spec.name in tensors:
            raise BadRequest(f"{where}: name given twice")
        if spec.datatype not in DATATYPES:
            raise BadRequest(f"{where}: datatype: expected one of {', '.join(DATATYPES)}")
        # Checked before anything is multiplied or printed: JSON integers may have thousands of digits.
        if len(spec.shape) > MAX_RANK or any(not 0 <= size <= MAX_ELEMENTS for size in spec.shape):
            raise BadRequest(f"{where}: shape: expected at most {MAX_RANK} sizes of 1 to {MAX_ELEMENTS}")
        if prod(max(1, size) for size in spec.shape) > MAX_ELEMENTS:
            raise BadRequest(f"{where}: shape: expected at most {MAX_ELEMENTS} elements")
        # Beside a size of 0 any other would fit the data, also one that rows are made by.
        if 0 in spec.shape:
            raise Invalid(f"{where}: shape: expected no size of 0")
        _refuse_unsupported(where, spec.parameters)
        size = spec.parameters.get("binary_data_size")
        if size is None:
            if spec.data is None:
                raise BadRequest(f"{where}: expected `data` or the parameter `binary_data_size`")
            tensors[spec.name] = _from_json(where, spec, spec.data)
            continue
        if spec.data is not None:
            raise BadRequest(f"{where}: both `data` and `binary_data_size` given")
        left = len(binary) - offset
        if type(size) is not int or not 0 <= size <= left:
            raise BadRequest(f"{where}: binary_data_size: expected 0 to {left}, what is left of the body")
        tensors[spec.name] = _from_binary(where, spec, binary[offset : offset + size])
        offset += size
    if offset != len(binary):
        raise BadRequest(f"body: {len(binary) - offset} bytes after the last tensor")
    return tensors


def _refuse_unsupported(where: str, parameters: Parameters) -> None:
    for name in _UNSUPPORTED:
        if name in parameters:
            raise BadRequest(f"{where}: parameter {name} is not supported")


def _from_json(where: str, spec: InputTensor, data: list[Any]) -> Array:
    """`data` may be flat or nested as the shape says. Numbers must be of the datatype: 1.5 is no INT64."""
    flat = data
    if any(type(item) is list for item in data):
        for level in range(len(spec.shape)):
            if len(flat) != prod(spec.shape[: level + 1]):
                raise BadRequest(f"{where}: data is not nested as shape says")
            if level == len(spec.shape) - 1:
                break
            if any(type(item) is not list or len(item) != spec.shape[level + 1] for item in flat):
                raise BadRequest(f"{where}: data is not nested as shape says")
            flat = list(chain.from_iterable(flat))
    if len(flat) != prod(spec.shape):
        raise BadRequest(f"{where}: data: expected {prod(spec.shape)} elements as shape says, found {len(flat)}")
    dtype = DATATYPES[spec.datatype]
    if not set(map(type, flat)) <= _JSON_TYPES[dtype.kind]:
        raise BadRequest(f"{where}: data: expected only {spec.datatype} values")
    try:
        with np.errstate(all="ignore"):
            array = np.array(flat, dtype)
    except (OverflowError, ValueError):
        raise BadRequest(f"{where}: data: a value does not fit {spec.datatype}") from None
    # JSON has no infinities: one here is a number too large for the datatype.
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise BadRequest(f"{where}: data: a value does not fit {spec.datatype}")
    return array.reshape(spec.shape)


def _from_binary(where: str, spec: InputTensor, raw: memoryview) -> Array:
    count = prod(spec.shape)
    if spec.datatype == "BYTES":
        return _split_bytes(where, raw, count).reshape(spec.shape)
    dtype = DATATYPES[spec.datatype]
    if len(raw) != count * dtype.itemsize:
        raise BadRequest(f"{where}: expected {count * dtype.itemsize} bytes as shape says, found {len(raw)}")
    if spec.datatype == "BOOL":
        flags: Array = np.frombuffer(raw, np.uint8) != 0
        return flags.reshape(spec.shape)
    array = np.frombuffer(raw, dtype.newbyteorder("<"))
    # The header's length decides where a tensor starts; ONNX Runtime wants it where its elements align.
    return np.require(array, dtype, ["A", "C"]).reshape(spec.shape)


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


def encode_response(
    request: InferRequest, model_name: str, model_version: str, outputs: Tensors
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part if binary tensors follow it (None if it is JSON alone).

    Honours the outputs asked for, in their order, each as JSON or binary. Raises BadRequest for an unknown one.
    """
    wanted = request.outputs or [RequestedOutput(name) for name in outputs]
    binary_default = request.parameters.get("binary_data_output", False) is True
    tensors: list[OutputTensor] = []
    blobs: list[bytes] = []
    for index, want in enumerate(wanted):
        where = f"outputs[{index}]"
        if want.name not in outputs:
            raise BadRequest(f"{where}: unknown output; this model has {', '.join(outputs)}")
        _refuse_unsupported(where, want.parameters)
        array = outputs[want.name]
        tensor = OutputTensor(want.name, datatype_of(array), list(array.shape))
        if want.parameters.get("binary_data", binary_default) is True:
            blobs.append(_to_binary(array))
            tensor.parameters = {"binary_data_size": len(blobs[-1])}
        else:
            tensor.data = array.ravel().tolist()
        tensors.append(tensor)
    header = msgspec.json.encode(InferResponse(model_name, model_version, tensors, request.id))
    return (b"".join([header, *blobs]), len(header)) if blobs else (header, None)


def _to_binary(array: Array) -> bytes:
    if datatype_of(array) != "BYTES":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    elements = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel()]
    return b"".join(part for item in elements for part in (len(item).to_bytes(4, "little"), item))
