"""A model that passed the gate: artifact, session, task, and what the gate learned about them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from app.artifact.datatypes import Tensors
from app.artifact.manifest import Artifact
from app.runtime.tasks.task import TensorTask, TextTask


class Runs(Protocol):
    """A session, here or in another process. provider: "cpu" or "cuda", what is truly in use."""

    provider: str

    def run(self, inputs: Tensors) -> Tensors:
        """Outputs by name."""


@dataclass(slots=True)
class Model:
    """Times in seconds."""

    artifact: Artifact
    session: Runs
    task: TextTask | TensorTask
    batch_rows: int
    batch_tokens: int
    tokens_per_second: float = 1.0
    overhead_tokens: float = inf
    stage_seconds: dict[str, float] = field(default_factory=dict)
    golden_error: float = 0.0

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        """One batch, from payloads to results: the function that the batcher calls in its threads."""
        return self.task.split(payloads, self.session.run(self.task.assemble(payloads)))
