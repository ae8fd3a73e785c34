"""The readiness gate: signature → verify → load → warm → golden. What passes may answer; else it raises StartupError.

The server runs it in a thread before `/ready` answers 200; `python -m model.verify` runs the same code offline.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np

from app.artifact.datatypes import Array
from app.artifact.external_data import verify_external_data
from app.artifact.integrity import verify_files, verify_manifest
from app.artifact.manifest import MANIFEST, TensorSpec, read_artifact
from app.artifact.signature import verify_signature
from app.errors import ArtifactError
from app.runtime.session import Model, Provider, Session
from app.runtime.tasks import Encoded, GoldenCase, open_task
from app.settings import Settings, cpu_quota

MEASURED_RUNS = 3
# What "auto" means: runners, rows and padded tokens of one run. On a CPU padding is the whole cost and a large batch
# only adds latency; a GPU wants large ones.
CUDA_RUNNERS = 2
BATCH_LIMITS: dict[Provider, tuple[int, int]] = {"cpu": (8, 512), "cuda": (128, 16384)}
Auto = Literal["auto"]


def load_configured(settings: Settings, *, on_stage: Callable[[str], None] = lambda stage: None) -> Model:
    """`load_model` of the artifact, and with the options, that the settings name. Raises as it does."""
    return load_model(
        settings.model_dir,
        digest=settings.model_digest,
        public_key=settings.model_public_key,
        provider=settings.provider,
        runners=settings.runners,
        runner_threads=settings.runner_threads,
        gpu_memory_bytes=settings.gpu_memory_bytes,
        max_batch_rows=settings.max_batch_rows,
        max_batch_tokens=settings.max_batch_tokens,
        on_stage=on_stage,
    )


def load_model(
    folder: Path,
    *,
    digest: str = "",
    public_key: Path | None = None,
    provider: Provider | Auto = "cpu",
    runners: int | Auto = "auto",
    runner_threads: int | Auto = "auto",
    gpu_memory_bytes: int = 0,
    max_batch_rows: int | Auto = "auto",
    max_batch_tokens: int | Auto = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Model:
    """Takes the artifact in `folder` through every check, telling `on_stage` what it is at.

    public_key: a file of those that may have signed it. Raises ConfigError for that file, ArtifactError or
    ProviderError with one line that says what, where, expected and found.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        on_stage(name)
        started = time.monotonic()
        yield
        seconds[name] = time.monotonic() - started

    signed = None
    if public_key is not None:
        with stage("signature"):
            signed = verify_signature(folder, public_key)
    with stage("verifying"):
        artifact = read_artifact(folder, digest)
        verify_files(artifact, signed)
    manifest = artifact.manifest
    with stage("loading"):
        path = artifact.path(manifest.model_file)
        verify_external_data(artifact)
        auto = provider == "auto"
        threads = runner_threads if isinstance(runner_threads, int) else 1
        session = Session.open(
            path,
            "cuda" if provider == "auto" else provider,
            may_fall_back=auto,
            threads=threads,
            gpu_memory_bytes=gpu_memory_bytes,
        )
        found_inputs, found_outputs = session.specs()
        check_schema(path, "input", manifest.inputs, found_inputs)
        check_schema(path, "output", manifest.outputs, found_outputs)
        rows, tokens = BATCH_LIMITS[session.provider]
        if max_batch_rows != "auto":
            rows = max_batch_rows
        if max_batch_tokens != "auto":
            tokens = max_batch_tokens
        if runners == "auto":
            # However many threads a run has: they are the session's, and take part where they have nothing else to do.
            runners = CUDA_RUNNERS if session.provider == "cuda" else cpu_quota()
        task = open_task(artifact, rows)
        if not task.counts_tokens and max_batch_tokens == "auto":
            tokens = rows
        model = Model(artifact, task, session.provider, session.run, runners, rows, tokens)
    with stage("warming"):
        try:
            golden = task.golden()
            task.check(model.infer)
            _measure(model, *task.warm_up(rows, tokens))
            _check_golden(model, golden)
        except ArtifactError:
            raise
        # Whatever a model raises on its own golden inputs means that it cannot serve.
        except Exception as error:
            raise ArtifactError(f"{path}: run failed on golden inputs: {_reason(error)}") from None
    # Last: whatever is wrong with a part of it is better said of that part.
    verify_manifest(artifact)
    model.stage_seconds = seconds
    return model


def check_schema(path: Path, kind: str, expected: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """Raises ArtifactError unless the file at `path` has the manifest's names, datatypes, ranks and fixed sizes."""
    names = [sorted(spec.name for spec in specs) for specs in (expected, found)]
    if names[0] != names[1]:
        raise ArtifactError(f"{path}: {kind}s: expected {names[0]} as in the manifest, found {names[1]}")
    by_name = {spec.name: spec for spec in found}
    for spec in expected:
        other = by_name[spec.name]
        fits = all(-1 in pair or pair[0] == pair[1] for pair in zip(spec.shape, other.shape, strict=False))
        for what, mine, its in (
            ("datatype", spec.datatype, other.datatype),
            ("rank", len(spec.shape), len(other.shape)),
            ("shape", spec.shape, spec.shape if fits else other.shape),
        ):
            if mine != its:
                raise ArtifactError(
                    f"{path}: {kind} {spec.name!r}: {what}: expected {mine} as in the manifest, found {its}"
                )


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

    few, short = measured(smallest)
    try:
        many, long = measured(largest)
    except Exception as error:
        path, rows = model.artifact.path(model.artifact.manifest.model_file), sum(unit.rows for unit in largest)
        raise ArtifactError(
            f"{path}: run failed on the largest batch, {rows} rows of length {largest[0].length}; lower "
            f"APP_MAX_BATCH_ROWS or APP_MAX_BATCH_TOKENS: {_reason(error)}"
        ) from None
    model.tokens_per_second = many / long
    if many > few and long > short:
        seconds_per_token = (long - short) / (many - few)
        model.overhead_tokens = max(0.0, short / seconds_per_token - few)


def _reason(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {line}"


def _check_golden(model: Model, cases: Sequence[GoldenCase]) -> None:
    """Every golden unit alone and then with others: an answer must not depend on neighbours or on padding."""
    units = [unit for case in cases for unit in case.units]
    for batch_rows in (1, model.batch_rows):
        results = dict[int, object]()
        for batch in batches(units, batch_rows, model.batch_tokens):
            found = model.run([units[index].payload for index in batch])
            results.update(zip(batch, found, strict=True))
        start = 0
        for case in cases:
            part = [results[start + index] for index in range(len(case.units))]
            start += len(case.units)
            outputs = model.task.respond(case.units, part)
            for name, expected in case.expected.items():
                _compare(model, f"{case.where}: {name}", expected, outputs[name])


def batches(units: Sequence[Encoded], batch_rows: int, batch_tokens: int) -> Iterator[list[int]]:
    """Places of units that run together, of similar length, at most `batch_rows` rows and `batch_tokens` padded tokens
    unless one alone is more."""
    batch: list[int] = []
    for index in sorted(range(len(units)), key=lambda index: units[index].length):
        unit = units[index]
        rows = sum(units[other].rows for other in batch) + unit.rows
        full = rows > batch_rows or rows * unit.length > batch_tokens
        if batch and (full or units[batch[0]].key != unit.key):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


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
