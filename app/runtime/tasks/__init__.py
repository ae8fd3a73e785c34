"""What a task is: how requests become rows of a model's run, and its outputs their answers. One file for each.

A new task is one file here and one entry of `TASKS`. Knows nothing of queues, HTTP or ONNX Runtime.
"""

from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast
from uuid import uuid4

from msgspec import Struct

from app.artifact.datatypes import Tensors
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError

# The manifest's `task`, and the class that does it.
TASKS = {
    "text-classification": "app.runtime.tasks.text_classification.TextClassification",
    "text-embedding": "app.runtime.tasks.text_embedding.TextEmbedding",
    "text-pair": "app.runtime.tasks.text_pair.TextPair",
    "text-regression": "app.runtime.tasks.text_regression.TextRegression",
    "token-classification": "app.runtime.tasks.token_classification.TokenClassification",
    "image-classification": "app.runtime.tasks.image_classification.ImageClassification",
    "tensors": "app.runtime.tasks.tensors.TensorTask",
}


class Encoded(NamedTuple):
    """One unit of work. Units with equal `key` may share a run; `rows` is its size along the first axis, `length` a
    row's cost beside a padded neighbour: tokens for text, for tensors how many times a golden row."""

    payload: Any
    length: int
    rows: int = 1
    key: Hashable = None
    truncated: bool = False


def run_key(*, shared: bool) -> bytes | None:
    """A `key` for units that all others may share a run with, or for one that runs alone."""
    return None if shared else uuid4().bytes


class GoldenCase(NamedTuple):
    """Units, what the model must answer to them as the task's outputs, and where that is written."""

    where: str
    units: list[Encoded]
    expected: Tensors


class Task(Protocol):
    """All that the gate, the predictor and the protocol ask of a task.

    inputs, outputs: as clients of the Open Inference Protocol see them. counts_tokens: whether a `length` is tokens;
    else it is golden rows, and a run takes as many of these as of rows. batched: whether the first axis of every input
    is rows, as Triton's model configuration means it. by_rows: whether a request is rows at all, each with its answer.
    labels: that its predictions may hold; none where they are no labels.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    counts_tokens: bool
    batched: bool
    by_rows: bool
    labels: Sequence[str]

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """batch_rows: the most that one run takes. Raises ArtifactError for a manifest or a file that does not fit."""

    def read(self, tensors: Tensors) -> Any:
        """What `encode` takes, from a protocol request's tensors. Raises Invalid naming what was expected."""

    def rows(self, inputs: Any) -> int:
        """How many rows these inputs have, before the work of encoding them."""

    def encodes_slowly(self, inputs: Any) -> bool:
        """Whether encoding them takes so long that it would hold up every other request."""

    def encode(self, inputs: Any) -> list[Encoded]:
        """One request's inputs as units of work, in order. Raises Invalid."""

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """The payloads of one batch as the model's inputs."""

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """The model's outputs as one result for each payload. Raises ValueError for outputs of another shape."""

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """One request's results as its outputs."""

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """The smallest and the largest batch."""

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """What must hold of the model, `infer`, beyond its golden cases. Raises ArtifactError if it does not."""

    def golden(self) -> list[GoldenCase]:
        """What the model must answer before it may serve. Raises ArtifactError if that cannot be read."""


class PredictTask(Task, Protocol):
    """A task that /predict serves."""

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> Sequence[Struct]:
        """One request's results as its answers, one for each row, as JSON has them."""


def open_task(artifact: Artifact, batch_rows: int) -> Task:
    """The task that the manifest names. Raises ArtifactError if there is none, and as the task does."""
    name = artifact.manifest.task
    if name not in TASKS:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: `task`: expected one of {sorted(TASKS)}, found {name!r}")
    # Imported when asked for: a task may need libraries that others do not.
    module, _, kind = TASKS[name].rpartition(".")
    task = cast("Task", getattr(import_module(module), kind)(artifact, batch_rows))
    reference = artifact.manifest.reference_distribution
    if reference is not None and (unknown := reference.ratios.keys() - set(task.labels)):
        raise ArtifactError(
            f"{artifact.folder / MANIFEST}: reference_distribution.ratios: expected only labels that the model "
            f"predicts, found {min(unknown)!r}"
        )
    return task
