"""Open Inference Protocol v2 requests → tensors, JSON and the binary tensor extension. Knows no model and no HTTP.

Sources: the protocol's "Inference Request" object, and Triton's binary tensor data extension: raw tensors after the
JSON header.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from app.artifact.datatypes import Tensors
from app.errors import BadRequest
from app.http.oip.json_data import array_of
from app.oip.tensors import MAX_ELEMENTS, DeclaredInputs, array_from_raw

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

    Raises BadRequest naming the input whose data do not fit its shape and datatype, and as DeclaredInputs.
    """
    names = [[spec.name for spec in specs] for specs in (request.inputs, request.outputs)]
    declared = DeclaredInputs(request.id, *names)
    tensors: Tensors = {}
    offset = 0
    for index, spec in enumerate(request.inputs):
        where = f"inputs[{index}]"
        shared_memory = spec.parameters.shared_memory_region is not UNSET
        shape = declared.check(where, spec.datatype, _shape(bytes(spec.shape)), shared_memory=shared_memory)
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
        tensors[spec.name] = array_from_raw(where, spec.datatype, shape, binary[offset : offset + size])
        offset += size
    if offset != len(binary):
        raise BadRequest(f"body: {len(binary) - offset} bytes after the last tensor")
    return tensors


def _shape(text: bytes) -> list[int] | None:
    # JSON integers may have thousands of digits, each of which costs.
    if len(text) > MAX_SHAPE_BYTES:
        return None
    try:
        return _SHAPE.decode(text)
    except msgspec.DecodeError:
        return None
