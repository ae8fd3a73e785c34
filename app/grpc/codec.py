"""ModelInferRequest → tensors, and tensors → ModelInferResponse: typed contents and raw ones. Knows no model.

Sources: the comments of protocol/open_inference.proto, and Triton's parameters `timeout` and `classification`.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
from google.protobuf.message import DecodeError, Message

from app.artifact.datatypes import DATATYPES, Array, Tensors, datatype_of
from app.errors import BadRequest, Invalid
from app.grpc.protocol.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from app.oip.outputs import Room, chosen, classified, raw_of
from app.oip.tensors import MAX_TENSORS, DeclaredInputs, array_from_raw

# The field of typed contents; FP16 has none.
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# Of protobuf's encoding: kinds of fields, and the keys of `inputs` and `outputs`.
VARINT, FIXED64, LENGTH = 0, 1, 2
TENSORS = (5 << 3 | LENGTH, 6 << 3 | LENGTH)
SMALL_BYTES, MAX_PARTS = 32768, 16384
# Of a negative number, the most that any takes.
WIDEST_BYTES = 10
# Elements converted at a time: a longer list would hold every other thread.
PIECE_ELEMENTS = 4096
SHARED_MEMORY = "shared_memory_region"
Parameters = Mapping[str, InferParameter]
M = TypeVar("M", bound=Message)


def parse(kind: type[M], raw: bytes) -> M:
    """The message. Raises BadRequest if these bytes are none."""
    try:
        return cast("M", kind.FromString(raw))
    except DecodeError:
        raise BadRequest(f"message: expected a {kind.__name__}") from None


def number(parameters: Parameters, name: str) -> int:
    """A parameter that is a number of at least 0; 0 if it is not given. Raises BadRequest for another."""
    if name not in parameters:
        return 0
    kind = parameters[name].WhichOneof("parameter_choice")
    value = getattr(parameters[name], kind) if kind in ("int64_param", "uint64_param") else -1
    if value < 0:
        raise BadRequest(f"parameter {name}: expected an int64 or uint64 of at least 0")
    return int(value)


def require_few_parts(raw: bytes) -> None:
    """Raises Invalid for a ModelInferRequest of more fields, those of its tensors included, than any needs: two bytes
    may be a tensor, which takes a hundred in memory. Broken bytes are left to the parser."""
    if len(raw) < SMALL_BYTES:
        return
    parts, pending = 0, [(0, len(raw), True)]
    with suppress(IndexError):  # it ends too early, or has a number that is none
        while pending:
            at, end, whole = pending.pop()
            while at < end:
                parts += 1
                if parts > MAX_PARTS:
                    raise Invalid(f"message: expected at most {MAX_PARTS} fields")
                key, at = _varint(raw, at)
                size, at = _varint(raw, at) if key & 7 in (VARINT, LENGTH) else (8 if key & 7 == FIXED64 else 4, at)
                if key & 7 == VARINT:
                    continue
                if whole and key in TENSORS:
                    pending.append((at, min(at + size, end), False))
                at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number there, and where it ends. Raises IndexError for one that does not end in time."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def decode_request(raw: bytes) -> tuple[ModelInferRequest, Tensors]:
    """The request and its inputs. Raises BadRequest naming the input whose data do not fit its shape and datatype, and
    as DeclaredInputs."""
    require_few_parts(raw)
    request = parse(ModelInferRequest, raw)
    # One more than there may be is enough to refuse them: millions fit into a message.
    some = (request.inputs[: MAX_TENSORS + 1], request.outputs[: MAX_TENSORS + 1])
    names = [[spec.name for spec in specs] for specs in some]
    declared = DeclaredInputs(request.id, *names)
    blobs = request.raw_input_contents
    if blobs and len(blobs) != len(request.inputs):
        raise BadRequest(f"raw_input_contents: expected one for each of {len(request.inputs)} inputs, or none")
    tensors: Tensors = {}
    for index, spec in enumerate(request.inputs):
        where = f"inputs[{index}]"
        shape = declared.check(where, spec.datatype, spec.shape, shared_memory=SHARED_MEMORY in spec.parameters)
        if not blobs:
            tensors[spec.name] = _from_contents(where, spec.datatype, shape, spec.contents)
        elif spec.HasField("contents"):
            raise BadRequest(f"{where}: both contents and raw_input_contents given")
        else:
            tensors[spec.name] = array_from_raw(where, spec.datatype, shape, memoryview(blobs[index]))
    return request, tensors


def _from_contents(where: str, datatype: str, shape: list[int], contents: Message) -> Array:
    field = CONTENTS.get(datatype)
    if field is None:
        raise BadRequest(f"{where}: {datatype} has no typed contents: send raw_input_contents")
    values = getattr(contents, field)
    if len(values) != prod(shape):
        raise BadRequest(f"{where}: {field}: expected {prod(shape)} elements as shape says, found {len(values)}")
    if len(contents.ListFields()) != 1:
        raise BadRequest(f"{where}: contents: expected only {field} for {datatype}")
    dtype = DATATYPES[datatype]
    array: Array = np.empty(len(values), dtype)
    for start in range(0, len(values), PIECE_ELEMENTS):
        piece = values[start : start + PIECE_ELEMENTS]
        try:
            array[start : start + len(piece)] = np.array(piece, dtype)
        except OverflowError:
            raise BadRequest(f"{where}: {field}: a value does not fit {datatype}") from None
    return array.reshape(shape)


def encode_response(
    request: ModelInferRequest,
    model: tuple[str, str],
    outputs: Tensors,
    labels: Sequence[str],
    most_bytes: int,
    *,
    by_rows: bool,
) -> bytes:
    """The response: the outputs asked for, in their order, raw if the inputs came raw, or if one of them is FP16.

    model: name and version. labels, by_rows: for classification. Raises BadRequest for an unknown output, Invalid for
    more than `most_bytes`, before they are made.
    """
    room = Room(most_bytes)
    tensors = [(name, datatype_of(array), array) for name, array in _chosen(request, outputs, labels, by_rows)]
    typed = not request.raw_input_contents and all(datatype in CONTENTS for _, datatype, _ in tensors)
    response = ModelInferResponse(model_name=model[0], model_version=model[1], id=request.id)
    for _, datatype, array in tensors:
        # Texts are counted when they are at hand.
        if datatype != "BYTES":
            room.take(array.size * WIDEST_BYTES if typed else array.nbytes)
    for name, datatype, array in tensors:
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            getattr(output.contents, CONTENTS[datatype]).extend(_elements(array, room))
        else:
            response.raw_output_contents.append(bytes(raw_of(array, room)))
    return cast("bytes", response.SerializeToString())


def _chosen(
    request: ModelInferRequest, outputs: Tensors, labels: Sequence[str], by_rows: bool
) -> Iterable[tuple[str, Array]]:
    if not request.outputs:
        yield from outputs.items()
    for index, want in enumerate(request.outputs):
        array = chosen(outputs, index, want.name, shared_memory=SHARED_MEMORY in want.parameters)
        if count := number(want.parameters, "classification"):
            array = classified(array, count, labels, rows=by_rows)
        yield want.name, array


def _elements(array: Array, room: Room) -> Iterable[Any]:
    if array.dtype.kind not in "OUS":
        flat = array.ravel()
        for start in range(0, flat.size, PIECE_ELEMENTS):
            yield from flat[start : start + PIECE_ELEMENTS].tolist()
        return
    for item in array.ravel():
        element = item if isinstance(item, bytes) else str(item).encode()
        room.take(2 + len(element))
        yield element
