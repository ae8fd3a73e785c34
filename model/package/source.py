"""A model's files and its task: from the options, or from what lies beside the model."""

from dataclasses import dataclass, field
from pathlib import Path

from app.errors import ArtifactError
from app.runtime.tasks import TASKS
from model.package.export import export_onnx, find_onnx
from model.package.huggingface import CONFIG, TOKENIZER, HuggingFace, read_huggingface, tokenizer_window
from model.package.preprocessor import PREPROCESSOR

IMAGE, PAIR, EMBEDDING, TENSORS = "image-classification", "text-pair", "text-embedding", "tensors"
TEXT = set(TASKS) - {IMAGE, TENSORS}


@dataclass(slots=True)
class Source:
    """files: Hugging Face's beside it, if there are any. why: where something was found, by what; for people."""

    model: Path
    task: str
    tokenizer: Path | None = None
    files: HuggingFace | None = None
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def labels(self, given: str | None) -> list[str]:
        """Those given, else those of config.json. Raises ArtifactError if there are none, but for numbers."""
        if given is not None:
            return [label.strip() for label in given.split(",")]
        found = self.files.labels if self.files else []
        if self.task == "text-regression":
            return found if len(found) > 1 else []
        if not found:
            where = self.files.where if self.files else (self.tokenizer or self.model).with_name(CONFIG)
            raise ArtifactError(f"{where}: no id2label found; name the labels with --labels negative,positive")
        self.why["labels"] = f"{CONFIG}: id2label"
        return found

    def problem_type(self, given: str | None) -> str | None:
        found = self.files.problem_type if self.files else None
        if given or found:
            self.why["problem_type"] = "--problem-type" if given else f"{CONFIG}: problem_type"
        return given or found

    def window(self, given: int | None) -> int:
        """The window given, else the smallest that is known. Raises ArtifactError if none is."""
        if given is not None:
            return given
        known = self.files.windows() if self.files else {}
        # sentence-transformers sets its own window, whatever the tokenizer was last used with.
        if self.tokenizer and not any(where.startswith("sentence_bert") for where in known):
            known |= tokenizer_window(self.tokenizer)
        if not known:
            raise ArtifactError(
                f"{self.model}: how many tokens a text may have is not known: beside it is no {CONFIG} with "
                "max_position_embeddings and no tokenizer_config.json with model_max_length; say it with --max-tokens, "
                "such as 512"
            )
        smallest = min(known, key=lambda where: known[where])
        others = [f"{where} {size}" for where, size in known.items() if where != smallest]
        self.why["window"] = "; ".join([smallest, *others])
        return known[smallest]

    def preprocessor(self, given: Path | None) -> Path:
        return given or (self.files.folder if self.files else self.model.parent) / PREPROCESSOR


def find_source(
    model: Path | None,
    exported: Path,
    *,
    task: str | None,
    folder: Path | None,
    config: Path | None,
    tokenizer: Path | None,
) -> Source:
    """folder: Hugging Face's, whose model it is if none is named; if it has no ONNX file one is made in the folder
    `exported`.

    Raises ArtifactError if a file is missing, or the task is neither given nor known.
    """
    if model is None and folder is None:
        raise ArtifactError("expected an ONNX file, or a model's folder with --from-huggingface")
    found = find_onnx(folder) if folder and model is None else model
    if found and found.is_dir():
        raise ArtifactError(f"{found}: expected an ONNX file, found a folder: give it as --from-huggingface {found}")
    near = [folder] if folder else []
    if found and not folder:
        # Repositories keep ONNX files in a folder of their own, and their configuration above it.
        near = [found.parent, *([found.parent.parent] if found.parent.name == "onnx" else [])]
        near += [tokenizer.parent] if tokenizer else []
    files = read_huggingface(config, *near)
    why, notes = {}, []
    if task is None:
        task = files.task() if files else None
        if task and files:
            why["task"] = f"{CONFIG}: {files.architecture or 'modules.json'}"
        task = task or ("text-classification" if tokenizer else TENSORS)
    if found is None:
        assert folder is not None
        found = export_onnx(folder, task, exported, modules=set(files.modules) if files else set())
        notes.append(f"exported from the weights in {folder} by Optimum")
    source = Source(found, task, None, files, why, notes)
    if task in TEXT:
        source.tokenizer = _find_tokenizer(source, tokenizer, near)
        if files and files.prompt:
            notes.append(f"sentence-transformers puts {files.prompt!r} before each text; here the client does")
    return source


def _find_tokenizer(source: Source, given: Path | None, near: list[Path]) -> Path:
    if given:
        return given
    places = [*([source.files.folder] if source.files else []), *near, source.model.parent]
    for place in places:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    because = f" ({source.why['task']})" if source.why.get("task") else ""
    raise ArtifactError(
        f"{places[0] / TOKENIZER}: expected the tokenizer, since the task is {source.task}{because}; name one with "
        "--tokenizer, make one of older files (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or serve the "
        "bare inputs and outputs with --task tensors"
    )
