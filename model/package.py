"""Any ONNX model → an artifact folder that passes the gate: `python -m model.package FILE.onnx --name N --version V`.

Runs the model on the inputs given, or on inputs it generates, and records what it answered as the golden outputs.
Needs only the serving dependencies.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.artifact.datatypes import DTYPES, Array, Tensors
from app.artifact.integrity import checksum_of
from app.artifact.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    MIN_TOKENS,
    Artifact,
    FileEntry,
    Golden,
    GoldenText,
    Manifest,
    TensorSpec,
)
from app.errors import ArtifactError, StartupError
from app.runtime.loading import load_model
from app.runtime.session import Session
from app.runtime.tasks.tensors import as_model_input, load_arrays
from app.runtime.tasks.text_classification import TextClassification

MODEL_FILE, TOKENIZER_FILE, GOLDEN_FILE = "model.onnx", "tokenizer.json", "golden.npz"
GOLDEN_ROWS = 3
DEFAULT_TOLERANCE = 1e-3
# Short, long, plain, marked, and in other scripts: any tokenizer has something to do.
GOLDEN_TEXTS = (
    "I love this, it works like a charm!",
    "Terrible. It broke after two days and nobody answered my calls.",
    "ok",
    "The parcel came on Tuesday.",
    "We waited for an hour, the soup was cold and the waiter shrugged, but the dessert almost made up for all of it.",
    "¿Qué tal? 不错 👍",
)


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file, streamed."""
    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def external_data(model: Path) -> list[Path]:
    """Weight files that an ONNX file of over 2 GB keeps beside it: FILE.onnx.data or FILE.onnx_data."""
    return [path for suffix in (".data", "_data") if (path := model.with_name(model.name + suffix)).is_file()]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """manifest.json, indented for reviewers, with its own checksum."""
    blank = "0" * 64
    content = msgspec.json.encode(msgspec.structs.replace(manifest, checksum=blank))
    raw = msgspec.json.format(content, indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(raw.replace(blank.encode(), checksum_of(raw, blank).encode(), 1))


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
            array: Array = rng.standard_normal(shape)
        elif kind == "b":
            array = rng.integers(0, 2, shape)
        else:
            array = rng.integers(0, 10, shape)
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


def read_texts(path: Path) -> list[str]:
    """Texts from a file, one a line, without the blank ones. Raises ArtifactError if it is not UTF-8."""
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ArtifactError(f"{path}: expected UTF-8") from None


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


def package_tensors(
    model: Path,
    folder: Path,
    *,
    name: str,
    version: str,
    inputs: Path | None,
    size: int,
    tolerance: float,
    precision: str | None = None,
) -> None:
    """Writes an artifact for a model of any inputs and outputs into the empty `folder`."""
    session = Session.open(model, "cpu")
    specs, output_specs = session.specs()
    varies = all(spec.shape[:1] == [-1] for spec in [*specs, *output_specs])
    arrays = load_inputs(inputs, specs) if inputs else generate_inputs(specs, batching=varies, size=size)
    feeds = {spec.name: as_model_input(arrays[spec.name], spec.datatype) for spec in specs}
    try:
        outputs = session.run(feeds)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:300]
        raise ArtifactError(
            f"{model}: does not run on {'the given' if inputs else 'generated'} inputs; give fitting ones with "
            f"--inputs FILE.npz, or another --size: {line}"
        ) from None
    batching = varies and is_batchable(session, feeds, outputs, tolerance)
    golden = {f"input.{key}": _storable(value) for key, value in feeds.items()}
    golden |= {f"output.{key}": _storable(value) for key, value in outputs.items()}
    np.savez_compressed(folder / GOLDEN_FILE, **golden)  # type: ignore[arg-type]
    _copy_model(model, folder)
    manifest = Manifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        version=version,
        task="tensors",
        precision=precision or _precision(specs, output_specs),
        model_file=MODEL_FILE,
        files=_entries(folder),
        inputs=specs,
        outputs=output_specs,
        golden=Golden(tolerance, file=GOLDEN_FILE),
        batching=batching,
    )
    write_manifest(folder, manifest)
    load_model(folder)


def package_text(
    model: Path,
    tokenizer: Path,
    folder: Path,
    *,
    name: str,
    version: str,
    labels: list[str],
    max_tokens: int,
    scores: str,
    tolerance: float,
    texts: list[str],
    precision: str = "fp32",
    lineage: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    golden: list[GoldenText] | None = None,
) -> None:
    """Writes an artifact for a sequence classifier into the empty `folder`.

    golden: what another file of the same weights answered, for this one to agree with; else `texts` are run.
    """
    if max_tokens < MIN_TOKENS:
        raise ArtifactError(f"--max-tokens {max_tokens}: expected at least {MIN_TOKENS}")
    session = Session.open(model, "cpu")
    specs, output_specs = session.specs()
    _copy_model(model, folder)
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    manifest = Manifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        version=version,
        task="text-classification",
        precision=precision,
        model_file=MODEL_FILE,
        files=_entries(folder),
        inputs=specs,
        outputs=output_specs,
        golden=Golden(tolerance),
        tokenizer_file=TOKENIZER_FILE,
        labels=labels,
        max_tokens=max_tokens,
        scores=scores,  # type: ignore[arg-type]
        lineage=lineage or {},
        evaluation=evaluation or {},
    )
    examples = golden or _answers(model, session, TextClassification(Artifact(folder, manifest, ""), 1), texts)
    write_manifest(folder, msgspec.structs.replace(manifest, golden=Golden(tolerance, examples)))
    load_model(folder)


def _answers(model: Path, session: Session, task: TextClassification, texts: list[str]) -> list[GoldenText]:
    examples = []
    for text in texts:
        payload = task.encode([text])[0].payload
        try:
            (row,) = task.split([payload], session.run(task.assemble([payload])))
        except Exception as error:
            line = (str(error).splitlines() or [""])[0][:300]
            raise ArtifactError(f"{model}: does not run on tokenised text: {line}") from None
        examples.append(GoldenText(text, [round(float(p), 6) for p in row]))
    return examples


def read_labels(given: str | None, config: Path) -> list[str]:
    """Labels from the command line, else from `id2label` of the model's config.json. Raises ArtifactError."""
    if given:
        return [label.strip() for label in given.split(",")]
    try:
        table = json.loads(config.read_text("utf-8"))["id2label"]
        return [table[str(index)] for index in range(len(table))]
    except (OSError, ValueError, LookupError, TypeError):
        raise ArtifactError(f"{config}: no id2label found; name the labels with --labels negative,positive") from None


def _storable(array: Array) -> Array:
    return array.astype(str) if array.dtype.kind == "O" else array


def _copy_model(model: Path, folder: Path) -> None:
    shutil.copyfile(model, folder / MODEL_FILE)
    for path in external_data(model):
        # The ONNX file refers to it by this name.
        shutil.copyfile(path, folder / path.name)


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _precision(*groups: list[TensorSpec]) -> str:
    floats = {spec.datatype for specs in groups for spec in specs if DTYPES[spec.datatype].kind == "f"}
    return ",".join(sorted(floats)).lower() or "other"


def main() -> None:
    """Command line of `python -m model.package`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.package",
        description=__doc__,
        epilog="example: python -m model.package classifier.onnx --tokenizer tokenizer.json --name reviews --version 1",
    )
    parser.add_argument("model", type=Path, help="ONNX file; weights in FILE.onnx.data beside it come along")
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--out", type=Path, help="artifact folder to create (default: ./NAME)")
    parser.add_argument(
        "--precision", help="of the weights, for people: int8, fp16 (default: of inputs and outputs, or fp32)"
    )
    parser.add_argument("--tolerance", type=float, default=DEFAULT_TOLERANCE, help="absolute, on golden outputs")
    tensors = parser.add_argument_group("any model (task tensors)")
    tensors.add_argument("--inputs", type=Path, help=".npz with one array for each input (default: generated)")
    tensors.add_argument("--size", type=int, default=8, help="generated size of dimensions that may vary")
    text = parser.add_argument_group("sequence classifier (task text-classification)")
    text.add_argument("--tokenizer", type=Path, help="tokenizer.json; makes it a text model")
    text.add_argument("--labels", help="comma-separated (default: id2label in config.json beside the tokenizer)")
    text.add_argument("--max-tokens", type=int, default=256)
    text.add_argument("--scores", choices=("logits", "probabilities"), default="logits", help="what the model outputs")
    text.add_argument("--texts", type=Path, help="golden texts, one a line (default: built in)")
    args = parser.parse_args()
    out: Path = args.out or Path(args.name)
    if out.exists():
        sys.exit(f"model.package: {out} exists; name another folder with --out or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place when it has passed the gate: a failed run leaves nothing half-written.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".package-") as staging:
            folder = Path(staging) / "artifact"
            folder.mkdir()
            common = {"name": args.name, "version": args.version, "tolerance": args.tolerance}
            if args.tokenizer:
                package_text(
                    args.model,
                    args.tokenizer,
                    folder,
                    labels=read_labels(args.labels, args.tokenizer.with_name("config.json")),
                    max_tokens=args.max_tokens,
                    scores=args.scores,
                    texts=read_texts(args.texts) if args.texts else list(GOLDEN_TEXTS),
                    precision=args.precision or "fp32",
                    **common,
                )
            else:
                package_tensors(
                    args.model, folder, inputs=args.inputs, size=args.size, precision=args.precision, **common
                )
            folder.rename(out)
    except (StartupError, OSError) as error:
        print(f"model.package: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", ArtifactError.exit_code))
    print(f"{out}: {args.name} {args.version}, passed the gate; serve it with APP_MODEL_DIR={out} python -m app")


if __name__ == "__main__":
    main()
