"""Any model by its own inputs and outputs. A payload is inputs by name, [rows, ...]; a result outputs by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from app.artifact.datatypes import DATATYPES, DTYPES, Array, Tensors, decode_strings
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks import Encoded, GoldenCase


class TensorTask:
    """See `app.runtime.tasks.Task`."""

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError if the manifest has no golden file."""
        manifest = artifact.manifest
        if manifest.golden.file is None:
            where = artifact.folder / MANIFEST
            raise ArtifactError(f"{where}: `golden.file`: expected an .npz file for task {manifest.task}, found none")
        self.inputs: Sequence[TensorSpec] = manifest.inputs
        self.outputs: Sequence[TensorSpec] = manifest.outputs
        self.batched = manifest.batching
        self._batch_rows = batch_rows
        self._golden_path, self._golden_outputs = artifact.path(manifest.golden.file), manifest.outputs

    def read(self, tensors: Tensors) -> Tensors:
        """The tensors, their strings decoded. Raises Invalid for a missing one or another datatype."""
        for spec in self.inputs:
            array = tensors.get(spec.name)
            if array is None:
                raise Invalid(f"inputs: expected {[spec.name for spec in self.inputs]}")
            if array.dtype != DTYPES[spec.datatype]:
                raise Invalid(f"input {spec.name!r}: datatype: expected {spec.datatype}")
            if spec.datatype == "BYTES":
                tensors[spec.name] = decode_strings(array, f"input {spec.name!r}")
        return tensors

    def rows(self, inputs: Tensors) -> int:
        array = next(iter(inputs.values()))
        return array.shape[0] if self.batched and array.ndim else 1

    def encodes_slowly(self, inputs: Tensors) -> bool:
        return False  # arrays are cut without copying them

    def encode(self, inputs: Tensors) -> list[Encoded]:
        """Checks tensors against the manifest and cuts them into units of at most `batch_rows` rows.

        Raises Invalid naming the input, what was expected and what was found.
        """
        if set(inputs) != {spec.name for spec in self.inputs}:
            raise Invalid(f"inputs: expected just {sorted(spec.name for spec in self.inputs)}, found {len(inputs)}")
        for spec in self.inputs:
            _check_shape(spec, inputs[spec.name].shape)
        if not self.batched:
            return [Encoded(inputs, 1, 1, key=uuid4().bytes)]
        sizes = {array.shape[0] for array in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise Invalid(f"inputs: expected the same first dimension of at least 1 in all, found {sorted(sizes)}")
        rows, most = sizes.pop(), self._batch_rows
        key = tuple(inputs[spec.name].shape[1:] for spec in self.inputs)
        return [
            Encoded(
                {name: array[start : start + most] for name, array in inputs.items()}, 1, min(most, rows - start), key
            )
            for start in range(0, rows, most)
        ]

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        return _joined(payloads)

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each unit's part of every output. Raises ValueError unless outputs have one row per input row."""
        if len(payloads) == 1 and not self.batched:
            return [outputs]
        counts = [next(iter(unit.values())).shape[0] for unit in payloads]
        if any(array.shape[:1] != (sum(counts),) for array in outputs.values()):
            raise ValueError(f"model output: expected {sum(counts)} rows in each output")
        ends = np.cumsum(counts)
        return [
            {name: array[end - count : end] for name, array in outputs.items()}
            for count, end in zip(counts, ends, strict=True)
        ]

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        return _joined(results)

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """The first row of the golden inputs alone, and as often as a run takes it."""
        units = self.golden()[0].units
        if not self.batched:
            return units, units
        one: Tensors = {name: array[:1] for name, array in units[0].payload.items()}
        tile = {name: np.repeat(array, batch_rows, axis=0) for name, array in one.items()}
        return [Encoded(one, 1)], [Encoded(tile, 1, batch_rows)]

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """Nothing: golden inputs are all that is known of what such a model takes."""

    def golden(self) -> list[GoldenCase]:
        """The arrays `input.NAME` and `output.NAME` of the golden file. Raises ArtifactError if one is missing."""
        path = self._golden_path
        arrays = load_arrays(path)
        for prefix, specs in (("input", self.inputs), ("output", self._golden_outputs)):
            for spec in specs:
                if f"{prefix}.{spec.name}" not in arrays:
                    raise ArtifactError(f"{path}: expected an array {prefix}.{spec.name}, found {sorted(arrays)}")
        inputs = {spec.name: as_model_input(arrays[f"input.{spec.name}"], spec.datatype) for spec in self.inputs}
        expected = {spec.name: arrays[f"output.{spec.name}"] for spec in self._golden_outputs}
        return [GoldenCase(path.name, self.encode(inputs), expected)]


def load_arrays(path: Path) -> Tensors:
    """The arrays of an .npz file, by name. Raises ArtifactError if it is none, or has pickles in it."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    # What a damaged file raises depends on where it is damaged.
    except Exception as error:
        raise ArtifactError(f"{path}: expected an .npz file without pickles: {type(error).__name__}") from None


def as_model_input(array: Array, datatype: str) -> Array:
    """The array in the dtype that ONNX Runtime takes for `datatype`: strings as Python objects."""
    if datatype == "BYTES":
        return array.astype(str).astype(object)
    return array.astype(DATATYPES[datatype], copy=False)


def _joined(parts: Sequence[Tensors]) -> Tensors:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_shape(spec: TensorSpec, shape: Sequence[int]) -> None:
    if len(shape) != len(spec.shape) or any(e not in (-1, f) for e, f in zip(spec.shape, shape, strict=True)):
        raise Invalid(f"input {spec.name!r}: shape: expected {spec.shape}, found {list(shape)}")
