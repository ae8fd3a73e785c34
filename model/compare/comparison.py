"""Champion and candidate over the same rows: what each gets right, where they differ, and the verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from msgspec import Struct

from app.errors import ArtifactError, ConfigError
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.runtime.tasks.answers import Label
from model.compare.measure import classifier, predict, seconds, size_bytes
from model.compare.rows import Row
from model.compare.statistics import Interval, mcnemar, paired_difference, proportion
from model.compare.verdict import Check, Thresholds, checks


class Side(Struct, frozen=True):
    """One of the two. predicted: how often each label was answered; seconds: for the texts that were timed."""

    name: str
    version: str
    digest: str
    accuracy: Interval
    predicted: dict[str, int]
    mean_score: float
    seconds: float
    bytes: int


class Slice(Struct, frozen=True):
    rows: int
    champion: float
    candidate: float
    difference: Interval


class Disagreements(Struct, frozen=True):
    """Rows on which the two answer differently, by which of them is right; `rows` has their numbers."""

    count: int
    only_champion_right: int
    only_candidate_right: int
    both_wrong: int
    rows: list[int]


class Comparison(Struct, frozen=True):
    """comparison.json. difference: candidate's accuracy less champion's; ratios are candidate over champion."""

    promote: bool
    failed: list[str]
    checks: list[Check]
    thresholds: dict[str, float]
    data: dict[str, str | int]
    labels: dict[str, int]
    champion: Side
    candidate: Side
    difference: Interval
    mcnemar_p: float
    slices: dict[str, Slice]
    disagreements: Disagreements
    time_ratio: float
    size_ratio: float


def compare(
    folders: tuple[Path, Path], rows: Sequence[Row], data: dict[str, str | int], thresholds: Thresholds
) -> Comparison:
    """folders: champion's and candidate's artifact, which both pass the gate first. data: what is recorded of the rows.

    Raises ArtifactError for an artifact that does not pass, is of another task or has other labels, and ConfigError for
    a row whose label the models do not have.
    """
    models = [load_model(folder) for folder in folders]
    labels = _labels(models)
    for row in rows:
        if row.label not in labels:
            raise ConfigError(f"row {row.number}: `label`: expected one of {sorted(labels)}, found another")
    texts = [row.text for row in rows]
    answers = [predict(model, texts) for model in models]
    right = [[answer.label == row.label for answer, row in zip(each, rows, strict=True)] for each in answers]
    taken = seconds(models, texts)
    champion, candidate = (
        _side(*each, thresholds.confidence) for each in zip(models, answers, right, taken, strict=True)
    )
    gained, lost = _split(*right)
    difference = paired_difference(gained, lost, len(rows), thresholds.confidence)
    slices = _slices(rows, right, thresholds.confidence)
    time_ratio, size_ratio = round(taken[1] / taken[0], 3), round(candidate.bytes / champion.bytes, 3)
    judged = {name: (each.rows, each.difference.estimate) for name, each in slices.items()}
    found = checks(thresholds, difference.low, judged, time_ratio, size_ratio)
    failed = [check.name for check in found if not check.passed]
    return Comparison(
        promote=not failed,
        failed=failed,
        checks=found,
        thresholds=asdict(thresholds),
        data={**data, "rows": len(rows)},
        labels=dict(sorted(Counter(row.label for row in rows).items())),
        champion=champion,
        candidate=candidate,
        difference=difference,
        mcnemar_p=round(mcnemar(gained, lost), 6),
        slices=slices,
        disagreements=_disagreements(rows, answers, right),
        time_ratio=time_ratio,
        size_ratio=size_ratio,
    )


def _labels(models: Sequence[Model]) -> set[str]:
    for model in models:
        classifier(model)
    first, second = (model.artifact for model in models)
    if set(first.manifest.labels) != set(second.manifest.labels):
        raise ArtifactError(
            f"{second.folder}: `labels`: expected {sorted(first.manifest.labels)} as in {first.folder}, found "
            f"{sorted(second.manifest.labels)}"
        )
    return set(first.manifest.labels)


def _side(model: Model, answers: Sequence[Label], right: Sequence[bool], taken: float, confidence: float) -> Side:
    manifest = model.artifact.manifest
    counts = Counter(answer.label for answer in answers)
    return Side(
        name=manifest.name,
        version=manifest.version,
        digest=model.artifact.digest,
        accuracy=proportion(sum(right), len(right), confidence),
        predicted={label: counts[label] for label in sorted(manifest.labels)},
        mean_score=round(sum(answer.score for answer in answers) / len(answers), 4),
        seconds=round(taken, 6),
        bytes=size_bytes(model),
    )


def _split(champion: Sequence[bool], candidate: Sequence[bool]) -> tuple[int, int]:
    """How many rows only the candidate gets right, and how many only the champion."""
    pairs = Counter(zip(champion, candidate, strict=True))
    return pairs[False, True], pairs[True, False]


def _slices(rows: Sequence[Row], right: Sequence[Sequence[bool]], confidence: float) -> dict[str, Slice]:
    found = {}
    for name in sorted({row.slice for row in rows}):
        places = [place for place, row in enumerate(rows) if row.slice == name]
        first, second = ([each[place] for place in places] for each in right)
        count = len(places)
        difference = paired_difference(*_split(first, second), count, confidence)
        found[name] = Slice(count, round(sum(first) / count, 6), round(sum(second) / count, 6), difference)
    return found


def _disagreements(
    rows: Sequence[Row], answers: Sequence[Sequence[Label]], right: Sequence[Sequence[bool]]
) -> Disagreements:
    places = [place for place in range(len(rows)) if answers[0][place].label != answers[1][place].label]
    gained, lost = _split(*([each[place] for place in places] for each in right))
    return Disagreements(
        count=len(places),
        only_champion_right=lost,
        only_candidate_right=gained,
        both_wrong=len(places) - gained - lost,
        rows=[rows[place].number for place in places],
    )
