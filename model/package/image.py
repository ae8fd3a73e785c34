"""A classifier of RGB images → an artifact of task image-classification, with given or generated images as golden."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.artifact.datatypes import Array
from app.artifact.manifest import MANIFEST_VERSION, Artifact, Golden, Manifest
from app.errors import ArtifactError, RequestError
from app.runtime.tasks import open_task
from model.package.artifact import MODEL_FILE, copy_model, file_entries, finish, first_line, open_model, precision_of
from model.package.graph import ends_in, read_nodes
from model.package.preprocessor import read_preprocessor
from model.package.reference import reference
from model.package.scores import decide
from model.package.tensors import GOLDEN_FILE

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}
GENERATED_SIZES = ((64, 48), (96, 128), (200, 200), (33, 257))
MOST_GOLDEN = 16


def package_image(
    model: Path,
    preprocessor: Path,
    folder: Path,
    *,
    name: str,
    version: str,
    labels: list[str],
    tolerance: float,
    images: Path | None,
    problem_type: str | None = None,
    scores: str | None = None,
    threshold: float = 0.5,
) -> Manifest:
    """Writes an artifact into the empty `folder`. images: a folder of JPEG and PNG files; None: some are generated.

    Raises ArtifactError for what does not fit.
    """
    session, inputs, outputs = open_model(model)
    image = read_preprocessor(preprocessor, model, inputs)
    files = read_images(images) if images else generate_images(model)
    nodes = read_nodes(model)
    copy_model(model, folder)
    first = outputs[0].name
    arrays: dict[str, Any] = {f"input.image.{n}": np.frombuffer(file, np.uint8) for n, file in enumerate(files)}
    np.savez(folder / GOLDEN_FILE, **arrays)
    manifest = Manifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        version=version,
        task="image-classification",
        precision=precision_of(nodes, inputs, outputs),
        model_file=MODEL_FILE,
        files=file_entries(folder),
        inputs=inputs,
        outputs=outputs,
        golden=Golden(tolerance, file=GOLDEN_FILE),
        labels=labels,
        # Until it is decided, what any number of labels and any outputs fit.
        problem_type="multi_label",
        scores="sigmoid",
        threshold=threshold,
        image=image,
    )
    task = open_task(Artifact(folder, manifest, ""), 1)
    try:
        units = task.encode(files)
        found = [session.run(task.assemble([unit.payload])) for unit in units]
    except RequestError as error:
        raise ArtifactError(f"{images or model}: {error}") from None
    except Exception as error:
        raise ArtifactError(f"{model}: does not run on images as {preprocessor} says: {first_line(error)}") from None
    rows: Array = np.concatenate([outputs[first] for outputs in found]).astype(np.float64)
    ending = ends_in(nodes, first)
    problem_type, scores = decide(model, rows, ending, labels=len(labels), problem_type=problem_type, scores=scores)
    manifest = msgspec.structs.replace(manifest, problem_type=problem_type, scores=scores)
    task = open_task(Artifact(folder, manifest, ""), 1)
    results = [task.split([unit.payload], outputs)[0] for unit, outputs in zip(units, found, strict=True)]
    answers = task.respond(units, results)
    arrays["output.probabilities"] = answers["probabilities"]
    np.savez(folder / GOLDEN_FILE, **arrays)
    said = {key: value for key, value in answers.items() if key in ("label", "score")}
    record = {"reference": reference(said, "given" if images else "generated", len(files))}
    return finish(folder, msgspec.structs.replace(manifest, files=file_entries(folder), evaluation=record))


def read_images(folder: Path, most: int | None = MOST_GOLDEN) -> list[bytes]:
    """The first JPEG and PNG files in a folder, by name; most: None for all. Raises ArtifactError if there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise ArtifactError(f"{folder}: expected JPEG or PNG files, found none")
    return [path.read_bytes() for path in found[:most]]


def generate_images(model: Path) -> Sequence[bytes]:
    """Seeded PNG files of several sizes: noise over a gradient, so that resizing and normalizing show."""
    try:
        from PIL import Image
    except ImportError:
        raise ArtifactError(f"{model}: task image-classification takes Pillow; install the `image` extra") from None
    rng = np.random.default_rng(0)
    files = []
    for height, width in GENERATED_SIZES:
        slope = np.linspace(0, 200, width)[None, :, None] * rng.random(3)
        pixels = (slope + rng.integers(0, 56, (height, width, 3))).astype(np.uint8)
        with BytesIO() as file:
            Image.fromarray(pixels).save(file, "PNG")
            files.append(file.getvalue())
    return files
