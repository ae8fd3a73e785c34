"""The request that a packaged model answers: a `curl` command for `python -m app` on its default port."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import Manifest, TensorSpec
from app.runtime.tasks.tensors import load_arrays

ADDRESS = "localhost:8000"
# Longer bodies are made by a line of Python.
INLINE_CHARACTERS = 2000
# The server's default limit; for more it must be told.
MAX_BODY_BYTES = 4 << 20
# One grey pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="


def curl(folder: Path, manifest: Manifest) -> str:
    """A command that the server answers with 200. folder: the artifact's."""
    if manifest.task == "tensors":
        return _tensors(folder, manifest)
    if manifest.task == "image-classification":
        return f"echo {PNG} | base64 -d | curl -s {ADDRESS}/predict -H 'content-type: image/png' --data-binary @-"
    example = manifest.golden.examples[0]
    if manifest.task == "text-pair":
        return _json("/rerank", {"query": example.text, "texts": [example.text_pair]})
    if manifest.task == "text-embedding":
        return _json("/embed", {"inputs": example.text})
    return _json("/predict", {"text": example.text})


def body_bytes(manifest: Manifest, folder: Path) -> int:
    """About how long the body of the example is, where it may exceed what the server takes unasked."""
    return 2 * sum(array.size for array in _first_row(folder, manifest).values()) if manifest.task == "tensors" else 0


def _json(path: str, content: dict[str, Any]) -> str:
    return f"curl -s {ADDRESS}{path} -H 'content-type: application/json' -d {shlex.quote(json.dumps(content))}"


def _first_row(folder: Path, manifest: Manifest) -> Tensors:
    """The golden inputs: the first row, or all if rows may not be separated."""
    arrays = load_arrays(folder / (manifest.golden.file or ""))
    found = {spec.name: arrays[f"input.{spec.name}"] for spec in manifest.inputs}
    return {name: array[:1] for name, array in found.items()} if manifest.batching else found


def _tensors(folder: Path, manifest: Manifest) -> str:
    path = f"/v2/models/{manifest.name}/infer"
    arrays = _first_row(folder, manifest)
    whole = {"inputs": [_tensor(spec, arrays[spec.name]) for spec in manifest.inputs]}
    if len(command := _json(path, whole)) <= INLINE_CHARACTERS:
        return command
    filled = ", ".join(_filled(spec, arrays[spec.name]) for spec in manifest.inputs)
    code = f'import json; print(json.dumps({{"inputs": [{filled}]}}, separators=(",", ":")))'
    return (
        f"python3 -c {shlex.quote(code)} | curl -s {ADDRESS}{path} -H 'content-type: application/json' --data-binary @-"
    )


def _tensor(spec: TensorSpec, array: Any) -> dict[str, Any]:
    values = array.ravel()
    if array.dtype.kind == "f":
        # JSON has no infinities.
        values = [float(f"{value:.6g}") if np.isfinite(value) else 0.0 for value in values.tolist()]
        return {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape), "data": values}
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape), "data": values.tolist()}


def _filled(spec: TensorSpec, array: Any) -> str:
    """The tensor as a Python expression, of one value throughout: 0 for numbers that no table is read at."""
    value = 0 if DTYPES[spec.datatype].kind == "f" else array.ravel()[:1].tolist()[0]
    start = json.dumps({"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape)})
    return f'{start[:-1]}, "data": [{value!r}] * {array.size}}}'
