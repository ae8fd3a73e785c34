"""Writes an artifact folder: the model's files, the manifest, its checksums. Knows no task."""

import hashlib
import re
import shutil
from pathlib import Path

import msgspec

from app.artifact.datatypes import DTYPES
from app.artifact.external_data import external_data
from app.artifact.integrity import checksum_of
from app.artifact.manifest import MANIFEST, FileEntry, Manifest, TensorSpec, path_inside
from app.errors import ArtifactError
from app.runtime.loading import load_model
from app.runtime.session import Session
from model.package.graph import QUANTIZED, Node

MODEL_FILE = "model.onnx"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# What ONNX Runtime says of a file, and what to do about it.
REMEDIES = {
    "IR version": "export for an older ONNX (onnx.save after `model.ir_version = 10`), or install a newer onnxruntime",
    "ONNX Runtime only *guarantees*": "export with a lower opset (torch.onnx.export(…, opset_version=17), skl2onnx: "
    "target_opset=17), or install a newer onnxruntime",
    "is not a registered function/op": "operators of another library cannot run here; export without them",
}


def check_name(option: str, value: str) -> None:
    """Raises ArtifactError, in words, for a name or version that no manifest takes."""
    if not NAME.fullmatch(value):
        raise ArtifactError(
            f"{option} {value!r}: expected 1 to 128 letters of a to z, digits, dots, hyphens and underscores, the "
            "first a letter or a digit: it becomes part of an address"
        )


def open_model(path: Path) -> tuple[Session, list[TensorSpec], list[TensorSpec]]:
    """The file's session on the CPU, its inputs and outputs. Raises ArtifactError that says what to do."""
    try:
        session = Session.open(path, "cpu")
    except ArtifactError as error:
        missing = [name for name in _external_data(path) if not (path.parent / name).is_file()]
        if missing:
            raise ArtifactError(
                f"{path}: keeps weights in {missing[0]!r}, which is not there: put it beside the file"
            ) from None
        remedy = next((remedy for symptom, remedy in REMEDIES.items() if symptom in str(error)), None)
        raise ArtifactError(f"{error}: {remedy}" if remedy else f"{error}") from None
    inputs, outputs = session.specs()
    if not inputs:
        raise ArtifactError(
            f"{path}: has no inputs, so it always answers the same: export what varies as an input, not a constant"
        )
    for spec in inputs:
        if 0 in spec.shape:
            raise ArtifactError(
                f"{path}: {spec.name!r}: has no elements, {spec.shape}, which no request can bring: export it without"
            )
    return session, inputs, outputs


def _external_data(path: Path) -> list[str]:
    """As `external_data`; none of what is no ONNX file."""
    try:
        return external_data(path)
    except (ArtifactError, OSError):
        return []


def copy_model(model: Path, folder: Path) -> None:
    """The ONNX file as MODEL_FILE, and the files that it keeps weights in under their own names."""
    shutil.copyfile(model, folder / MODEL_FILE)
    for name in external_data(model):
        # The ONNX file refers to it by this name.
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path_inside(model.parent, name), folder / name)


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file, streamed."""
    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Of every file in an artifact's folder but the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """manifest.json, indented for reviewers, with its own checksum."""
    blank = "0" * 64
    content = msgspec.json.encode(msgspec.structs.replace(manifest, checksum=blank))
    raw = msgspec.json.format(content, indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(raw.replace(blank.encode(), checksum_of(raw, blank).encode(), 1))


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Writes the manifest and takes the folder through the gate, without `batching` if it does not pass with it.

    Raises ArtifactError for what does not pass.
    """
    try:
        return _verified(folder, manifest)
    except ArtifactError:
        if not manifest.batching:
            raise
    return _verified(folder, msgspec.structs.replace(manifest, batching=False))


def _verified(folder: Path, manifest: Manifest) -> Manifest:
    write_manifest(folder, manifest)
    try:
        return load_model(folder).artifact.manifest
    except ArtifactError as error:
        if "outside tolerance" in str(error):
            raise ArtifactError(
                f"{error}: its answers differ from run to run; if that is rounding, give a greater --tolerance"
            ) from None
        raise


def precision_of(nodes: list[Node], *groups: list[TensorSpec]) -> str:
    """int8 for a quantised graph, else the float types of inputs and outputs: for people."""
    if any(node.operator in QUANTIZED for node in nodes):
        return "int8"
    floats = {spec.datatype for specs in groups for spec in specs if DTYPES[spec.datatype].kind == "f"}
    return ",".join(sorted(floats)).lower() or "other"


def first_line(error: BaseException) -> str:
    """The start of an exception's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
