"""A model of any inputs and outputs → an artifact of task tensors: runs it on given or generated inputs, keeps what it
answered as golden outputs, and finds out whether rows may share a run."""

from pathlib import Path

import msgspec
import numpy as np

from app.artifact.datatypes import DTYPES, Array, Tensors
from app.artifact.manifest import MANIFEST_VERSION, Golden, Manifest, TensorSpec
from app.errors import ArtifactError
from app.runtime.session import Session
from app.runtime.tasks.tensors import as_model_input, load_arrays
from model.package.artifact import MODEL_FILE, copy_model, file_entries, finish, first_line, open_model, precision_of
from model.package.graph import read_nodes
from model.package.reference import reference

GOLDEN_FILE = "golden.npz"
GOLDEN_ROWS = 3


def package_tensors(
    model: Path, folder: Path, *, name: str, version: str, inputs: Path | None, size: int, tolerance: float
) -> Manifest:
    """Writes an artifact for a model of any inputs and outputs into the empty `folder`."""
    session, specs, output_specs = open_model(model)
    varies = all(spec.shape[:1] == [-1] for spec in specs)
    arrays = load_inputs(inputs, specs) if inputs else generate_inputs(specs, batching=varies, size=size)
    feeds = {spec.name: as_model_input(arrays[spec.name], spec.datatype) for spec in specs}
    try:
        outputs = session.run(feeds)
    except Exception as error:
        raise ArtifactError(
            f"{model}: does not run on {'the given' if inputs else 'generated'} inputs; give fitting ones with "
            f"--inputs FILE.npz, or another --size: {first_line(error)}"
        ) from None
    output_specs = [as_found(spec, outputs[spec.name]) for spec in output_specs]
    varies = varies and all(spec.shape[:1] == [-1] for spec in output_specs)
    rows = len(next(iter(feeds.values()))) if varies else 1
    golden = {f"input.{key}": _storable(value) for key, value in feeds.items()}
    golden |= {f"output.{key}": _storable(value) for key, value in outputs.items()}
    np.savez_compressed(folder / GOLDEN_FILE, **golden)  # type: ignore[arg-type]
    copy_model(model, folder)
    manifest = Manifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        version=version,
        task="tensors",
        precision=precision_of(read_nodes(model), specs, output_specs),
        model_file=MODEL_FILE,
        files=file_entries(folder),
        inputs=specs,
        outputs=output_specs,
        golden=Golden(tolerance, file=GOLDEN_FILE),
        batching=varies and is_batchable(session, feeds, outputs, tolerance),
        evaluation={"reference": reference(outputs, "given" if inputs else "generated", rows)},
    )
    return finish(folder, manifest)


def generate_inputs(specs: list[TensorSpec], *, batching: bool, size: int) -> Tensors:
    """Seeded random inputs: `GOLDEN_ROWS` rows if batching, `size` for every other dimension that may vary.

    Integers stay in 0 … 9, so that they are valid indices of most tables; floats are standard normal.
    """
    rng = np.random.default_rng(0)
    inputs: Tensors = {}
    for spec in specs:
        shape = [size if dimension == -1 else dimension for dimension in spec.shape]
        if batching and shape:
            shape[0] = GOLDEN_ROWS
        kind = DTYPES[spec.datatype].kind
        if kind == "f":
            # An array also where there are no dimensions.
            array: Array = np.asarray(rng.standard_normal(shape))
        elif kind == "b":
            array = np.asarray(rng.integers(0, 2, shape))
        else:
            array = np.asarray(rng.integers(0, 10, shape))
        inputs[spec.name] = array
    return inputs


def load_inputs(path: Path, specs: list[TensorSpec]) -> Tensors:
    """Arrays by input name from an .npz file. Raises ArtifactError unless they are the model's inputs."""
    inputs = load_arrays(path)
    names = sorted(spec.name for spec in specs)
    if sorted(inputs) != names:
        raise ArtifactError(f"{path}: expected arrays {names}, found {sorted(inputs)}")
    for spec in specs:
        array = inputs[spec.name]
        # Any number will do for a number: files are often written as float64 and int64.
        if (array.dtype.kind in "US") != (spec.datatype == "BYTES") or array.dtype.kind not in "USbuif":
            raise ArtifactError(f"{path}: {spec.name}: expected {spec.datatype}, found {array.dtype}")
    return inputs


def as_found(spec: TensorSpec, array: Array) -> TensorSpec:
    """An output without the sizes that the file declares and the model does not keep to: some converters declare one
    row for any number of them."""
    if len(spec.shape) != array.ndim:
        return spec
    shape = [-1 if size != found else size for size, found in zip(spec.shape, array.shape, strict=True)]
    return msgspec.structs.replace(spec, shape=shape)


def is_batchable(session: Session, inputs: Tensors, outputs: Tensors, tolerance: float) -> bool:
    """Whether rows run alone answer as they do together, so that rows of different requests may share a run."""
    counts = {array.shape[:1] for array in [*inputs.values(), *outputs.values()]}
    if len(counts) != 1 or not all(counts):
        return False
    for row in range(counts.pop()[0]):
        try:
            alone = session.run({name: array[row : row + 1] for name, array in inputs.items()})
        except Exception:
            return False
        for name, array in alone.items():
            together = outputs[name][row : row + 1]
            same = (
                np.array_equal(array, together)
                if array.dtype.kind in "OUSb"
                else (
                    array.shape == together.shape
                    and np.allclose(array, together, rtol=1e-3, atol=tolerance, equal_nan=True)
                )
            )
            if not same:
                return False
    return True


def _storable(array: Array) -> Array:
    return array.astype(str) if array.dtype.kind == "O" else array
