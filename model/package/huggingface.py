"""What the files beside a model of Hugging Face say: its task, labels, window, pooling. Knows no ONNX and asks no hub.

Read are config.json, tokenizer_config.json, tokenizer.json, and of sentence-transformers modules.json,
1_Pooling/config.json and sentence_bert_config.json. What they do not say is None or empty.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import ArtifactError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# The architecture's last words → the task. Sequence classification is several tasks.
TASKS = {
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "Model": "text-embedding",
}
PROBLEM_TYPES = {"single_label_classification": "single_label", "multi_label_classification": "multi_label"}
# Their table of positions has a row for padding and those before it, which no token takes.
PADDED_POSITIONS = {
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mluke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
WINDOWS = {"tokenizer_config.json": "model_max_length", "sentence_bert_config.json": "max_seq_length"}
# What tokenizers of no window say is one.
NO_WINDOW = 1_000_000
CROSS_ENCODER, OLD_ACTIVATION = "CrossEncoder", "sbert_ce_default_activation_function"


@dataclass(frozen=True, slots=True)
class HuggingFace:
    """The files in `folder`, parsed; {} for one that is not there."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> Path:
        return self.folder / CONFIG

    @property
    def architecture(self) -> str:
        return str((_list(self.config, "architectures") or [""])[0])

    @property
    def labels(self) -> list[str]:
        """`id2label` in the order of its numbers. Empty if they do not count from 0."""
        table = self.config.get("id2label")
        if not isinstance(table, dict) or sorted(table) != sorted(map(str, range(len(table)))):
            return []
        return [str(table[str(index)]) for index in range(len(table))]

    @property
    def problem_type(self) -> str | None:
        return PROBLEM_TYPES.get(str(self.config.get("problem_type")))

    @property
    def library(self) -> dict[str, Any]:
        """What sentence-transformers says of itself: since 5.4 in a file of its own, before in config.json."""
        beside = _dict(self.folder / "config_sentence_transformers.json")
        inside = self.config.get("sentence_transformers")
        if isinstance(inside, dict):
            beside = {"model_type": CROSS_ENCODER, **beside, **inside}
        if OLD_ACTIVATION in self.config:
            beside = {"model_type": CROSS_ENCODER, "activation_fn": self.config[OLD_ACTIVATION], **beside}
        return beside

    @property
    def activation(self) -> str | None:
        """What a cross-encoder's scores go through: `sigmoid`, or `logits` for nothing."""
        name = self.library.get("activation_fn")
        return {"Identity": "logits", "Sigmoid": "sigmoid"}.get(str(name).rpartition(".")[2])

    @property
    def is_cross_encoder(self) -> bool:
        return bool(self.library.get("model_type") == CROSS_ENCODER)

    @property
    def modules(self) -> dict[str, Path]:
        """Modules of a sentence-transformers model by kind, such as Transformer or Pooling, and their folders."""
        found = _read(self.folder / "modules.json")
        parts = [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []
        return {str(part.get("type")).rpartition(".")[2]: self.folder / str(part.get("path")) for part in parts}

    @property
    def prompt(self) -> str:
        """What sentence-transformers puts before a text unasked."""
        prompts = self.library.get("prompts")
        found = prompts.get(self.library.get("default_prompt_name")) if isinstance(prompts, dict) else None
        return found if isinstance(found, str) else ""

    def task(self) -> str | None:
        """The task that the architecture is for. Raises ArtifactError where it may be several, or none that is served;
        None if no architecture is named."""
        if "Pooling" in self.modules:
            return "text-embedding"
        name = self.architecture
        task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
        if not name or task not in (None, "text-classification"):
            return task
        if task is None:
            raise ArtifactError(
                f"{self.where}: architectures: no task for {name}: name one with --task, or serve its bare inputs and "
                "outputs with --task tensors"
            )
        return self._sequence_task()

    def _sequence_task(self) -> str:
        if self.config.get("problem_type") == "regression":
            return "text-regression"
        one = len(self.labels) == 1 or self.config.get("num_labels") == 1
        if one and self.is_cross_encoder:
            return "text-pair"
        if one and self.problem_type is None:
            raise ArtifactError(
                f"{self.where}: one label and no problem_type: say with --task whether it scores a pair of texts "
                "(text-pair: rerankers, cross-encoders) or a text (text-regression), or with --task "
                "text-classification --problem-type multi_label that one label is there or not"
            )
        if self.is_cross_encoder or "entailment" in map(str.lower, self.labels):
            raise ArtifactError(
                f"{self.where}: labels {', '.join(self.labels)}: it seems to classify pairs of texts, for which there "
                "is no task: --task text-classification if it takes one text, --task tensors for the bare inputs"
            )
        return "text-classification"

    def windows(self) -> dict[str, int]:
        """Tokens that a row may have, by where that is said."""
        found: dict[str, Any] = {}
        for name in ("max_position_embeddings", "n_positions"):
            positions = self.config.get(name)
            if isinstance(positions, int):
                found[f"{CONFIG}: {name}"] = positions
                if self.config.get("model_type") in PADDED_POSITIONS:
                    padding = self.config.get("pad_token_id")
                    found[f"{CONFIG}: {name}"] = positions - (padding if isinstance(padding, int) else 1) - 1
        for name, key in WINDOWS.items():
            found[f"{name}: {key}"] = _dict(self.folder / name).get(key)
        return {
            where: int(size) for where, size in found.items() if isinstance(size, int | float) and 0 < size < NO_WINDOW
        }

    def pooling(self) -> str | None:
        """`mean` or `cls`, as sentence-transformers pools. Raises ArtifactError for another way."""
        path = self.modules.get("Pooling", self.folder / "1_Pooling") / CONFIG
        config = _dict(path)
        if not config:
            return None
        old = "pooling_mode_"
        modes = [name.removeprefix(old) for name, on in config.items() if name.startswith(old) and on is True]
        kind = str(config.get("pooling_mode") or "+".join(modes))
        pooling = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}.get(kind)
        if pooling is None:
            raise ArtifactError(
                f"{path}: pooling {kind!r}: mean and cls are served; for another, export "
                "the model with its pooling, so that its first output is [rows, dimensions] (optimum-cli export onnx "
                "--library sentence_transformers)"
            )
        return pooling


def tokenizer_window(tokenizer: Path) -> dict[str, int]:
    """As `HuggingFace.windows`, of a tokenizer.json that cuts."""
    truncation = _dict(tokenizer).get("truncation")
    size = truncation.get("max_length") if isinstance(truncation, dict) else None
    return {f"{tokenizer.name}: truncation": size} if isinstance(size, int) else {}


def read_huggingface(config: Path | None, *near: Path) -> HuggingFace | None:
    """The files beside `config`, or beside the first config.json in one of the folders `near`.

    Raises ArtifactError for a `config` that is no JSON object; another such is none of Hugging Face's.
    """
    for path in [config] if config else [folder / CONFIG for folder in near]:
        found = _read(path)
        if isinstance(found, dict):
            return HuggingFace(path.parent, found)
    if config:
        raise ArtifactError(f"{config}: expected Hugging Face's config.json, found no JSON object")
    return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _dict(path: Path) -> dict[str, Any]:
    found = _read(path)
    return found if isinstance(found, dict) else {}


def _list(table: dict[str, Any], name: str) -> list[Any]:
    found = table.get(name)
    return found if isinstance(found, list) else []
