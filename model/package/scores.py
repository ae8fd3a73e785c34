"""What a classifier's first output holds, and so which labels may hold together: from its config, checked against what
it answers and the operator that it ends in. If neither decides it, that is an error and no guess."""

from pathlib import Path

import numpy as np

from app.artifact.datatypes import Array
from app.errors import ArtifactError

# How far probabilities may be off: int8 and float16 files round.
OUTSIDE, SUM = 0.01, 0.02
# Operators whose results may be any number: a graph that ends in one gives logits, wherever they happen to lie.
LINEAR = {"Add", "FusedGemm", "Gemm", "MatMul", "QGemm", "QLinearMatMul"}


def decide(
    where: Path, found: Array, operator: str, *, labels: int, problem_type: str | None, scores: str | None
) -> tuple[str, str]:
    """`problem_type` and `scores` for the manifest.

    found: rows of the first output, [rows, labels]. operator: the one it ends in. problem_type, scores: as given or
    configured, None if not. Raises ArtifactError if nothing decides, or the outputs say otherwise.
    """
    problem_type = problem_type or {"logits": "single_label", "sigmoid": "multi_label"}.get(str(scores))
    if found.shape[1] != labels:
        raise ArtifactError(f"{where}: labels: expected {found.shape[1]}, as its first output has, found {labels}")
    if not np.isfinite(found).all():
        raise ArtifactError(
            f"{where}: its first output: expected finite numbers, found NaN or infinity on golden inputs"
        )
    low, high = float(found.min()), float(found.max())
    within = low >= -OUTSIDE and high <= 1 + OUTSIDE
    one_each = within and labels > 1 and bool((np.abs(found.sum(axis=1) - 1) <= SUM).all())
    lie = f"lies in {low:.4g} … {high:.4g}" + (f" and ends in {operator}" if operator else "")
    if scores == "sigmoid" and within and operator == "Sigmoid":
        raise ArtifactError(f"{where}: its first output {lie} already: expected --scores probabilities, found sigmoid")
    if scores == "probabilities" and not within:
        fitting = {"single_label": "logits", "multi_label": "sigmoid"}.get(str(problem_type), "logits or sigmoid")
        raise ArtifactError(f"{where}: its first output {lie}: expected --scores {fitting}, found probabilities")
    if scores is None:
        if one_each:
            scores = "probabilities"
        elif not within or operator in LINEAR:
            scores = "logits"
        elif operator == "Sigmoid":
            scores = "probabilities"
        else:
            raise ArtifactError(
                f"{where}: its first output {lie}: say what it is with --scores probabilities, --scores logits "
                "(softmax makes probabilities of them) or --scores sigmoid (that does, for each label by itself)"
            )
    if problem_type is None:
        problem_type = _problem_type(where, labels, scores, lie, one_each=one_each)
    if scores == "probabilities" and within and one_each != (problem_type == "single_label") and labels > 1:
        raise ArtifactError(
            f"{where}: its first output {lie}, and rows {'' if one_each else 'do not '}sum to 1: expected "
            f"--problem-type {'single_label' if one_each else 'multi_label'}, found {problem_type}"
        )
    if scores == "logits" and problem_type == "multi_label":
        scores = "sigmoid"
    return problem_type, scores


def _problem_type(where: Path, labels: int, scores: str, lie: str, *, one_each: bool) -> str:
    if scores == "probabilities":
        return "single_label" if one_each else "multi_label"
    # Of two labels that exclude each other softmax is the usual choice, and what Hugging Face's pipeline does.
    if labels == 2:
        return "single_label"
    raise ArtifactError(
        f"{where}: no problem_type is known, and its first output {lie}, which both have: say with --problem-type "
        "single_label that one of the labels holds (--scores logits: softmax), or with --problem-type multi_label that "
        "any of them may (--scores sigmoid)"
    )
