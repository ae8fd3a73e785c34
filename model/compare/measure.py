"""One artifact over the rows, through the server's own code path: labels, scores, seconds, bytes."""

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from msgspec import Struct

from app.errors import ArtifactError
from app.runtime.loading import batches
from app.runtime.session import Model
from app.runtime.tasks import PredictTask
from app.runtime.tasks.answers import Label
from app.runtime.tasks.text_classification import TextClassification

# Rows that are timed, and how often: the median of few rounds is steady, and a large set need not take minutes.
TIMED_ROWS = 256
ROUNDS = 9


def classifier(model: Model) -> TextClassification:
    """The artifact's task. Raises ArtifactError unless each text has just one of its labels."""
    manifest = model.artifact.manifest
    if not isinstance(model.task, TextClassification) or manifest.problem_type != "single_label":
        found = manifest.task if manifest.problem_type == "single_label" else f"{manifest.problem_type} {manifest.task}"
        raise ArtifactError(
            f"{model.artifact.folder}: expected single_label text-classification, which is all that can be compared; "
            f"found {found}"
        )
    return model.task


def predict(model: Model, texts: Sequence[str]) -> list[Label]:
    """The likeliest label and its score of each text, in order."""
    classifier(model)
    return cast("list[Label]", answers(model, texts))


def answers(model: Model, inputs: Sequence[Any]) -> list[Struct]:
    """What the task answers to each of its inputs, in order: encoded, run in batches of similar length."""
    task = cast("PredictTask", model.task)
    units = task.encode(inputs)
    found: dict[int, Struct] = {}
    for places in batches(units, model.batch_rows, model.batch_tokens):
        part = [units[place] for place in places]
        found |= zip(places, task.predictions(part, model.run([unit.payload for unit in part])), strict=True)
    return [found[place] for place in range(len(units))]


def seconds(models: Sequence[Model], texts: Sequence[str]) -> list[float]:
    """What each takes for the same texts, the median of rounds, in which they take turns and go first in turn: what
    disturbs the machine disturbs all alike."""
    step = max(1, len(texts) // TIMED_ROWS)
    some = texts[::step][:TIMED_ROWS]
    taken: list[list[float]] = [[] for _ in models]
    for number in range(ROUNDS):
        places = range(len(models))
        for place in places if number % 2 else reversed(places):
            started = time.perf_counter()
            predict(models[place], some)
            taken[place].append(time.perf_counter() - started)
    return [float(np.median(each)) for each in taken]


def size_bytes(model: Model) -> int:
    """Of every file of the artifact."""
    return sum(entry.bytes for entry in model.artifact.manifest.files.values())
