"""What tasks with text share: tokenizer, window, token ids as padded tensors. Knows no task's answers.

A payload is a list of token ids, unless a task needs more of a text; then its ids come first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from app.artifact.datatypes import DTYPES, Array, Tensors, decode_strings
from app.artifact.manifest import MANIFEST, Artifact, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.tasks import Encoded, run_key
from app.runtime.tasks.golden import TextGate

# The tokenizer keeps over a hundred bytes for each token of a text, also of those beyond the window. So it is given
# only the start of a long text, more of it where blanks or words of unusual length fill that, and few texts at a time.
CHARACTERS_PER_TOKEN = 40
MANY_CHARACTERS = 1 << 18
ENCODED_TOGETHER = 16
# Tokenising this many takes about a millisecond.
QUICK_CHARACTERS = 8192
NOT_UNICODE = "text: expected valid Unicode without lone surrogates"


class TextTask(TextGate):
    """Base of the tasks with text; see `app.runtime.tasks.Task`. They add `outputs`, `split` and `respond`."""

    counts_tokens = True
    # Its rows are the only axis, which Triton's batching would leave out of the shapes.
    batched, by_rows = False, True
    labels: Sequence[str] = ()
    inputs: Sequence[TensorSpec] = (TensorSpec("text", "BYTES", [-1]),)

    def __init__(self, artifact: Artifact, batch_rows: int) -> None:
        """Raises ArtifactError if the manifest lacks what the task needs or the tokenizer does not load."""
        manifest, self._where = artifact.manifest, artifact.folder / MANIFEST
        for field in ("tokenizer_file", "max_tokens"):
            if not getattr(manifest, field):
                raise ArtifactError(f"{self._where}: `{field}`: expected a value for task {manifest.task}, found none")
        self.max_tokens = manifest.max_tokens or 0
        self._model_path, self._examples = artifact.path(manifest.model_file), manifest.golden.examples
        self._max_characters = self.max_tokens * CHARACTERS_PER_TOKEN
        self._quick_characters = min(self._max_characters, QUICK_CHARACTERS)
        self._tokenizer, self._pad_id = _load_tokenizer(artifact.path(manifest.tokenizer_file or ""), self.max_tokens)
        # The fast one finds no offsets. Unlike `encode`, both let the event loop go on.
        self._encode_batch = self._tokenizer.encode_batch_fast
        self._output, self._shared = manifest.outputs[0], manifest.batching
        self._dtypes = {spec.name: DTYPES[spec.datatype] for spec in manifest.inputs}
        unknown = set(self._dtypes) - {"input_ids", "attention_mask", "token_type_ids"}
        if unknown or "input_ids" not in self._dtypes:
            raise ArtifactError(
                f"{self._model_path}: inputs: expected input_ids and optionally attention_mask, "
                f"token_type_ids for task {manifest.task}, found {sorted(self._dtypes)}"
            )

    def read(self, tensors: Tensors) -> list[Any]:
        """The texts of the inputs, each BYTES [rows]; tuples of them where there are several inputs."""
        names = [spec.name for spec in self.inputs]
        if set(tensors) != set(names):
            raise Invalid(f"inputs: expected {' and '.join(names)}")
        columns = []
        for name in names:
            text = tensors[name]
            if text.ndim != 1 or text.dtype != np.object_ or not text.size:
                found = f"{text.dtype} {list(text.shape)}"
                raise Invalid(f"input {name}: expected BYTES [rows] with at least one row, found {found}")
            columns.append(decode_strings(text, f"input {name}").tolist())
        if len({len(column) for column in columns}) != 1:
            raise Invalid(f"inputs: expected as many rows in {' as in '.join(names)}")
        return list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]

    def rows(self, inputs: Sequence[Any]) -> int:
        return len(inputs)

    def encodes_slowly(self, inputs: Sequence[Any]) -> bool:
        return sum(map(len, inputs)) > QUICK_CHARACTERS

    def encode(self, inputs: Sequence[Any]) -> list[Encoded]:
        """One unit per text, in order. Raises Invalid for an empty or blank text, naming its place."""
        for index, text in enumerate(inputs):
            require_not_blank(text, f"text {index}")
        if len(inputs) != 1 or len(inputs[0]) > self._quick_characters:
            return self.encode_all(inputs)
        try:
            encoding = self._tokenizer.encode(inputs[0])
        except (UnicodeError, TypeError):
            raise Invalid(NOT_UNICODE) from None
        payload = self.payload(encoding, inputs[0])
        return [Encoded(payload, len(encoding), 1, run_key(shared=self._shared), bool(encoding.overflowing))]

    def encode_all(self, inputs: Sequence[Any]) -> list[Encoded]:
        """As `encode`, of inputs that are not blank."""
        units: list[Encoded] = []
        try:
            for start in range(0, len(inputs), ENCODED_TOGETHER):
                units += self._encode_together(inputs[start : start + ENCODED_TOGETHER])
        except (UnicodeError, TypeError):
            raise Invalid(NOT_UNICODE) from None
        return units

    def _encode_together(self, texts: Sequence[Any]) -> list[Encoded]:
        cut, sizes = self._max_characters, [self.characters(text) for text in texts]
        encodings = self._encode_batch([self.start_of(text, cut) for text in texts])
        rest: Sequence[int] = range(len(texts))
        while rest := [i for i in rest if MANY_CHARACTERS > cut < sizes[i] and not encodings[i].overflowing]:
            cut *= 4
            more = self._encode_batch([self.start_of(texts[i], cut) for i in rest])
            for i, encoding in zip(rest, more, strict=True):
                encodings[i] = encoding
        units = []
        for text, size, encoding in zip(texts, sizes, encodings, strict=True):
            truncated = bool(encoding.overflowing) or size > cut
            units.append(
                Encoded(self.payload(encoding, text), len(encoding), 1, run_key(shared=self._shared), truncated)
            )
        return units

    def characters(self, text: Any) -> int:
        """How long one of the inputs is."""
        return len(text)

    def start_of(self, text: Any, characters: int) -> Any:
        """One of the inputs without what lies beyond so many characters."""
        return text[:characters]

    def payload(self, encoding: Encoding, text: Any) -> Any:
        """What `assemble`, `split` and `respond` need of a text."""
        return encoding.ids

    def assemble(self, payloads: Sequence[Any]) -> Tensors:
        """Token ids padded to the longest: each input [rows, longest]."""
        ids = padded(payloads, self._pad_id, self._dtypes["input_ids"])
        inputs: Tensors = {"input_ids": ids}
        if "attention_mask" in self._dtypes:
            lengths = np.array([len(row) for row in payloads])[:, None]
            inputs["attention_mask"] = (np.arange(ids.shape[1]) < lengths).astype(self._dtypes["attention_mask"])
        if "token_type_ids" in self._dtypes:
            inputs["token_type_ids"] = np.zeros(ids.shape, self._dtypes["token_type_ids"])
        return inputs

    def scores(self, outputs: Tensors, shape: tuple[int, ...]) -> Array:
        """The model's first output. Raises ValueError unless it has this shape."""
        found = outputs[self._output.name]
        if found.shape != shape:
            raise ValueError(f"model output: expected {shape}, found {found.shape}")
        return found


def require_not_blank(text: str, where: str) -> None:
    """Raises Invalid for a text without anything in it."""
    if not text or text.isspace():
        raise Invalid(f"{where}: expected at least one character that is not blank")


def padded(rows: Sequence[Sequence[int]], fill: int, dtype: np.dtype[Any]) -> Array:
    """Rows of different lengths as one array [rows, longest]."""
    result = np.full((len(rows), max(map(len, rows))), fill, dtype)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result


def _load_tokenizer(path: Path, max_tokens: int) -> tuple[Tokenizer, int]:
    """The tokenizer, cutting at `max_tokens` and never padding, and the id that pads. Raises ArtifactError."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
        named = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
        pad_id = int((tokenizer.padding or {}).get("pad_id", named))
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
