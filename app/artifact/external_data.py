"""Which files an ONNX file keeps its weights in, read from its bytes: they must be the artifact's own. Knows no ONNX
Runtime, which would open them wherever they are.

Source: onnx.proto3 (ModelProto and what it holds) and Protocol Buffers' wire format.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from app.artifact.manifest import MANIFEST, Artifact
from app.errors import ArtifactError

# Message → number of a field that holds a message → which. `Entry` is a pair of strings: a key, a value.
FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "Tensor": {13: "Entry"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
# As protobuf itself: graphs hold nodes that hold graphs.
MAX_DEPTH = 100


def verify_external_data(artifact: Artifact) -> None:
    """Raises ArtifactError unless the manifest lists every file that the model keeps weights in."""
    path = artifact.path(artifact.manifest.model_file)
    folder = Path(artifact.manifest.model_file).parent
    for location in external_data(path):
        name = (folder / location).as_posix()
        if name not in artifact.manifest.files:
            raise ArtifactError(
                f"{artifact.folder / MANIFEST}: `files`: expected {name!r}, where {path.name} keeps weights; found no "
                "such entry: package the model again"
            )


def external_data(path: Path) -> list[str]:
    """The files that the ONNX file at `path` names, relative to its folder. Raises ArtifactError if it is none."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return sorted(set(_locations(data, 0, len(data), "Model", MAX_DEPTH)))
            except (IndexError, ValueError):
                raise ArtifactError(f"{path}: cannot load it: not a whole ONNX file") from None


def _locations(data: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if not depth:
        raise ValueError("nested too deeply")
    known = FIELDS[kind]
    for number, first, last in messages(data, start, end):
        inner = known.get(number)
        if inner == "Entry":
            pair = {key: data[begin:stop] for key, begin, stop in messages(data, first, last)}
            if pair.get(1) == b"location":
                yield pair.get(2, b"").decode()
        elif inner is not None:
            yield from _locations(data, first, last, inner, depth - 1)


def messages(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that is bytes. Raises ValueError or IndexError for what is no message."""
    while start < end:
        tag, start = _varint(data, start)
        wire = tag & 7
        if wire == VARINT:
            _, start = _varint(data, start)
        elif wire in FIXED_BYTES:
            start += FIXED_BYTES[wire]
        elif wire == BYTES:
            size, start = _varint(data, start)
            if start + size > end:
                raise ValueError("longer than what holds it")
            yield tag >> 3, start, start + size
            start += size
        else:
            raise ValueError("a group, or no field at all")
    if start != end:
        raise ValueError("longer than what holds it")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[start]
        start += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, start
        if shift >= 70:
            raise ValueError("a number of too many bytes")
