"""A model of token ids and its tokenizer → an artifact of a task with text: finds out what its scores are, and which
texts are golden."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.artifact.datatypes import Array, Tensors
from app.artifact.manifest import (
    MANIFEST_VERSION,
    MIN_TOKENS,
    Artifact,
    Golden,
    GoldenText,
    Manifest,
    ReferenceDistribution,
    TensorSpec,
)
from app.errors import ArtifactError
from app.runtime.session import Session
from app.runtime.tasks import open_task
from model.package.artifact import MODEL_FILE, copy_model, file_entries, finish, first_line, open_model, precision_of
from model.package.graph import ends_in, read_nodes
from model.package.reference import Origin, reference
from model.package.scores import decide
from model.package.texts import MOST_GENERATED, Text, chosen, generated_texts, probes

TOKENIZER_FILE = "tokenizer.json"
# Of each task, the outputs that golden examples keep, and the one that says which labels were found.
GOLDEN_OUTPUTS = {
    "text-classification": ("probabilities",),
    "text-embedding": ("embedding",),
    "text-pair": ("score",),
    "text-regression": ("value",),
    "token-classification": ("entity_group", "start", "end", "score"),
}
LABEL_OUTPUTS = {"text-classification": "label", "token-classification": "entity_group"}
# So many texts are tried before any is answered.
TRIED = 8
# What says little by its distribution: places, and what is long.
NOT_IN_REFERENCE = {"row", "word", "start", "end", "probabilities"}


def package_text(
    model: Path,
    tokenizer: Path,
    folder: Path,
    *,
    name: str,
    version: str,
    max_tokens: int,
    tolerance: float,
    texts: Sequence[Text],
    task: str = "text-classification",
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    scores: str | None = None,
    threshold: float = 0.5,
    pooling: str = "none",
    normalize: bool = True,
    output: str | None = None,
    origin: Origin = "built-in",
    precision: str | None = None,
    lineage: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    golden: list[GoldenText] | None = None,
    reference_distribution: ReferenceDistribution | None = None,
) -> Manifest:
    """Writes an artifact for a task with text into the empty `folder`.

    problem_type, scores: None where the model's outputs are to say it. output: the one that the task reads, if not the
    first. golden: what another file of the same weights answered, for this one to agree with; else `texts` are run.
    """
    if max_tokens < MIN_TOKENS:
        raise ArtifactError(f"--max-tokens {max_tokens}: expected at least {MIN_TOKENS}")
    session, inputs, outputs = open_model(model)
    _check_varying(model, inputs)
    nodes = read_nodes(model)
    copy_model(model, folder)
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    classifies = task in ("text-classification", "token-classification")
    multi = task == "text-classification" and problem_type != "single_label"
    manifest = Manifest(
        manifest_version=MANIFEST_VERSION,
        name=name,
        version=version,
        task=task,
        precision=precision or precision_of(nodes, outputs),
        model_file=MODEL_FILE,
        files=file_entries(folder),
        inputs=inputs,
        outputs=_first(model, outputs, output),
        # Until they are answered, some texts to try.
        golden=Golden(tolerance, [_golden_text(text) for text in texts[:TRIED]]),
        tokenizer_file=TOKENIZER_FILE,
        labels=list(labels),
        max_tokens=max_tokens,
        # Until it is decided, what any number of labels and any outputs fit.
        problem_type="multi_label" if multi else "single_label",
        scores="sigmoid" if multi else "logits",
        threshold=threshold,
        pooling=pooling,  # type: ignore[arg-type]
        normalize=normalize,
        lineage=lineage or {},
        reference_distribution=reference_distribution,
    )
    runner = Runner(model, session, folder, manifest)
    ending = ends_in(nodes, manifest.outputs[0].name)
    if classifies:
        if task == "token-classification":
            problem_type = "single_label"
        problem_type, scores = decide(
            model, runner.scores(texts), ending, labels=len(labels), problem_type=problem_type, scores=scores
        )
    elif task == "text-pair":
        scores = scores or ("probabilities" if ending == "Sigmoid" else "sigmoid")
    manifest = msgspec.structs.replace(
        manifest, problem_type=problem_type or "single_label", scores=scores or "probabilities"
    )
    runner = Runner(model, session, folder, manifest)
    runner.check()
    answers = [runner.answer(text) for text in texts]
    manifest = msgspec.structs.replace(
        manifest,
        golden=Golden(tolerance, golden or runner.golden(texts, answers)),
        evaluation={**(evaluation or {}), "reference": reference(_together(answers), origin, len(texts))},
    )
    return finish(folder, manifest)


class Runner:
    """Takes texts through the model as the server will: the task of `manifest`, whose files are in `folder`."""

    def __init__(self, model: Path, session: Session, folder: Path, manifest: Manifest) -> None:
        """Raises ArtifactError if the manifest does not fit its task."""
        self._model, self._session, self._manifest = model, session, manifest
        self._tokenizer = folder / TOKENIZER_FILE
        self._task = open_task(Artifact(folder, manifest, ""), 1)

    def check(self) -> None:
        """Raises ArtifactError unless the model takes a row of the window, and its scores are as they should."""
        try:
            self._task.check(self._session.run)
        except ArtifactError as error:
            if "`max_tokens`" in str(error):
                raise ArtifactError(f"{error}: if its files are right otherwise, give that as --max-tokens") from None
            raise

    def run(self, text: Text) -> tuple[list[Any], Tensors]:
        """The text's units, and the model's own outputs for it."""
        units = self._task.encode([text])
        try:
            return units, self._session.run(self._task.assemble([units[0].payload]))
        except Exception as error:
            raise ArtifactError(
                f"{self._model}: does not run on tokenised text: are the tokenizer and the ONNX file of one model? "
                f"{first_line(error)}"
            ) from None

    def scores(self, texts: Sequence[Text]) -> Array:
        """The first output's rows for the texts, one of each text or of each token: [rows, labels]."""
        found = [self.run(text)[1][self._manifest.outputs[0].name] for text in texts]
        rows: Array = np.concatenate([array.reshape(-1, array.shape[-1]) for array in found]).astype(np.float64)
        return rows

    def answer(self, text: Text) -> Tensors:
        """What the task answers to one text. Raises ArtifactError if the model's outputs do not fit it."""
        units, outputs = self.run(text)
        try:
            return self._task.respond(units, self._task.split([units[0].payload], outputs))
        except ValueError as error:
            raise ArtifactError(f"{self._model}: {first_line(error)}") from None

    def golden(self, texts: Sequence[Text], answers: Sequence[Tensors]) -> list[GoldenText]:
        """The texts and answers that become golden: a choice of them, and those that show what they do not."""
        task, window = self._manifest.task, self._manifest.max_tokens or 0
        more = probes(texts, window=window, pairs=task == "text-pair")
        pool = [*zip(texts, answers, strict=True), *((text, self.answer(text)) for text in more)]
        pool += self._of_other_labels([self._labels(answer) for _, answer in pool])
        places = chosen([self._labels(answer) for _, answer in pool], keep=range(len(texts), len(pool)))
        return [self._example(*pool[place]) for place in places]

    def _of_other_labels(self, found: Sequence[set[str]]) -> Iterator[tuple[Text, Tensors]]:
        """Generated texts that have labels which none of those before them has."""
        seen, missing = set[str]().union(*found), set(self._manifest.labels)
        if self._manifest.task != "text-classification":
            return
        for text in generated_texts(self._tokenizer, MOST_GENERATED):
            if missing <= seen:
                return
            answer = self.answer(text)
            if not self._labels(answer) <= seen:
                seen |= self._labels(answer)
                yield text, answer

    def _labels(self, answer: Tensors) -> set[str]:
        name = LABEL_OUTPUTS.get(self._manifest.task)
        return set(answer[name].tolist()) if name else set()

    def _example(self, text: Text, answer: Tensors) -> GoldenText:
        values = {name: _plain(answer[name]) for name in GOLDEN_OUTPUTS[self._manifest.task]}
        probabilities = values.pop("probabilities", [])
        return msgspec.structs.replace(_golden_text(text), probabilities=probabilities, outputs=values)


def _check_varying(model: Path, inputs: list[TensorSpec]) -> None:
    for spec in inputs:
        if spec.name == "input_ids" and spec.shape != [-1, -1]:
            raise ArtifactError(
                f"{model}: input_ids: expected [rows, tokens], both to vary, found {spec.shape}: export it with "
                "dynamic axes (optimum-cli export onnx does; torch.onnx.export: dynamic_axes={'input_ids': {0: 'rows', "
                "1: 'tokens'}, …}), or serve its bare inputs with --task tensors"
            )


def _first(model: Path, outputs: list[TensorSpec], name: str | None) -> list[TensorSpec]:
    """The outputs, the one that the task reads first: `name`, else logits, else the first there is."""
    if name is not None and name not in [spec.name for spec in outputs]:
        raise ArtifactError(f"{model}: --output {name}: expected one of {[spec.name for spec in outputs]}")
    return sorted(outputs, key=lambda spec: spec.name != (name or "logits"))


def _golden_text(text: Text) -> GoldenText:
    first, second = (text, None) if isinstance(text, str) else text
    return GoldenText(first, text_pair=second)


def _plain(array: Array) -> list[Any]:
    values = array.ravel().tolist()
    return [round(value, 6) for value in values] if array.dtype.kind == "f" else values


def _together(answers: Sequence[Tensors]) -> Tensors:
    names = [name for name in answers[0] if name not in NOT_IN_REFERENCE]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in names}
