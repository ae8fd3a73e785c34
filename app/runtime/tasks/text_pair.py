"""Pairs of texts (cross-encoder): query and text → token ids of both in one row → how well they fit.

A payload is token ids and their types; a result is the model's score of a pair, a number.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import Artifact, GoldenText, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.golden import repeated
from app.runtime.tasks.scores import OUTSIDE, sigmoid
from app.runtime.tasks.text import QUICK_CHARACTERS, TextTask, padded, require_not_blank

Pair = tuple[str, str]


class TextPair(TextTask):
    """See `app.runtime.tasks.Task`."""

    inputs = (TensorSpec("query", "BYTES", [-1]), TensorSpec("text", "BYTES", [-1]))
    outputs = (TensorSpec("score", "FP32", [-1]),)

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError as TextTask does, and for an output of more than one number a row."""
        super().__init__(artifact, batch_rows)
        spec, self._scores = self._output, artifact.manifest.scores
        if DTYPES[spec.datatype].kind != "f" or spec.shape[1:] not in ([], [1], [-1]):
            raise ArtifactError(
                f"{self._where}: output {spec.name!r}: expected float [rows, 1] or [rows], found {spec.datatype} "
                f"{spec.shape}"
            )

    def encodes_slowly(self, inputs: Sequence[Pair]) -> bool:
        return sum(len(query) + len(text) for query, text in inputs) > QUICK_CHARACTERS

    def encode(self, inputs: Sequence[Pair]) -> list[Encoded]:
        """One unit per pair, in order. Raises Invalid for an empty or blank text, naming its place."""
        for index, pair in enumerate(inputs):
            for name, text in zip(("query", "text"), pair, strict=True):
                require_not_blank(text, f"{name} {index}")
        return self.encode_all(inputs)

    def characters(self, text: Pair) -> int:
        return max(map(len, text))

    def start_of(self, text: Pair, characters: int) -> Pair:
        return text[0][:characters], text[1][:characters]

    def payload(self, encoding: Encoding, text: Any) -> Any:
        return encoding.ids, encoding.type_ids

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """As TextTask's, with the types of tokens where the model takes them."""
        inputs = super().assemble([ids for ids, _ in payloads])
        if "token_type_ids" in inputs:
            inputs["token_type_ids"] = padded([types for _, types in payloads], 0, self._dtypes["token_type_ids"])
        return inputs

    def stretched(self, payload: Any, length: int) -> Any:
        return tuple(repeated(part, length) for part in payload)

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each pair's score. Raises ValueError unless it is finite, and what `scores` says it is."""
        count = len(payloads)
        shape = (count,) if len(self._output.shape) == 1 else (count, 1)
        found = self.scores(outputs, shape).astype(np.float32, copy=False).reshape(count)
        if not np.isfinite(found).all() or (self._scores == "probabilities" and not _within(found)):
            raise ValueError(f"model output: expected finite scores, and {self._scores} as the manifest says")
        scores: list[float] = found.tolist()
        return scores

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """As TextTask's, and that golden pairs' scores are what the manifest says they are."""
        super().check(infer)
        found = np.concatenate([scores.reshape(-1) for scores in self.golden_scores(infer)])
        if self._scores == "probabilities" and not _within(found):
            raise ArtifactError(
                f"{self._where}: `scores`: expected sigmoid (or logits, to answer them as they are): golden pairs' "
                f"scores lie in {found.min():.4g} … {found.max():.4g}; found probabilities"
            )

    def scored(self, units: Sequence[Encoded], results: Sequence[Any], *, raw: bool = False) -> NDArray[np.float32]:
        """One score a pair. raw: as the model gives it, whatever `scores` says."""
        found = np.array(results, np.float32)
        return sigmoid(found) if self._scores == "sigmoid" and not raw else found

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """`score` FP32 [rows]."""
        return {"score": self.scored(units, results)}

    def text_of(self, example: GoldenText) -> Pair:
        if example.text_pair is None:
            raise ArtifactError(f"{self._where}: golden.examples: `text_pair`: expected a second text, found none")
        return example.text, example.text_pair


def _within(scores: NDArray[np.float32]) -> bool:
    return bool((np.abs(scores - 0.5) <= 0.5 + OUTSIDE).all())
