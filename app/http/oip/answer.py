"""Tensors → Open Inference Protocol v2 answers, JSON and the binary tensor extension. Knows no model and no HTTP.

Sources: the protocol's "Inference Response" object, and Triton's binary tensor data extension.
"""

from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np
from msgspec import UNSET, Raw, Struct

from app.artifact.datatypes import DATATYPES, Array, Tensors, datatype_of
from app.errors import RunFailed
from app.http.oip.codec import InferRequest, RequestedOutput
from app.oip.outputs import Room, chosen, raw_of

# Elements made into text at a time: longer lists would take memory, and hold every other thread.
PIECE_ELEMENTS = 1024


def _widest(name: str, dtype: np.dtype[Any]) -> int:
    """Characters of the longest number of a datatype as JSON, and a comma."""
    if dtype.kind in "iu":
        return max(len(str(np.iinfo(dtype).min)), len(str(np.iinfo(dtype).max))) + 1
    return {"BOOL": len("false,"), "BYTES": 0}.get(name, len("-2.2250738585072014e-308,"))


WIDEST = {name: _widest(name, dtype) for name, dtype in DATATYPES.items()}


class OutputTensor(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class InferResponse(Struct, omit_defaults=True):
    """The JSON part of a response."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str = ""


def encode_response(
    request: InferRequest, model_name: str, model_version: str, outputs: Tensors, most_bytes: int
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part if binary tensors follow it (None if it is JSON alone).

    Honours the outputs asked for, in their order, each as JSON or binary. Raises BadRequest for an unknown one, Invalid
    for more than `most_bytes`, before they are made; RunFailed for numbers that JSON has no words for.
    """
    wanted = []
    room = Room(most_bytes)
    for index, want in enumerate(request.outputs or map(RequestedOutput, outputs)):
        shared_memory = want.parameters.shared_memory_region is not UNSET
        array, binary = chosen(outputs, index, want.name, shared_memory=shared_memory), want.parameters.binary_data
        binary = request.parameters.binary_data_output if binary is None else binary
        datatype = datatype_of(array)
        # Texts are counted when they are at hand.
        if datatype != "BYTES":
            room.take(array.nbytes if binary else array.size * WIDEST[datatype])
        wanted.append((OutputTensor(want.name, datatype, list(array.shape)), array, binary))
    blobs: list[Any] = []
    for tensor, array, binary in wanted:
        if binary:
            blobs.append(raw_of(array, room))
            tensor.parameters = {"binary_data_size": len(blobs[-1])}
        else:
            tensor.data = _to_json(array, room)
    tensors = [tensor for tensor, _, _ in wanted]
    header = msgspec.json.encode(InferResponse(model_name, model_version, tensors, request.id))
    if b"null" in header:  # a number that is none, or a text
        _require_finite(tensors, outputs)
    return (b"".join([header, *blobs]), len(header)) if blobs else (header, None)


def _require_finite(tensors: Sequence[OutputTensor], outputs: Tensors) -> None:
    # The model's doing and not the client's: 500, so that whoever runs it sees it. `null` would hide it from both.
    for tensor in tensors:
        array = outputs[tensor.name]
        if tensor.data is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RunFailed(
                f"output {tensor.name!r}: the model answered NaN or infinity, which JSON has no word for: ask for it "
                "as binary (`binary_data`: true)"
            )


def _to_json(array: Array, room: Room) -> list[Any]:
    flat = array.ravel()
    pieces = []
    for start in range(0, flat.size, PIECE_ELEMENTS):
        values = flat[start : start + PIECE_ELEMENTS].tolist()
        if array.dtype.kind in "OUS":
            room.take(sum(map(len, values)) + 3 * len(values))
        if flat.size <= PIECE_ELEMENTS:
            return cast("list[Any]", values)
        pieces.append(msgspec.json.encode(values)[1:-1])
    # The encoder writes it as it is.
    return cast("list[Any]", Raw(b"[%b]" % b",".join(pieces)))
