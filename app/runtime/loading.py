"""The readiness gate: verify → load → warm → golden. What passes may answer; what fails raises StartupError.

The server runs it in a thread before `/ready` answers 200; `python -m model.verify` runs the same code offline.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from app.artifact.datatypes import DATATYPES, Array, Tensors
from app.artifact.manifest import MANIFEST, read_artifact, verify_files, verify_manifest
from app.errors import ArtifactError
from app.runtime.model import Model
from app.runtime.session import BATCH_LIMITS, Session
from app.runtime.tasks.task import Encoded, TensorTask, TextTask, open_task

if TYPE_CHECKING:
    from collections.abc import Iterator


MEASURED_RUNS = 3


def load_model(
    folder: Path,
    *,
    digest: str = "",
    provider: str = "cpu",
    max_batch_rows: int | Literal["auto"] = "auto",
    max_batch_tokens: int | Literal["auto"] = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Model:
    """Takes the artifact in `folder` through every check, telling `on_stage` what it is at.

    Raises ArtifactError or ProviderError with one line that says what, where, expected and found.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> "Iterator[None]":
        on_stage(name)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    with stage("verifying"):
        artifact = read_artifact(folder, digest)
        verify_files(artifact)
    manifest = artifact.manifest
    with stage("loading"):
        path = artifact.path(manifest.model_file)
        session = Session.open(path, provider)
        session.check_schema(manifest.inputs, manifest.outputs)
        rows, tokens = BATCH_LIMITS[session.provider]
        rows = rows if max_batch_rows == "auto" else max_batch_rows
        tokens = tokens if max_batch_tokens == "auto" else max_batch_tokens
        task = open_task(artifact, rows)
    model = Model(artifact, session, task, rows, tokens)
    with stage("warming"):
        warm = _warm_text if isinstance(task, TextTask) else _warm_tensors
        try:
            warm(model)
        except ArtifactError:
            raise
        # Whatever a model raises on its own golden inputs means that it cannot serve.
        except Exception as error:
            line = (str(error).splitlines() or [""])[0][:300]
            raise ArtifactError(f"{path}: run failed on golden inputs: {type(error).__name__}: {line}") from None
    # Last: whatever is wrong with a part of it is better said of that part.
    verify_manifest(artifact)
    model.stage_seconds = seconds
    return model


def _warm_text(model: Model) -> None:
    task, manifest = model.task, model.artifact.manifest
    assert isinstance(task, TextTask)
    examples = manifest.golden.examples
    units = task.encode([example.text for example in examples])
    longest = min(task.max_tokens, max(1, model.batch_tokens // model.batch_rows))
    _measure(model, [units[0]], [Encoded([task.pad_id] * longest, longest)] * model.batch_rows)
    expected = np.array([example.probabilities for example in examples], np.float32)
    if expected.shape != (len(examples), len(manifest.labels)):
        where = model.artifact.folder / MANIFEST
        raise ArtifactError(f"{where}: golden.examples: expected {len(manifest.labels)} probabilities in each")
    # Alone and together: a row's answer must not depend on its neighbours or on padding.
    order = sorted(range(len(units)), key=lambda index: units[index].length)
    for size in (1, model.batch_rows):
        for start in range(0, len(order), size):
            part = order[start : start + size]
            found = np.stack(model.run([units[index].payload for index in part]))
            for index, row in zip(part, found, strict=True):
                _compare(model, f"golden.examples[{index}]", expected[index], row)


def _warm_tensors(model: Model) -> None:
    task, artifact = model.task, model.artifact
    assert isinstance(task, TensorTask)
    path = artifact.path(artifact.manifest.golden.file or "")
    arrays = load_arrays(path)
    inputs, outputs = ({n[len(p) :]: a for n, a in arrays.items() if n.startswith(p)} for p in ("input.", "output."))
    for spec in artifact.manifest.inputs:
        if spec.name not in inputs:
            raise ArtifactError(f"{path}: expected an array input.{spec.name}, found {sorted(arrays)}")
        inputs[spec.name] = as_model_input(inputs[spec.name], spec.datatype)
    units = task.encode(inputs)
    largest = [units[0]]
    if task.batching:
        one: Tensors = {name: array[:1] for name, array in inputs.items()}
        tile = {name: np.repeat(array, model.batch_rows, axis=0) for name, array in one.items()}
        largest = [Encoded(tile, 1, model.batch_rows)]
        _measure(model, [units[0]._replace(payload=one, rows=1)], largest)
    else:
        _measure(model, units, units)
    results: list[Tensors] = [model.run([unit.payload])[0] for unit in units]
    found = task.join(results)
    for name in found:
        if name not in outputs:
            raise ArtifactError(f"{path}: expected an array output.{name}, found {sorted(arrays)}")
        _compare(model, f"output {name!r} of {path.name}", outputs[name], found[name])


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


def _measure(model: Model, smallest: Sequence[Encoded], largest: Sequence[Encoded]) -> None:
    """Runs the smallest and the largest batch, so that every buffer exists before the first request, and takes from
    their times what a run costs: so much for itself, and so much for each token."""

    def measured(units: Sequence[Encoded]) -> tuple[int, float]:
        payloads = [unit.payload for unit in units]
        times = []
        for _ in range(MEASURED_RUNS):
            started = time.monotonic()
            model.run(payloads)
            times.append(max(1e-6, time.monotonic() - started))
        # The fastest: whatever disturbs a run makes it slower.
        return len(units) * units[0].rows * units[0].length, min(times)

    (few, short), (many, long) = measured(smallest), measured(largest)
    model.tokens_per_second = many / long
    if many > few and long > short:
        seconds_per_token = (long - short) / (many - few)
        model.overhead_tokens = max(0.0, short / seconds_per_token - few)


def _compare(model: Model, what: str, expected: Array, found: Array) -> None:
    """Raises ArtifactError unless equal (strings, shapes) or within the manifest's absolute tolerance."""
    where = f"{model.artifact.folder / MANIFEST}: {what}"
    tolerance = model.artifact.manifest.golden.tolerance
    if expected.shape != found.shape:
        raise ArtifactError(f"{where}: expected shape {list(expected.shape)}, found {list(found.shape)}")
    if found.dtype.kind in "OUS":
        if not np.array_equal(expected.astype(str), found.astype(str)):
            raise ArtifactError(f"{where}: expected other strings than the model's")
        return
    # Infinities and NaN have no difference, but may be what the model should answer.
    same = (expected == found) | ((expected != expected) & (found != found))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(expected.astype(np.float64) - found.astype(np.float64)))
    worst = float(difference.max(initial=0.0))
    if not worst <= tolerance:
        first = np.argmax(np.nan_to_num(difference, nan=np.inf))
        place = tuple(int(i) for i in np.unravel_index(first, difference.shape))
        raise ArtifactError(
            f"{where}: outside tolerance {tolerance:g}: expected {expected[place]!s}, found {found[place]!s} "
            f"(off by {worst:.3g})"
        )
    model.golden_error = max(model.golden_error, worst)
