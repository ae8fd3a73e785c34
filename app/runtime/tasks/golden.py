"""What the gate asks of tasks with text: golden texts, a warm-up, the window. Knows no task's answers."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from app.artifact.datatypes import DTYPES, Array, Tensors
from app.artifact.manifest import GoldenText, TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded, GoldenCase


class TextGate:
    """The half of `app.runtime.tasks.text.TextTask` that no request needs."""

    max_tokens: int
    outputs: Sequence[TensorSpec]
    _output: TensorSpec
    _examples: Sequence[GoldenText]
    _shared: bool
    _where: Path
    _model_path: Path

    def encode(self, inputs: Sequence[Any]) -> list[Encoded]:
        """As TextTask does."""
        raise NotImplementedError

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """As TextTask does."""
        raise NotImplementedError

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """One short text, and as many as a run takes of the greatest length that it takes."""
        rows = batch_rows if self._shared else 1
        longest = min(self.max_tokens, max(1, batch_tokens // rows))
        return [self._shortest()], [Encoded(self._filler(longest), longest)] * rows

    def _shortest(self) -> Encoded:
        return min(self._golden_units, key=lambda unit: unit.length)

    def _filler(self, length: int) -> Any:
        """A payload of so many tokens. Of real ones: models may tell positions by which tokens are no padding."""
        return self.stretched(self._shortest().payload, length)

    def stretched(self, payload: Any, length: int) -> Any:
        """A payload over and over, to so many tokens."""
        return repeated(payload, length)

    def check(self, infer: Callable[[Tensors], Tensors]) -> None:
        """Raises ArtifactError if the model does not take a row of `max_tokens`, saying how long one it takes."""

        def takes(length: int) -> bool:
            try:
                infer(self.assemble([self._filler(length)]))
            # Whatever the model raises there.
            except Exception:
                return False
            return True

        taken, refused = self._shortest().length, self.max_tokens
        # A model that does not even take a golden text says more of itself when it runs them.
        if taken >= refused or not takes(taken) or takes(refused):
            return
        while refused - taken > 1:
            middle = (taken + refused) // 2
            taken, refused = (middle, refused) if takes(middle) else (taken, middle)
        raise ArtifactError(
            f"{self._where}: `max_tokens`: expected at most {taken}, the longest row that {self._model_path.name} "
            f"takes, found {self.max_tokens}"
        )

    def golden_scores(self, infer: Callable[[Tensors], Tensors]) -> list[Array]:
        """The model's first output for each golden text."""
        return [infer(self.assemble([unit.payload]))[self._output.name] for unit in self._golden_units]

    def golden(self) -> list[GoldenCase]:
        """The manifest's examples, and their outputs. Raises ArtifactError if there are none, or of other outputs."""
        cases = []
        for index, (unit, example) in enumerate(zip(self._golden_units, self._examples, strict=True)):
            where = f"golden.examples[{index}]"
            cases.append(GoldenCase(where, [unit], expected_outputs(f"{self._where}: {where}", example, self.outputs)))
        return cases

    @cached_property
    def _golden_units(self) -> list[Encoded]:
        if not self._examples:
            raise ArtifactError(f"{self._where}: `golden.examples`: expected at least one, found none")
        return self.encode([self.text_of(example) for example in self._examples])

    def text_of(self, example: GoldenText) -> Any:
        """A golden example as one of the inputs."""
        return example.text


def repeated(values: Sequence[Any], length: int) -> list[Any]:
    """The values over and over, to so many."""
    return (list(values) * (length // len(values) + 1))[:length]


def expected_outputs(where: str, example: GoldenText, outputs: Sequence[TensorSpec]) -> Tensors:
    """The example's outputs by name, in the shapes that `outputs` have. Raises ArtifactError if they have others."""
    values: dict[str, Sequence[Any]] = dict(example.outputs)
    if example.probabilities:
        values["probabilities"] = example.probabilities
    specs = {spec.name: spec for spec in outputs}
    if not values or not set(values) <= set(specs):
        raise ArtifactError(f"{where}: expected some of the outputs {sorted(specs)}, found {sorted(values)}")
    expected: Tensors = {}
    for name, found in values.items():
        shape = specs[name].shape[1:]
        size = int(np.prod(shape))
        if len(found) % size:
            raise ArtifactError(f"{where}: expected {size} {name}, found {len(found)}")
        try:
            expected[name] = np.array(found, DTYPES[specs[name].datatype]).reshape(-1, *shape)
        except ValueError:
            raise ArtifactError(f"{where}: {name}: expected numbers, found text") from None
    return expected
