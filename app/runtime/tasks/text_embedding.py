"""Text embedding: texts → token ids → one vector for each text.

A result is float32 [dimensions], pooled but not normalized: whether it is to be, a request may say.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.text import TextTask


class TextEmbedding(TextTask):
    """See `app.runtime.tasks.Task`."""

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError as TextTask does, and for an output that is no vector of a known size."""
        super().__init__(artifact, batch_rows)
        self._pooling, self._normalize = artifact.manifest.pooling, artifact.manifest.normalize
        spec, axes = self._output, "[rows, dimensions]"
        if self._pooling != "none":
            axes = "[rows, tokens, dimensions]"
        if DTYPES[spec.datatype].kind != "f" or len(spec.shape) != axes.count(",") + 1 or spec.shape[-1] < 1:
            raise ArtifactError(
                f"{self._where}: output {spec.name!r}: expected float {axes} with a fixed last size for `pooling` "
                f"{self._pooling}, found {spec.datatype} {spec.shape}"
            )
        self.dimensions = spec.shape[-1]
        self.outputs = [TensorSpec("embedding", "FP32", [-1, self.dimensions])]

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each text's vector: the mean of its own tokens, the first of them, or what the model gives."""
        if self._pooling == "none":
            found = list(self.scores(outputs, (len(payloads), self.dimensions)).astype(np.float32, copy=False))
        else:
            shape = (len(payloads), max(map(len, payloads)), self.dimensions)
            tokens = self.scores(outputs, shape).astype(np.float32, copy=False)
            if self._pooling == "cls":
                found = list(tokens[:, 0])
            else:
                found = [row[: len(ids)].mean(axis=0) for ids, row in zip(payloads, tokens, strict=True)]
        if not np.isfinite(found).all():
            raise ValueError("model output: expected finite embeddings")
        return found

    def embeddings(
        self, units: Sequence[Encoded], results: Sequence[Any], *, normalize: bool | None = None
    ) -> NDArray[np.float32]:
        """One vector a row. normalize: to length 1; None: as the manifest says."""
        found: NDArray[np.float32] = np.stack(results)
        if self._normalize if normalize is None else normalize:
            # A vector of zeros has no direction, and stays what it is.
            found = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return found

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """`embedding` FP32 [rows, dimensions]."""
        return {"embedding": self.embeddings(units, results)}
