"""Text regression: texts → token ids → a number, or several that have names.

A result is float32 [values].
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Value
from app.runtime.tasks.text import TextTask


class TextRegression(TextTask):
    """See `app.runtime.tasks.Task`."""

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError as TextTask does, and for another output than a number for each label."""
        super().__init__(artifact, batch_rows)
        spec, self._names = self._output, artifact.manifest.labels
        self._count = max(1, len(self._names))
        sizes = [-1] if self._count > 1 and len(spec.shape) == 1 else [-1, self._count]
        fits = len(spec.shape) == 2 or (len(spec.shape) == 1 and self._count == 1)
        if DTYPES[spec.datatype].kind != "f" or not fits or (len(spec.shape) == 2 and spec.shape[1] not in sizes):
            raise ArtifactError(
                f"{self._where}: output {spec.name!r}: expected float [rows, {self._count}], as many as `labels`, "
                f"found {spec.datatype} {spec.shape}"
            )
        self.outputs = [TensorSpec("value", "FP32", [-1, self._count])]

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each text's numbers. Raises ValueError unless they are finite and one for each label."""
        shape = (len(payloads), self._count)[: len(self._output.shape)]
        found = self.scores(outputs, shape).astype(np.float32, copy=False).reshape(-1, self._count)
        if not np.isfinite(found).all():
            raise ValueError("model output: expected finite values")
        return list(found)

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> list[Value]:
        """The number, or each by its name if there are several."""
        found = []
        for unit, row in zip(units, results, strict=True):
            values = row.tolist()
            value = values[0] if self._count == 1 else dict(zip(self._names, values, strict=True))
            found.append(Value(value, unit.truncated))
        return found

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """`value` FP32 [rows, values]."""
        return {"value": np.stack(results)}
