"""A model's task as columns: which it takes and gives, rows as its inputs, its results as answers. Knows no files."""

from collections.abc import Sequence
from typing import Any, cast, get_type_hints

import msgspec
import numpy as np

from app.artifact.datatypes import DTYPES, Array
from app.artifact.manifest import TensorSpec
from app.errors import ConfigError, Invalid
from app.runtime.session import Model
from app.runtime.tasks import Encoded, PredictTask
from app.runtime.tasks.tensors import TensorTask
from app.runtime.tasks.text import require_not_blank
from app.scoring.formats import Bad, Row

# Kinds of numbers that may stand for a tensor's own.
KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "O": "U"}


class Table:
    """columns: that a row must have. fields: the columns of an answer, with their types."""

    def __init__(self, model: Model, file_format: str, text_column: str, id_column: str) -> None:
        """id_column: carried along; "": the number of the row. Raises ConfigError for what cannot be scored so."""
        task, name = model.task, model.artifact.manifest.task
        self._task, self._texts, self._id_column = task, task.counts_tokens, id_column
        # The words of JSON have no NaN and no infinity.
        self._finite = file_format != "parquet"
        if not self._texts and not isinstance(task, TensorTask):
            raise ConfigError(f"task {name}: app.scoring takes texts and tensors; send the others to the server")
        if not self._texts and file_format == "csv":
            raise ConfigError(f"task {name}: tensors are scored from JSONL or Parquet, not from CSV")
        names = [spec.name for spec in task.inputs]
        self._inputs = [text_column if self._texts and each == "text" else each for each in names]
        self.columns = [*self._inputs, *([id_column] if id_column else [])]
        answer = self._answer_fields(model)
        if "id" in answer:
            raise ConfigError("the model's outputs: expected none of the name 'id', which each answer has of its row")
        self.fields = {"id": int, **answer, **({"truncated": bool} if self._texts else {})}

    def _answer_fields(self, model: Model) -> dict[str, Any]:
        """Names and types, as `app.scoring.parquet` takes them."""
        if not hasattr(self._task, "predictions"):
            return {spec.name: spec for spec in self._task.outputs}
        unit = self._task.golden()[0].units[0]
        sample = cast(PredictTask, self._task).predictions([unit], model.run([unit.payload]))[0]

        def kind(name: str, declared: Any) -> Any:
            value = getattr(sample, name)
            # Of a union, what this model answers.
            return dict.fromkeys(value, float) if isinstance(value, dict) else float if name == "value" else declared

        return {name: kind(name, each) for name, each in get_type_hints(type(sample)).items() if name != "truncated"}

    def take(self, row: Row) -> tuple[Any, Any]:
        """The row's id (None: its number) and its input. Raises Invalid, never with what the row holds."""
        if isinstance(row, Bad):
            raise Invalid(row)
        for column in self.columns:
            if row.get(column) is None:
                raise Invalid(f"no {column!r}")
        identity = row[self._id_column] if self._id_column else None
        if not isinstance(identity, str | int | float | None):
            raise Invalid(f"{self._id_column!r}: expected text or a number, found {type(identity).__name__}")
        if not self._texts:
            pairs = zip(self._task.inputs, self._inputs, strict=True)
            return identity, {spec.name: self._array(spec, row[column]) for spec, column in pairs}
        values = tuple(row[column] for column in self._inputs)
        for column, value in zip(self._inputs, values, strict=True):
            if not isinstance(value, str):
                raise Invalid(f"{column!r}: expected text, found {type(value).__name__}")
            require_not_blank(value, repr(column))
        return identity, values if len(values) > 1 else values[0]

    def _array(self, spec: TensorSpec, value: Any) -> Array:
        dtype = DTYPES[spec.datatype]
        try:
            found = np.asarray(value)
            with np.errstate(over="ignore"):
                array = found.astype(dtype)
        except (ValueError, TypeError, OverflowError):
            raise Invalid(f"{spec.name!r}: expected {spec.datatype} in lists of one length") from None
        # A number that the datatype cannot hold becomes another one, or infinity.
        whole = dtype.kind not in "iu" or np.array_equal(array, found)
        if found.size and (
            found.dtype.kind not in KINDS[dtype.kind]
            or not whole
            or (dtype.kind == "f" and not np.isfinite(array).all())
        ):
            raise Invalid(f"{spec.name!r}: expected {spec.datatype}")
        # Where rows share a run, the first axis of what the model takes is theirs.
        return array[None] if self._task.by_rows else array

    def encode(self, inputs: Sequence[Any]) -> list[Encoded | Bad]:
        """A unit of work for each input, or why there is none."""
        if self._texts:
            try:
                return list(self._task.encode(inputs))
            except Invalid:
                pass  # each by itself then says which
        return [self._encode_one([each] if self._texts else each) for each in inputs]

    def _encode_one(self, inputs: Any) -> Encoded | Bad:
        try:
            (unit,) = self._task.encode(inputs)
        except Invalid as error:
            return Bad(str(error))
        return unit

    def answer(self, unit: Encoded, result: Any) -> dict[str, Any]:
        """By the names of `fields`, without `id`; `truncated` only where it is true. Raises Invalid for an answer that
        the format has no word for, and for a result that is Bad."""
        if isinstance(result, Bad):
            raise Invalid(result)
        if hasattr(self._task, "predictions"):
            found: dict[str, Any] = msgspec.to_builtins(cast(PredictTask, self._task).predictions([unit], [result])[0])
            return found
        outputs = self._task.respond([unit], [result])
        for name, array in outputs.items():
            if self._finite and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise Invalid(f"output {name!r}: not a finite number, for which this format has no word")
        answer = {name: (array[0] if self._task.by_rows else array).tolist() for name, array in outputs.items()}
        return answer | ({"truncated": True} if unit.truncated else {})
