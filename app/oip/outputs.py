"""Outputs of the Open Inference Protocol, whatever carries them: which were asked for, how large an answer may be,
classification, raw bytes. Knows no model and no JSON.

Source: the protocol's "Inference Response" object, and Triton's classification extension.
"""

from collections.abc import Sequence

import numpy as np

from app.artifact.datatypes import Array, Tensors, datatype_of
from app.errors import BadRequest, Invalid
from app.oip.tensors import MAX_STRINGS

# Of the answer to the largest body allowed, in units of that body. An answer is in memory until the client has read it.
MAX_ANSWER = 4


class Room:
    """What is left of the bytes that an answer may have."""

    def __init__(self, most_bytes: int) -> None:
        self._most = self._left = most_bytes

    def take(self, size_bytes: int) -> None:
        """Raises Invalid if that is more than there is."""
        self._left -= size_bytes
        if self._left < 0:
            raise Invalid(
                f"outputs: expected an answer of at most {self._most} bytes: ask for fewer rows or outputs, or for "
                "binary ones (`binary_data`)"
            )


def chosen(outputs: Tensors, index: int, name: str, *, shared_memory: bool) -> Array:
    """The output that a request names in its place `index`. Raises BadRequest for an unknown one."""
    where = f"outputs[{index}]"
    if name not in outputs:
        raise BadRequest(f"{where}: unknown output; this model has {', '.join(outputs)}")
    if shared_memory:
        raise BadRequest(f"{where}: parameter shared_memory_region is not supported")
    return outputs[name]


def raw_of(array: Array, room: Room) -> Array | bytearray:
    """A tensor's raw bytes. Of BYTES, takes from `room` as they are made; other datatypes' size is known before."""
    if array.dtype.kind not in "OUS":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).ravel().view(np.uint8)
    raw = bytearray()
    for item in array.ravel():
        element = item if isinstance(item, bytes) else str(item).encode()
        room.take(4 + len(element))
        raw += len(element).to_bytes(4, "little")
        raw += element
    return raw


def classified(array: Array, count: int, labels: Sequence[str], *, rows: bool) -> Array:
    """The `count` largest values of each row as texts `value:index:label`, largest first: BYTES [rows, count], or
    BYTES [count] of an array whose first axis is not `rows`. The label is left out unless there is one for each value.

    Raises BadRequest for an output that is no numbers, Invalid for more than MAX_STRINGS texts.
    """
    if array.dtype.kind not in "iuf":
        raise BadRequest(f"outputs: classification: expected an output of numbers, found {datatype_of(array)}")
    table = array.reshape(len(array) if rows else 1, -1)
    count = min(count, table.shape[1])
    if count * len(table) > MAX_STRINGS:
        raise Invalid(f"outputs: classification: expected at most {MAX_STRINGS} classes in one answer")
    shown = "{:f}" if array.dtype.kind == "f" else "{}"
    names = [f":{label}" for label in labels] if len(labels) == table.shape[1] else [""] * table.shape[1]
    best = np.argsort(table, axis=1, kind="stable")[:, ::-1][:, :count]
    found = np.empty(best.shape, np.object_)
    for place, index in np.ndenumerate(best):
        found[place] = f"{shown.format(table[place[0], index])}:{index}{names[index]}"
    return found if rows else found[0]
