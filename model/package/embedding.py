"""Which output of a model is an embedding, and what is left to do to it: pooling, normalizing."""

from dataclasses import dataclass
from pathlib import Path

from app.errors import ArtifactError
from model.package.artifact import open_model
from model.package.huggingface import HuggingFace

# What exporters call a whole text's vector, and its tokens'.
WHOLE = "sentence_embedding"
TOKENS, ROWS = 3, 2


@dataclass(frozen=True, slots=True)
class Embedding:
    output: str
    pooling: str
    normalize: bool


def find_embedding(
    model: Path,
    files: HuggingFace | None,
    *,
    output: str | None,
    pooling: str | None,
    normalize: bool | None,
) -> Embedding:
    """output, pooling, normalize: as given, None if not. Raises ArtifactError if nothing says how to pool."""
    modules = files.modules if files else {}
    _, _, outputs = open_model(model)
    if normalize is None:
        normalize = "Normalize" in modules
    ranks = {spec.name: len(spec.shape) for spec in outputs}
    if output is None and WHOLE in ranks and pooling in (None, "none"):
        return Embedding(WHOLE, "none", normalize)
    pooling = pooling or (files.pooling() if files else None)
    if pooling is None:
        pooling = _needs_none(model, ranks, output)
    name = output or next(
        (name for name, rank in ranks.items() if rank == (ROWS if pooling == "none" else TOKENS)), None
    )
    if name is None:
        axes = "[rows, dimensions]" if pooling == "none" else "[rows, tokens, dimensions]"
        found = {spec.name: spec.shape for spec in outputs}
        raise ArtifactError(f"{model}: outputs: expected one of {axes} for --pooling {pooling}, found {found}")
    if pooling != "none" and (extra := set(modules) - {"Transformer", "Pooling", "Normalize"}):
        raise ArtifactError(
            f"{model}: {', '.join(sorted(extra))} of modules.json comes after pooling, and {name!r} is before it: "
            "export the whole model (optimum-cli export onnx --library sentence_transformers), which has an output "
            + WHOLE
        )
    return Embedding(name, pooling, normalize)


def _needs_none(model: Path, ranks: dict[str, int], output: str | None) -> str:
    """That vectors are whole ones already, where nothing says how to pool."""
    considered = [ranks.get(output)] if output else list(ranks.values())
    if TOKENS in considered:
        raise ArtifactError(
            f"{model}: it answers a vector for each token, and nothing beside it (modules.json, 1_Pooling/config.json) "
            "says how they become one: say --pooling mean or --pooling cls, as its model card does"
        )
    return "none"
