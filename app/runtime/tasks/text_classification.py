"""Text classification: texts → token ids → scores of each label → the likeliest, or those over the threshold.

A result is float32 probabilities [labels].
"""

from collections.abc import Callable

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
        self.labels, self.outputs = self._labels.labels, self._labels.outputs
        # Those of the labels as they are.
        self.split, self.predictions, self.respond = self._labels.split, self._labels.predictions, self._labels.respond

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """As TextTask's, and that golden texts' scores are what the manifest says they are."""
        super().check(infer)
        self._labels.check(self.golden_scores(infer))
