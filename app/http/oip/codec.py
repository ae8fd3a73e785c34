"""Open Inference Protocol v2 requests → tensors, JSON and the binary tensor extension. Knows no model and no HTTP.

Sources: the protocol's "Inference Request" object, and Triton's binary tensor data extension (raw little-endian tensors
after the JSON header; BYTES elements each behind their length as uint32).
"""

from math import prod
from typing import Annotated

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from app.artifact.datatypes import DATATYPES, Array, Tensors
from app.errors import BadRequest, Invalid
from app.http.oip.json_data import array_of
from app.http.request import MAX_STRINGS

# What numpy can hold.
MAX_RANK, MAX_ELEMENTS = 64, 1 << 40
# Of inputs, and of outputs asked for.
MAX_TENSORS, MAX_NAME_CHARACTERS = 1024, 1024
# It comes back in the answer.
MAX_ID_CHARACTERS = 256
MAX_SHAPE_BYTES = 4096
_SHAPE = msgspec.json.Decoder(list[Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)]])

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
# Not read before it is known how large they are.
Sizes = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {"type": "integer"}})]
Data = Annotated[Raw, Meta(extra_json_schema={"type": "array", "items": {}})]


# `gc=False`: thousands of them are read in less time than the garbage collector would take to look at them.
class RequestParameters(Struct, gc=False, frozen=True):
    """timeout: microseconds, 0 for none."""

    timeout: Count = 0
    binary_data_output: bool = False


class InputParameters(Struct, gc=False, frozen=True):
    binary_data_size: Count | None = None
    shared_memory_region: Raw | UnsetType = UNSET


class OutputParameters(Struct, gc=False, frozen=True):
    """classification: how many of the largest values to answer in the place of all; 0 for all."""

    binary_data: bool | None = None
    classification: Count = 0
    shared_memory_region: Raw | UnsetType = UNSET


class InputTensor(Struct, gc=False):
    name: str
    shape: Sizes
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Data | UnsetType = UNSET


class RequestedOutput(Struct, gc=False):
    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(Struct, gc=False):
    """The JSON part of a request."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: RequestParameters = RequestParameters()
    outputs: list[RequestedOutput] = []


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

    Raises BadRequest naming the input whose data do not fit its shape and datatype, Invalid for one without elements
    and for more strings than MAX_STRINGS; BadRequest also for what makes an answer larger than its question: an output
    named twice, a long id.
    """
    if len(request.id) > MAX_ID_CHARACTERS:
        raise BadRequest(f"id: expected at most {MAX_ID_CHARACTERS} characters")
    _check_names("inputs", [spec.name for spec in request.inputs])
    _check_names("outputs", [spec.name for spec in request.outputs])
    tensors: Tensors = {}
    offset = strings = 0
    for index, spec in enumerate(request.inputs):
        # A name is the client's own text: it is not repeated in errors.
        where = f"inputs[{index}]"
        if spec.datatype not in DATATYPES:
            raise BadRequest(f"{where}: datatype: expected one of {', '.join(DATATYPES)}")
        shape = _shape(where, bytes(spec.shape))
        strings += prod(shape) if spec.datatype == "BYTES" else 0
        if strings > MAX_STRINGS:
            raise Invalid(f"{where}: expected at most {MAX_STRINGS} BYTES elements in one request")
        if spec.parameters.shared_memory_region is not UNSET:
            raise BadRequest(f"{where}: parameter shared_memory_region is not supported")
        size = spec.parameters.binary_data_size
        if size is None:
            if spec.data is UNSET:
                raise BadRequest(f"{where}: expected `data` or the parameter `binary_data_size`")
            tensors[spec.name] = array_of(where, spec.datatype, shape, bytes(spec.data))
            continue
        if spec.data is not UNSET:
            raise BadRequest(f"{where}: both `data` and `binary_data_size` given")
        left = len(binary) - offset
        if size > left:
            raise BadRequest(f"{where}: binary_data_size: expected 0 to {left}, what is left of the body")
        tensors[spec.name] = _from_binary(where, spec.datatype, shape, binary[offset : offset + size])
        offset += size
    if offset != len(binary):
        raise BadRequest(f"body: {len(binary) - offset} bytes after the last tensor")
    return tensors


def _check_names(where: str, names: list[str]) -> None:
    if len(names) > MAX_TENSORS or any(len(name) > MAX_NAME_CHARACTERS for name in names):
        raise BadRequest(f"{where}: expected at most {MAX_TENSORS}, names of at most {MAX_NAME_CHARACTERS} characters")
    if len(set(names)) != len(names):
        raise BadRequest(f"{where}: one is named twice")


def _shape(where: str, text: bytes) -> list[int]:
    try:
        # JSON integers may have thousands of digits, each of which costs.
        shape = _SHAPE.decode(text) if len(text) <= MAX_SHAPE_BYTES else None
    except msgspec.DecodeError:
        shape = None
    if shape is None or len(shape) > MAX_RANK:
        raise BadRequest(f"{where}: shape: expected at most {MAX_RANK} sizes of 1 to {MAX_ELEMENTS}")
    if prod(max(1, size) for size in shape) > MAX_ELEMENTS:
        raise BadRequest(f"{where}: shape: expected at most {MAX_ELEMENTS} elements")
    # Beside a size of 0 any other would fit the data, also one that rows are made by.
    if 0 in shape:
        raise Invalid(f"{where}: shape: expected no size of 0")
    return shape


def _from_binary(where: str, datatype: str, shape: list[int], raw: memoryview) -> Array:
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
    # The header's length decides where a tensor starts; ONNX Runtime wants it where its elements align.
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
