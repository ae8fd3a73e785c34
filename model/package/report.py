"""What packaging found, as lines for people."""

import shlex
from pathlib import Path

from app.artifact.manifest import Manifest, TensorSpec
from model.package.example import MAX_BODY_BYTES, body_bytes, curl
from model.package.source import Source

MOST_LABELS = 12


def report(folder: Path, manifest: Manifest, source: Source, digest: str) -> list[str]:
    """What is in the artifact at `folder` and what it was made of; last how to serve it, and a request."""
    why = source.why
    lines = [("task", manifest.task + _because(why, "task"))]
    lines += [("inputs", _tensors(manifest.inputs)), ("outputs", _tensors(manifest.outputs))]
    if manifest.labels:
        more = len(manifest.labels) - MOST_LABELS
        shown = ", ".join(manifest.labels[:MOST_LABELS]) + (f" and {more} more" if more > 0 else "")
        lines.append(("labels", shown + _because(why, "labels")))
    if manifest.task in ("text-classification", "image-classification"):
        threshold = f" from {manifest.threshold:g}" if manifest.problem_type == "multi_label" else ""
        lines.append(("problem_type", manifest.problem_type + threshold + _problem_type(manifest, why)))
    if manifest.task in ("text-classification", "image-classification", "token-classification", "text-pair"):
        lines.append(("scores", f"{manifest.outputs[0].name} holds {_held(manifest)}"))
    if manifest.task == "text-embedding":
        length = "normalized to length 1" if manifest.normalize else "not normalized"
        lines.append(("embedding", f"{manifest.outputs[0].name}, pooling {manifest.pooling}, {length}"))
    if manifest.max_tokens:
        lines.append(("window", f"{manifest.max_tokens} tokens{_because(why, 'window')}; a row of so many ran"))
    if manifest.image:
        image = manifest.image
        first = f"shorter side to {image.shorter_side}, centre " if image.shorter_side else ""
        lines.append(("image", f"{first}{image.height} x {image.width}, {image.resample}, {image.layout}"))
    alone = f"each {'request' if manifest.task == 'tensors' else 'row'} is a run of its own"
    lines.append(("batching", "requests share runs" if manifest.batching else alone))
    record = manifest.evaluation.get("reference", {})
    for name, found in record.get("outputs", {}).items():
        lines.append((f"{name}", f"of {record['rows']} {record['inputs']} inputs: {_distribution(found)}"))
    if predicted := manifest.reference_distribution:
        ratios = [f"{label} {ratio:.4g}" for label, ratio in predicted.ratios.items()]
        lines.append(("reference", f"of {predicted.predictions} predictions: {_some(ratios)}"))
    lines += [("note", note) for note in source.notes]
    limit = body_bytes(manifest, folder)
    setting = f"APP_MAX_BODY_BYTES={2 * limit} " if limit > MAX_BODY_BYTES // 2 else ""
    lines.append(("artifact", f"{folder}: {manifest.name} {manifest.version}, passed the gate, digest {digest}"))
    lines.append(("serve", f"{setting}APP_MODEL_DIR={shlex.quote(str(folder))} python -m app"))
    lines.append(("try", curl(folder, manifest)))
    return [f"{name:<12} {text}" for name, text in lines]


def _because(why: dict[str, str], field: str) -> str:
    return f" ({why[field]})" if why.get(field) else ""


def _problem_type(manifest: Manifest, why: dict[str, str]) -> str:
    if "problem_type" in why:
        return _because(why, "problem_type")
    if manifest.scores == "probabilities":
        return " (as rows of the output add up)"
    return " (nothing says otherwise; if both labels may hold: --problem-type multi_label)"


def _tensors(specs: list[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.datatype} {spec.shape}" for spec in specs)


def _held(manifest: Manifest) -> str:
    return {
        "probabilities": "probabilities, answered as they are",
        "logits": "logits, answered as they are"
        if manifest.task == "text-pair"
        else "logits, answered through softmax",
        "sigmoid": "logits, answered through the sigmoid",
    }[manifest.scores]


def _distribution(found: dict[str, object]) -> str:
    counts, deciles = found.get("counts"), found.get("deciles")
    if isinstance(counts, dict):
        return _some([f"{value} {count}" for value, count in counts.items()])
    assert isinstance(deciles, list)
    return f"{deciles[0]:g} … median {deciles[5]:g} … {deciles[-1]:g}"


def _some(shown: list[str]) -> str:
    return ", ".join(shown[:MOST_LABELS]) + (" …" if len(shown) > MOST_LABELS else "")
