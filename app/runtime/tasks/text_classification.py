"""Text classification: texts → token ids → scores of each label → the likeliest, or those over the threshold.

A result is float32 probabilities [labels].
"""

from collections.abc import Callable, Sequence
from typing import Any

from app.artifact.datatypes import Tensors
from app.artifact.manifest import Artifact
from app.runtime.tasks.scores import LabelScores
from app.runtime.tasks.text import TextTask


class TextClassification(TextTask):
    """See `app.runtime.tasks.Task`."""

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError as TextTask and LabelScores do."""
        super().__init__(artifact, batch_rows)
        self._labels = LabelScores(artifact)
        self.outputs = self._labels.outputs
        # Those of the labels as they are.
        self.predictions, self.respond = self._labels.predictions, self._labels.respond

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Probabilities of each row. Raises ValueError unless there is one for each label."""
        shape = (len(payloads), len(self._labels.labels))
        return list(self._labels.probabilities(self.scores(outputs, shape)))

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """As TextTask's, and that golden texts' scores are what the manifest says they are."""
        super().check(infer)
        self._labels.check(self.golden_scores(infer))
