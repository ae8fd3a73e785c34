"""What a task is: how requests become rows of a model's run, and its outputs their answers. One file for each.

A new task is one file here and one entry of `TASKS`. Knows nothing of queues, HTTP or ONNX Runtime.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

from app.artifact.datatypes import Array, Tensors
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError

# The manifest's `task`, and the class that does it.
TASKS = {
    "text-classification": "app.runtime.tasks.text_classification.TextClassification",
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest label, its probability, whether the text was cut to the model's window, all probabilities."""

    label: str
    score: float
    truncated: bool
    probabilities: Array


class GoldenCase(NamedTuple):
    """Units, what the model must answer to them as the task's outputs, and where that is written."""

    where: str
    units: list[Encoded]
    expected: Tensors


class Task(Protocol):
    """All that the gate, the predictor and the protocol ask of a task.

    inputs, outputs: as clients of the Open Inference Protocol see them. takes_texts: whether /predict does too.
    counts_tokens: whether a `length` is tokens; else it is golden rows, and a run takes as many of these as of rows.
    batched: whether the first axis of every input is rows, as Triton's model configuration means it.
    """

    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    takes_texts: bool
    counts_tokens: bool
    batched: bool

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

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> list[Prediction]:
        """One request's results as predictions, where the task takes texts."""

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """The smallest and the largest batch."""

    def golden(self) -> list[GoldenCase]:
        """What the model must answer before it may serve. Raises ArtifactError if that cannot be read."""


def open_task(artifact: Artifact, batch_rows: int) -> Task:
    """The task that the manifest names. Raises ArtifactError if there is none, and as the task does."""
    name = artifact.manifest.task
    if name not in TASKS:
        raise ArtifactError(f"{artifact.folder / MANIFEST}: `task`: expected one of {sorted(TASKS)}, found {name!r}")
    # Imported when asked for: a task may need libraries that others do not.
    module, _, kind = TASKS[name].rpartition(".")
    return cast("Task", getattr(import_module(module), kind)(artifact, batch_rows))
