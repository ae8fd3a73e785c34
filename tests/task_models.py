"""A small real artifact of each task: a model of tests.onnx_models, a tokenizer of a few words, golden outputs."""

from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from app.artifact.manifest import Artifact, Golden, GoldenText, ImageSpec, Manifest
from app.runtime.session import Session
from app.runtime.tasks import open_task
from model.package import file_entry, write_manifest
from tests import onnx_models

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *"anna zoe lives in new york berlin with bob and the bank of peru 😀 .".split(),
)
MAX_TOKENS = 24
GOLDEN_TEXTS = ("Zoë lives in New York.", "Anna and Bob", "the bank of Peru with Anna in Berlin and Zoe in New York .")
# Different lengths, other scripts, and one that is longer than the window.
TEXTS = (
    "Anna",
    "Zoë and Bob lives in Berlin",
    "😀 the bank of Perú 😀 . with Zoë",
    "new york new york",
    "日本 with Bob",
    "and the bank of New York " * 9,
    "Peru .",
)
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def tokenizer(path: Path) -> Path:
    """Words without case and accents between [CLS] and [SEP]; pairs with types."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    made.save(str(path))
    return path


def text_artifact(
    folder: Path, task: str, *, model: dict[str, Any], golden: dict[str, list] | None = None, **fields: Any
) -> Path:
    """An artifact for texts. model: what `onnx_models.text_model` takes. golden: outputs of every example, instead of
    what the model answers."""
    folder.mkdir(parents=True, exist_ok=True)
    source = onnx_models.text_model(folder / "model.onnx", **model)
    tokenizer(folder / "tokenizer.json")
    session = Session.open(source, "cpu")
    inputs, outputs = session.specs()
    manifest = Manifest(
        manifest_version=1,
        name=task,
        version="1",
        task=task,
        precision="fp32",
        model_file="model.onnx",
        files={name: file_entry(folder / name) for name in ("model.onnx", "tokenizer.json")},
        inputs=inputs,
        outputs=outputs,
        golden=Golden(1e-4),
        tokenizer_file="tokenizer.json",
        **({"max_tokens": MAX_TOKENS} | fields),
    )
    opened = open_task(Artifact(folder, manifest, ""), 8)
    examples = []
    for text in GOLDEN_TEXTS:
        pair = "Anna lives in Peru" if task == "text-pair" else None
        found = golden
        if found is None:
            units = opened.encode([(text, pair) if pair else text])
            results = opened.split([units[0].payload], session.run(opened.assemble([units[0].payload])))
            found = {name: array.ravel().tolist() for name, array in opened.respond(units, results).items()}
        examples.append(GoldenText(text, text_pair=pair, outputs=found))
    write_manifest(folder, msgspec.structs.replace(manifest, golden=Golden(1e-4, examples)))
    return folder


def classification(folder: Path, **fields: Any) -> Path:
    """Three labels, logits."""
    fields = {"labels": ["dry", "wet", "cold"], "scores": "logits"} | fields
    return text_artifact(folder, "text-classification", model={"size": 3}, **fields)


def multi_label(folder: Path, **fields: Any) -> Path:
    return classification(folder, **{"problem_type": "multi_label", "scores": "sigmoid"} | fields)


def embedding(folder: Path, pooling: str = "mean", **fields: Any) -> Path:
    """Six dimensions, of each token unless there is no pooling."""
    return text_artifact(
        folder, "text-embedding", model={"size": 6, "per_token": pooling != "none"}, pooling=pooling, **fields
    )


def pair(folder: Path, *, rank: int = 2, **fields: Any) -> Path:
    fields = {"scores": "sigmoid"} | fields
    return text_artifact(folder, "text-pair", model={"size": 1, "types": True, "rank": rank}, **fields)


def regression(folder: Path, labels: tuple[str, ...] = (), **fields: Any) -> Path:
    """One value, or one for each label."""
    return text_artifact(folder, "text-regression", model={"size": max(1, len(labels))}, labels=list(labels), **fields)


def tags(folder: Path, **fields: Any) -> Path:
    """Persons and places, logits of each token."""
    fields = {"labels": TAGS, "scores": "logits"} | fields
    return text_artifact(
        folder, "token-classification", model={"size": len(TAGS), "per_token": True, "scale": 3}, **fields
    )


def picture(
    width: int = 20, height: int = 13, kind: str = "PNG", mode: str = "RGB", seed: int = 0, **save: Any
) -> bytes:
    """A file of random pixels."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    file = BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def images(folder: Path, spec: ImageSpec | None = None, **fields: Any) -> Path:
    """Three labels of 8 x 8 pixels, logits."""
    spec = spec or ImageSpec(8, 8, shorter_side=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    folder.mkdir(parents=True, exist_ok=True)
    source = onnx_models.images(folder / "model.onnx", layout=spec.layout)
    session = Session.open(source, "cpu")
    inputs, outputs = session.specs()
    np.savez(folder / "golden.npz", **{"output.probabilities": np.zeros((0, 3), np.float32)})
    manifest = Manifest(
        manifest_version=1,
        name="image-classification",
        version="1",
        task="image-classification",
        precision="fp32",
        model_file="model.onnx",
        files={name: file_entry(folder / name) for name in ("model.onnx", "golden.npz")},
        inputs=inputs,
        outputs=outputs,
        golden=Golden(1e-4, file="golden.npz"),
        image=spec,
        **({"labels": ["cat", "dog", "fish"], "scores": "logits"} | fields),
    )
    task = open_task(Artifact(folder, manifest, ""), 8)
    files = [picture(seed=seed) for seed in range(2)]
    payloads = [unit.payload for unit in task.encode(files)]
    results = task.split(payloads, session.run(task.assemble(payloads)))
    arrays = {f"input.image.{index}": np.frombuffer(file, np.uint8) for index, file in enumerate(files)}
    np.savez(folder / "golden.npz", **arrays, **{"output.probabilities": np.stack(results)})
    entries = manifest.files | {"golden.npz": file_entry(folder / "golden.npz")}
    write_manifest(folder, msgspec.structs.replace(manifest, files=entries))
    return folder


BUILD = {
    "text-classification": classification,
    "multi-label": multi_label,
    "text-embedding": embedding,
    "text-pair": pair,
    "text-regression": regression,
    "token-classification": tags,
    "image-classification": images,
}
