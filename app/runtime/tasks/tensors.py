"""Any model by its own inputs and outputs. A payload is inputs by name, [rows, ...]; a result outputs by name."""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from app.artifact.datatypes import DATATYPES, DTYPES, Array, Tensors, decode_strings
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks import Encoded, GoldenCase, run_key

# How large a row may be that no manifest bounds: so many times the golden one, or so many elements.
LARGE_ROW_RATIO = 8
LARGE_ROW_ELEMENTS = 2048


class TensorTask:
    """See `app.runtime.tasks.Task`."""

    counts_tokens = False
    labels: Sequence[str] = ()

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError if the manifest has no golden file."""
        manifest = artifact.manifest
        if manifest.golden.file is None:
            where = artifact.folder / MANIFEST
            raise ArtifactError(f"{where}: `golden.file`: expected an .npz file for task {manifest.task}, found none")
        self.inputs: Sequence[TensorSpec] = manifest.inputs
        self.outputs: Sequence[TensorSpec] = manifest.outputs
        self.batched = self.by_rows = manifest.batching
        self._batch_rows = batch_rows
        self._golden_path, self._golden_outputs = artifact.path(manifest.golden.file), manifest.outputs
        self._row_elements = self._max_row_elements = 0
        if any(-1 in self._row(spec.shape) for spec in self.inputs):
            self._row_elements = max(1, self._elements(self._golden_inputs(load_arrays(self._golden_path))))
            most = max(LARGE_ROW_RATIO * self._row_elements, LARGE_ROW_ELEMENTS)
            self._max_row_elements = manifest.max_row_elements or most

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
        length = self._length(inputs)
        if not self.batched:
            return [Encoded(inputs, length, 1, run_key(shared=False))]
        sizes = {array.shape[0] for array in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise Invalid(f"inputs: expected the same first dimension of at least 1 in all, found {sorted(sizes)}")
        rows = sizes.pop()
        most = max(1, self._batch_rows // length)
        key = tuple(inputs[spec.name].shape[1:] for spec in self.inputs)
        return [
            Encoded(
                {name: array[start : start + most] for name, array in inputs.items()},
                length,
                min(most, rows - start),
                key,
            )
            for start in range(0, rows, most)
        ]

    def _row(self, shape: Sequence[int]) -> Sequence[int]:
        return shape[1:] if self.batched else shape

    def _elements(self, inputs: Tensors) -> int:
        return sum(prod(self._row(array.shape)) for array in inputs.values())

    def _length(self, inputs: Tensors) -> int:
        """How many golden rows one of these costs. Raises Invalid for one that is larger than any may be."""
        if not self._row_elements:
            return 1
        elements = self._elements(inputs)
        if elements > self._max_row_elements:
            most = self._max_row_elements
            raise Invalid(f"inputs: expected at most {most} elements in a row of all inputs together, found {elements}")
        return -(-elements // self._row_elements) or 1

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
        arrays = load_arrays(self._golden_path)
        inputs = self._golden_inputs(arrays)
        expected = {spec.name: self._golden_array(arrays, f"output.{spec.name}") for spec in self._golden_outputs}
        return [GoldenCase(self._golden_path.name, self.encode(inputs), expected)]

    def _golden_inputs(self, arrays: Tensors) -> Tensors:
        return {
            spec.name: as_model_input(self._golden_array(arrays, f"input.{spec.name}"), spec.datatype)
            for spec in self.inputs
        }

    def _golden_array(self, arrays: Tensors, name: str) -> Array:
        if name not in arrays:
            raise ArtifactError(f"{self._golden_path}: expected an array {name}, found {sorted(arrays)}")
        return arrays[name]


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
