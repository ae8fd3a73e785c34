"""Text classification: texts → token ids → logits or probabilities of each label → the likeliest.

A payload is a list of token ids; a result is float32 probabilities [labels].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from app.artifact.datatypes import DTYPES, Tensors, decode_strings
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks import Encoded, GoldenCase, Prediction

# The tokenizer keeps over a hundred bytes for each token of a text, also of those beyond the window. So it is given
# only the start of a long text, more of it where blanks or words of unusual length fill that, and few texts at a time.
CHARACTERS_PER_TOKEN = 40
MANY_CHARACTERS = 1 << 18
ENCODED_TOGETHER = 16
# Tokenising this many takes about a millisecond.
QUICK_CHARACTERS = 8192


class TextClassification:
    """See `app.runtime.tasks.Task`."""

    takes_texts = True
    counts_tokens = True
    # Its rows are the only axis, which Triton's batching would leave out of the shapes.
    batched = False

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError if the manifest lacks what the task needs or the tokenizer does not load."""
        manifest, where = artifact.manifest, artifact.folder / MANIFEST
        for field in ("tokenizer_file", "max_tokens", "labels"):
            if not getattr(manifest, field):
                raise ArtifactError(f"{where}: `{field}`: expected a value for task {manifest.task}, found none")
        self.labels, self.max_tokens = manifest.labels, manifest.max_tokens or 0
        _check_labels(self.labels, manifest.outputs[0], str(where))
        self._examples, self._where = manifest.golden.examples, where
        self.inputs = [TensorSpec("text", "BYTES", [-1])]
        self.outputs = [
            TensorSpec("label", "BYTES", [-1]),
            TensorSpec("score", "FP32", [-1]),
            TensorSpec("probabilities", "FP32", [-1, len(self.labels)]),
        ]
        self._max_characters = self.max_tokens * CHARACTERS_PER_TOKEN
        self._quick_characters = min(self._max_characters, QUICK_CHARACTERS)
        self._tokenizer, self._pad_id = _load_tokenizer(artifact.path(manifest.tokenizer_file or ""), self.max_tokens)
        self._output = manifest.outputs[0].name
        self._softmax = manifest.scores == "logits"
        self._dtypes = {spec.name: DTYPES[spec.datatype] for spec in manifest.inputs}
        unknown = set(self._dtypes) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in self._dtypes:
            raise ArtifactError(
                f"{artifact.path(manifest.model_file)}: inputs: expected input_ids and optionally attention_mask, "
                f"token_type_ids for task {manifest.task}, found {sorted(self._dtypes)}"
            )

    def read(self, tensors: Tensors) -> list[str]:
        """The texts of the input `text`, BYTES [rows]."""
        text = tensors.get("text")
        if text is None or len(tensors) != 1:
            raise Invalid("inputs: expected one, named text")
        if text.ndim != 1 or text.dtype != np.object_ or not text.size:
            found = f"{text.dtype} {list(text.shape)}"
            raise Invalid(f"inputs[0]: expected BYTES [rows] with at least one row, found {found}")
        texts: list[str] = decode_strings(text, "inputs[0]").tolist()
        return texts

    def rows(self, inputs: Sequence[str]) -> int:
        return len(inputs)

    def encodes_slowly(self, inputs: Sequence[str]) -> bool:
        return sum(map(len, inputs)) > QUICK_CHARACTERS

    def encode(self, inputs: Sequence[str]) -> list[Encoded]:
        """One unit per text, in order. Raises Invalid for an empty or blank text, naming its place."""
        for index, text in enumerate(inputs):
            if not text or text.isspace():
                raise Invalid(f"text {index}: expected at least one character that is not blank")
        units: list[Encoded] = []
        try:
            if len(inputs) == 1 and len(inputs[0]) <= self._quick_characters:
                encoding = self._tokenizer.encode(inputs[0])
                return [Encoded(encoding.ids, len(encoding), truncated=bool(encoding.overflowing))]
            for start in range(0, len(inputs), ENCODED_TOGETHER):
                units += self._encode_together(inputs[start : start + ENCODED_TOGETHER])
        except (UnicodeError, TypeError):
            raise Invalid("text: expected valid Unicode without lone surrogates") from None
        return units

    def _encode_together(self, texts: Sequence[str]) -> list[Encoded]:
        cut = self._max_characters
        # Unlike `encode` it lets the event loop go on.
        encodings = self._tokenizer.encode_batch_fast([text[:cut] for text in texts])
        rest: Sequence[int] = range(len(texts))
        while rest := [i for i in rest if MANY_CHARACTERS > cut < len(texts[i]) and not encodings[i].overflowing]:
            cut *= 4
            more = self._tokenizer.encode_batch_fast([texts[i][:cut] for i in rest])
            for i, encoding in zip(rest, more, strict=True):
                encodings[i] = encoding
        return [
            Encoded(encoding.ids, len(encoding), truncated=bool(encoding.overflowing) or len(text) > cut)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """Token ids padded to the longest: each input [rows, longest]."""
        longest = max(map(len, payloads))
        ids = np.full((len(payloads), longest), self._pad_id, self._dtypes["input_ids"])
        for index, row in enumerate(payloads):
            ids[index, : len(row)] = row
        inputs: Tensors = {"input_ids": ids}
        if "attention_mask" in self._dtypes:
            lengths = np.array([len(row) for row in payloads])[:, None]
            inputs["attention_mask"] = (np.arange(longest) < lengths).astype(self._dtypes["attention_mask"])
        if "token_type_ids" in self._dtypes:
            inputs["token_type_ids"] = np.zeros(ids.shape, self._dtypes["token_type_ids"])
        return inputs

    def split(self, payloads: Sequence[Any], outputs: Tensors) -> list[Any]:
        """Probabilities of each row. Raises ValueError unless they are finite and one per label."""
        scores = outputs[self._output].astype(np.float32, copy=False)
        if scores.shape != (len(payloads), len(self.labels)) or not np.isfinite(scores).all():
            raise ValueError(f"model output: expected finite {(len(payloads), len(self.labels))}, found {scores.shape}")
        return list(_softmax(scores) if self._softmax else scores)

    def predictions(self, units: Sequence[Encoded], results: Sequence[Any]) -> list[Prediction]:
        found = []
        for unit, row in zip(units, results, strict=True):
            best = int(row.argmax())
            found.append(Prediction(self.labels[best], round(float(row[best]), 6), unit.truncated, row))
        return found

    def respond(self, units: Sequence[Encoded], results: Sequence[Any]) -> Tensors:
        """`label` BYTES [rows], `score` FP32 [rows], `probabilities` FP32 [rows, labels]."""
        predictions = self.predictions(units, results)
        return {
            "label": np.array([each.label for each in predictions], np.object_),
            "score": np.array([each.score for each in predictions], np.float32),
            "probabilities": np.stack([each.probabilities for each in predictions]),
        }

    def warm_up(self, batch_rows: int, batch_tokens: int) -> tuple[list[Encoded], list[Encoded]]:
        """One short text, and as many as a run takes of the greatest length that it takes."""
        longest = min(self.max_tokens, max(1, batch_tokens // batch_rows))
        smallest = self.encode([self._examples[0].text])
        return smallest, [Encoded([self._pad_id] * longest, longest)] * batch_rows

    def golden(self) -> list[GoldenCase]:
        """The manifest's examples, their probabilities. Raises ArtifactError if there are none, or of other labels."""
        if not self._examples:
            raise ArtifactError(f"{self._where}: `golden.examples`: expected at least one, found none")
        if any(len(example.probabilities) != len(self.labels) for example in self._examples):
            raise ArtifactError(f"{self._where}: golden.examples: expected {len(self.labels)} probabilities in each")
        units = self.encode([example.text for example in self._examples])
        return [
            GoldenCase(
                f"golden.examples[{index}]",
                [unit],
                {"probabilities": np.array([example.probabilities], np.float32)},
            )
            for index, (unit, example) in enumerate(zip(units, self._examples, strict=True))
        ]


def _check_labels(labels: Sequence[str], spec: TensorSpec, where: str) -> None:
    """Raises ArtifactError unless the output is float [rows, one per label]."""
    if DTYPES[spec.datatype].kind != "f" or len(spec.shape) != 2:
        raise ArtifactError(
            f"{where}: output {spec.name!r}: expected float [rows, labels], found {spec.datatype} {spec.shape}"
        )
    if spec.shape[1] not in (-1, len(labels)) or len(set(labels)) != len(labels) or len(labels) < 2:
        raise ArtifactError(
            f"{where}: `labels`: expected {spec.shape[1]} different ones, as {spec.name!r} has, found {len(labels)}"
        )


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


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return result
