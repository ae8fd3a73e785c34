"""The model's scores of labels as probabilities, and the labels that they say: for every task that classifies.

The last axis of scores and probabilities is the labels, in the manifest's order.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.artifact.datatypes import DTYPES, Array, Tensors
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Label, Labels, LabelScore

Probabilities = NDArray[np.float32]
# How far a probability may lie outside 0 … 1, and a sum of one row from 1: float16 and int8 files round each. An int8
# file is wrong by up to half a step of 1/256 in each label.
OUTSIDE = 0.01
SUM, SUM_EACH, SUM_LABELS = 0.01, 1 / 512, 100


class LabelScores:
    """Of a manifest's `labels`, by its `problem_type`, `scores` and `threshold`."""

    def __init__(self, artifact: Artifact, *, rank: int = 2) -> None:
        """rank: of the output that holds the scores. Raises ArtifactError for a manifest that does not fit."""
        manifest, self._where = artifact.manifest, artifact.folder / MANIFEST
        self.labels, self._multi = manifest.labels, manifest.problem_type == "multi_label"
        self._scores, self._threshold = manifest.scores, manifest.threshold
        self.output = manifest.outputs[0].name
        self._sum_tolerance = SUM + SUM_EACH * min(len(self.labels), SUM_LABELS)
        self._check_labels(manifest.outputs[0], rank)
        refused, fitting = ("logits", "sigmoid") if self._multi else ("sigmoid", "logits")
        if manifest.scores == refused:
            raise ArtifactError(
                f"{self._where}: `scores`: expected {fitting} or probabilities for {manifest.problem_type} "
                f"{manifest.task}, found {refused}"
            )
        probabilities = TensorSpec("probabilities", "FP32", [-1, len(self.labels)])
        best = [TensorSpec("label", "BYTES", [-1]), TensorSpec("score", "FP32", [-1])]
        self.outputs = [*best, probabilities]
        if self._multi:
            self.outputs = [TensorSpec("row", "INT64", [-1]), *best, probabilities]

    def _check_labels(self, spec: TensorSpec, rank: int) -> None:
        if DTYPES[spec.datatype].kind != "f" or len(spec.shape) != rank:
            axes = "rows, labels" if rank == 2 else "rows, tokens, labels"
            raise ArtifactError(
                f"{self._where}: output {spec.name!r}: expected float [{axes}], found {spec.datatype} {spec.shape}"
            )
        if not self.labels:
            raise ArtifactError(f"{self._where}: `labels`: expected a value for this task, found none")
        count, least = len(self.labels), 1 if self._multi else 2
        if spec.shape[-1] not in (-1, count) or len(set(self.labels)) != count or count < least:
            expected = spec.shape[-1] if spec.shape[-1] >= least else f"at least {least}"
            raise ArtifactError(
                f"{self._where}: `labels`: expected {expected} different ones, as {spec.name!r} has, found {count}"
            )

    def probabilities(self, scores: Array) -> Probabilities:
        """The scores as probabilities. Raises ValueError unless they are finite, and what `scores` says they are."""
        found: Probabilities = scores.astype(np.float32, copy=False)
        if self._scores == "probabilities":
            if not self._are_probabilities(found):
                raise ValueError("model output: expected probabilities, as the manifest's `scores` says")
            return found
        if not np.isfinite(found).all():
            raise ValueError("model output: expected finite scores")
        return softmax(found) if self._scores == "logits" else sigmoid(found)

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Probabilities of each row. Raises ValueError unless there is one for each label, and as `probabilities`."""
        scores, shape = outputs[self.output], (len(payloads), len(self.labels))
        if scores.shape != shape:
            raise ValueError(f"model output: expected {shape}, found {scores.shape}")
        return list(self.probabilities(scores))

    def _are_probabilities(self, scores: Probabilities) -> bool:
        # NaN fails each comparison.
        if not scores.min() >= -OUTSIDE:
            return False
        if self._multi:
            return bool(scores.max() <= 1 + OUTSIDE)
        return bool(np.abs(scores.sum(-1) - 1).max() <= self._sum_tolerance)

    def check(self, rows: Sequence[Array]) -> None:
        """rows: scores of golden inputs, as the model gives them.

        Raises ArtifactError, saying which `scores` would fit, unless they are what `scores` says they are.
        """
        if any(row.shape[-1] != len(self.labels) for row in rows):
            return  # which running them says as well
        found = np.concatenate([row.reshape(-1, len(self.labels)) for row in rows]).astype(np.float32)
        fits = self._are_probabilities(found)
        if self._scores == "probabilities" and not fits:
            if not np.isfinite(found).all():
                expected = "finite numbers"
            elif found.min() >= -OUTSIDE and found.max() <= 1 + OUTSIDE:
                expected = "multi_label for `problem_type`, since rows do not sum to 1"
            else:
                expected = "sigmoid" if self._multi else "logits"
            raise ArtifactError(
                f"{self._where}: `scores`: expected {expected}: golden rows of output {self.output!r} lie in "
                f"{found.min():.4g} … {found.max():.4g} and sum to {found.sum(-1).min():.4g} … "
                f"{found.sum(-1).max():.4g}; found probabilities"
            )
        if self._scores == "logits" and fits:
            raise ArtifactError(
                f"{self._where}: `scores`: expected probabilities: golden rows of output {self.output!r} lie in "
                "0 … 1 and sum to 1 already; found logits"
            )

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> Sequence[Label | Labels]:
        """The likeliest label of each row, or where there may be several those at or over the threshold."""
        pairs = zip(units, results, strict=True)
        if self._multi:
            return [Labels(self._over_threshold(row), unit.truncated) for unit, row in pairs]
        found: list[Label | Labels] = []
        for unit, row in pairs:
            best = int(row.argmax())
            found.append(Label(self.labels[best], round(float(row[best]), 6), unit.truncated))
        return found

    def _over_threshold(self, row: Probabilities) -> list[LabelScore]:
        over = [index for index in np.argsort(-row, kind="stable") if row[index] >= self._threshold]
        return [LabelScore(self.labels[index], round(float(row[index]), 6)) for index in over]

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """`label` and `score` of the predictions, `probabilities` [rows, labels]; where a row may have several labels,
        `row` says whose each is."""
        predictions = self.predictions(units, results)
        rows: list[int] = []
        found: list[Label | LabelScore] = []
        for index, each in enumerate(predictions):
            part: Sequence[Label | LabelScore] = each.labels if isinstance(each, Labels) else [each]
            rows += [index] * len(part)
            found.extend(part)
        outputs: Tensors = {"row": np.array(rows, np.int64)} if self._multi else {}
        return outputs | {
            "label": np.array([each.label for each in found], np.object_),
            "score": np.array([each.score for each in found], np.float32),
            "probabilities": np.stack(results),
        }


def softmax(logits: Probabilities) -> Probabilities:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Probabilities = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: Probabilities) -> Probabilities:
    """Of each number by itself, however large."""
    power = np.exp(-np.abs(logits))
    result: Probabilities = np.where(logits >= 0, 1, power) / (1 + power)
    return result
