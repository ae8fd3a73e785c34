"""Text ↔ tensors: what a row is for each task, how rows become one run, and how a run is split again.

Knows nothing of queues or HTTP. A row's length is its cost beside a padded neighbour: tokens for text, 1 for tensors.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError, Invalid

# The tokenizer keeps over a hundred bytes for each token of a text, also of those beyond the window. So it is given
# only the start of a long text, far more than its window can hold, and not too many texts at a time.
CHARACTERS_PER_TOKEN = 40
ENCODED_TOGETHER = 16


class Encoded(NamedTuple):
    """One unit of work. Units with equal `key` may share a run; `rows` is its size along the first axis."""

    payload: Any
    length: int
    rows: int = 1
    key: Hashable = None
    truncated: bool = False


class TextTask:
    """Text classification. A payload is a list of token ids; a result is float32 probabilities [labels]."""

    def __init__(self, artifact: Artifact) -> None:
        """Raises ArtifactError if the tokenizer does not load."""
        manifest = artifact.manifest
        path = artifact.path(manifest.tokenizer_file or "")
        self.labels = manifest.labels
        self.max_tokens = manifest.max_tokens or 0
        self.max_characters = self.max_tokens * CHARACTERS_PER_TOKEN
        self.tokenizer, self.pad_id = _load_tokenizer(path, self.max_tokens)
        self.output = manifest.outputs[0].name
        self.softmax = manifest.scores == "logits"
        self.dtypes = {spec.name: DTYPES[spec.datatype] for spec in manifest.inputs}
        unknown = set(self.dtypes) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in self.dtypes:
            raise ArtifactError(
                f"{artifact.path(manifest.model_file)}: inputs: expected input_ids and optionally attention_mask, "
                f"token_type_ids for task text-classification, found {sorted(self.dtypes)}"
            )

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """One unit per text, in order. Raises Invalid for an empty or blank text, naming its place."""
        for index, text in enumerate(texts):
            if not text or text.isspace():
                raise Invalid(f"text {index}: expected at least one character that is not blank")
        try:
            if len(texts) == 1:
                return [self._unit(texts[0], self.tokenizer.encode(texts[0][: self.max_characters]))]
            units: list[Encoded] = []
            for start in range(0, len(texts), ENCODED_TOGETHER):
                part = texts[start : start + ENCODED_TOGETHER]
                encodings = self.tokenizer.encode_batch_fast([text[: self.max_characters] for text in part])
                units += map(self._unit, part, encodings)
        except (UnicodeError, TypeError):
            raise Invalid("text: expected valid Unicode without lone surrogates") from None
        return units

    def _unit(self, text: str, encoding: Any) -> Encoded:
        # Cut before its window was full, by blanks or words of unusual length.
        if len(text) > self.max_characters and not encoding.overflowing:
            encoding = self.tokenizer.encode(text)
        return Encoded(encoding.ids, len(encoding), truncated=bool(encoding.overflowing))

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """Token ids padded to the longest: each input [rows, longest]."""
        longest = max(map(len, payloads))
        ids = np.full((len(payloads), longest), self.pad_id, self.dtypes["input_ids"])
        for index, row in enumerate(payloads):
            ids[index, : len(row)] = row
        inputs: Tensors = {"input_ids": ids}
        if "attention_mask" in self.dtypes:
            lengths = np.array([len(row) for row in payloads])[:, None]
            inputs["attention_mask"] = (np.arange(longest) < lengths).astype(self.dtypes["attention_mask"])
        if "token_type_ids" in self.dtypes:
            inputs["token_type_ids"] = np.zeros(ids.shape, self.dtypes["token_type_ids"])
        return inputs

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Probabilities of each row. Raises ValueError unless they are finite and one per label."""
        scores = outputs[self.output].astype(np.float32, copy=False)
        if scores.shape != (len(payloads), len(self.labels)) or not np.isfinite(scores).all():
            raise ValueError(f"model output: expected finite {(len(payloads), len(self.labels))}, found {scores.shape}")
        return list(_softmax(scores) if self.softmax else scores)


class TensorTask:
    """Any other model. A payload is its inputs by name, [rows, ...]; a result its outputs by name."""

    def __init__(self, artifact: Artifact, max_rows: int) -> None:
        manifest = artifact.manifest
        self.inputs = {spec.name: spec for spec in manifest.inputs}
        self.batching = manifest.batching
        self.max_rows = max_rows

    def encode(self, tensors: Tensors) -> list[Encoded]:
        """Checks tensors against the manifest and cuts them into units of at most `max_rows` rows.

        Raises Invalid naming the input, what was expected and what was found.
        """
        if set(tensors) != set(self.inputs):
            raise Invalid(f"inputs: expected just {sorted(self.inputs)}, found {len(tensors)}")
        for name, spec in self.inputs.items():
            _check_shape(spec, tensors[name].shape)
        if not self.batching:
            return [Encoded(tensors, 1, 1, key=uuid4().bytes)]
        sizes = {array.shape[0] for array in tensors.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise Invalid(f"inputs: expected the same first dimension of at least 1 in all, found {sorted(sizes)}")
        rows = sizes.pop()
        key = tuple(tensors[name].shape[1:] for name in self.inputs)
        return [
            Encoded(
                {name: array[start : start + self.max_rows] for name, array in tensors.items()},
                1,
                min(self.max_rows, rows - start),
                key,
            )
            for start in range(0, rows, self.max_rows)
        ]

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """Units stacked along the first axis."""
        if len(payloads) == 1:
            alone: Tensors = payloads[0]
            return alone
        return {name: np.concatenate([unit[name] for unit in payloads]) for name in self.inputs}

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Each unit's part of every output. Raises ValueError unless outputs have one row per input row."""
        if len(payloads) == 1 and not self.batching:
            return [outputs]
        counts = [next(iter(unit.values())).shape[0] for unit in payloads]
        if any(array.shape[:1] != (sum(counts),) for array in outputs.values()):
            raise ValueError(f"model output: expected {sum(counts)} rows in each output")
        ends = np.cumsum(counts)
        return [
            {name: array[end - count : end] for name, array in outputs.items()}
            for count, end in zip(counts, ends, strict=True)
        ]

    @staticmethod
    def join(results: Sequence[Tensors]) -> Tensors:
        """The outputs of one request's units as one tensor each."""
        if len(results) == 1:
            return results[0]
        return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def open_task(artifact: Artifact, max_rows: int) -> TextTask | TensorTask:
    """The task that the manifest names; max_rows: of one run. Raises ArtifactError as `TextTask`."""
    text = artifact.manifest.task == "text-classification"
    return TextTask(artifact) if text else TensorTask(artifact, max_rows)


def _load_tokenizer(path: Path, max_tokens: int) -> tuple[Tokenizer, int]:
    """The tokenizer, cutting at `max_tokens` and never padding, and the id that pads. Raises ArtifactError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
        pad_id = int((tokenizer.padding or {}).get("pad_id", tokenizer.token_to_id("[PAD]") or 0))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        # A file may load and still fail at its first text.
        tokenizer.encode("text")
    # The library raises plain Exception, and where its Rust code panics not even that.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        line = (str(error).splitlines() or ["?"])[0]
        raise ArtifactError(f"{path}: tokenizer does not load: {line[:300]}") from None
    return tokenizer, pad_id


def _check_shape(spec: TensorSpec, shape: Sequence[int]) -> None:
    if len(shape) != len(spec.shape) or any(e not in (-1, f) for e, f in zip(spec.shape, shape, strict=True)):
        raise Invalid(f"input {spec.name!r}: shape: expected {spec.shape}, found {list(shape)}")


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return result
