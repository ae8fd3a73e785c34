"""The reference distribution: what a model predicts of inputs like production's, for the server to show beside what it
predicts there. model/README.md documents the record, which is `reference_distribution` of the manifest.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from app.artifact.manifest import Manifest, ReferenceDistribution
from app.errors import ArtifactError, RequestError
from app.runtime.loading import load_model
from app.runtime.tasks.answers import predicted
from app.telemetry.metrics import MOST_LABELS
from model.compare.measure import answers
from model.package.artifact import write_manifest
from model.package.image import read_images
from model.package.source import IMAGE
from model.package.texts import read_texts

# By chance alone the stability index of n predictions of k labels is (k - 1) / n on average: 0.01 with so many for each
# label, of the 0.25 that the alert takes for drift. It asks as many of production.
LEAST_PREDICTIONS_PER_LABEL = 100


def read_reference(path: Path, task: str) -> list[Any]:
    """Inputs of a task that classifies: texts, one a line or `text` of JSONL; images, all of a folder.

    Raises ArtifactError for a file that is not so.
    """
    if task == IMAGE:
        return list(read_images(path, most=None))
    lines = read_texts(path)
    return (
        [_text(path, number, str(line)) for number, line in enumerate(lines, 1)] if path.suffix == ".jsonl" else lines
    )


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, LookupError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise ArtifactError(f"{path}: row {number}: `text`: expected a string that is not blank")
    return text


def least_predictions(labels: Sequence[str]) -> int:
    """How many make a reference."""
    return LEAST_PREDICTIONS_PER_LABEL * min(len(labels), MOST_LABELS + 1)


def record_reference(folder: Path, inputs: Sequence[Any], where: str) -> Manifest:
    """Writes what the artifact predicts of `inputs` to its manifest, whose digest is another then.

    where: the inputs come from. Raises ArtifactError for inputs that the model does not take, and for too few.
    """
    model = load_model(folder)
    labels = model.task.labels
    try:
        counts = Counter(label for label, _ in predicted(answers(model, inputs)))
    except RequestError as error:
        raise ArtifactError(f"{where}: {error}") from None
    least, total = least_predictions(labels), counts.total()
    if total < least:
        raise ArtifactError(
            f"{where}: expected at least {least} predictions, found {total}: with fewer, chance alone looks like drift"
        )
    ratios = {label: round(counts[label] / total, 6) for label in labels}
    manifest = msgspec.structs.replace(
        model.artifact.manifest, reference_distribution=ReferenceDistribution(total, ratios)
    )
    write_manifest(folder, manifest)
    return manifest
