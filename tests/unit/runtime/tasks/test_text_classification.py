"""Scores in, probabilities and labels out, one of them or several; and the manifests that cannot do that."""

import numpy as np
import pytest

from app.artifact.datatypes import DTYPES
from app.artifact.manifest import TensorSpec
from app.errors import ArtifactError
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Label, Labels, LabelScore
from tests.unit.runtime.tasks.test_text import CLS, text_task

MULTI = {"problem_type": "multi_label", "scores": "sigmoid"}


def test_logits_become_probabilities_however_large_they_are(tmp_path):
    logits = np.array([[0, 0], [1000, 1001]], np.float32)
    rows = text_task(tmp_path, scores="logits").split([[CLS], [CLS]], {"scores": logits})
    assert np.allclose(rows, [[0.5, 0.5], [1 / (1 + np.e), np.e / (1 + np.e)]])


def test_probabilities_are_passed_on_as_they_are(tmp_path):
    rows = text_task(tmp_path).split([[CLS]], {"scores": np.array([[0.25, 0.75]], np.float16)})
    assert [row.tolist() for row in rows] == [[0.25, 0.75]]
    assert rows[0].dtype == np.float32


@pytest.mark.parametrize(
    "scores",
    [[[0.1, 0.2, 0.7]], [[0.5]], [[0.5, 0.5], [0.5, 0.5]], [[np.nan, 0.5]], [[np.inf, 0.5]]],
    ids=["more labels", "fewer labels", "more rows", "nan", "infinite"],
)
def test_scores_that_are_not_one_finite_number_per_label_are_an_error(tmp_path, scores):
    with pytest.raises(ValueError, match="model output: expected"):
        text_task(tmp_path).split([[CLS]], {"scores": np.array(scores, np.float32)})


def results(*rows: tuple[float, float]) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in rows]


def test_the_likeliest_label_is_the_prediction_of_each_text(tmp_path):
    units = [Encoded([CLS], 1), Encoded([CLS], 1, truncated=True)]
    found = text_task(tmp_path).predictions(units, results((0.25, 0.75), (0.9, 0.1)))
    assert found == [Label("yes", 0.75), Label("no", 0.9, truncated=True)]


def test_answers_of_the_protocol_have_what_the_task_says_of_its_outputs(tmp_path):
    task = text_task(tmp_path)
    outputs = task.respond([Encoded([CLS], 1)] * 2, results((0.25, 0.75), (0.9, 0.1)))
    assert outputs["label"].tolist() == ["yes", "no"]
    assert outputs["score"].tolist() == np.array([0.75, 0.9], np.float32).tolist()
    assert outputs["probabilities"].tolist() == np.array([[0.25, 0.75], [0.9, 0.1]], np.float32).tolist()
    assert list(outputs) == [spec.name for spec in task.outputs]
    for spec in task.outputs:
        assert outputs[spec.name].dtype == DTYPES[spec.datatype]
        assert outputs[spec.name].shape == tuple(2 if size == -1 else size for size in spec.shape)


def test_each_logit_becomes_a_probability_of_its_own_where_there_may_be_several_labels(tmp_path):
    logits = np.array([[0, 1000], [-1000, 1]], np.float16)
    rows = text_task(tmp_path, **MULTI).split([[CLS], [CLS]], {"scores": logits})
    assert np.allclose(rows, [[0.5, 1], [0, 1 / (1 + np.exp(-1))]])
    assert rows[0].dtype == np.float32


def test_all_labels_at_or_over_the_threshold_are_the_prediction_likeliest_first(tmp_path):
    units = [Encoded([CLS], 1, truncated=truncated) for truncated in (False, False, False, True)]
    rows = results((0.25, 0.75), (0.5, 0.9), (0.1, 0.2), (0.6, 0.5))
    found = text_task(tmp_path, **MULTI, threshold=0.5).predictions(units, rows)
    assert found == [
        Labels([LabelScore("yes", 0.75)]),
        Labels([LabelScore("yes", 0.9), LabelScore("no", 0.5)]),
        Labels([]),
        Labels([LabelScore("no", 0.6), LabelScore("yes", 0.5)], truncated=True),
    ]


def test_the_threshold_is_the_manifests(tmp_path):
    row = results((0.3, 0.2))
    for threshold, expected in ((0.2, ["no", "yes"]), (0.3, ["no"]), (0.31, [])):
        (found,) = text_task(tmp_path, **MULTI, threshold=threshold).predictions([Encoded([CLS], 1)], row)
        assert [each.label for each in found.labels] == expected


def test_answers_of_the_protocol_say_whose_label_each_is_where_there_may_be_several(tmp_path):
    task = text_task(tmp_path, **MULTI)
    outputs = task.respond([Encoded([CLS], 1)] * 3, results((0.6, 0.75), (0.1, 0.2), (0.9, 0.1)))
    assert outputs["row"].tolist() == [0, 0, 2]
    assert outputs["label"].tolist() == ["yes", "no", "no"]
    assert outputs["score"].tolist() == np.array([0.75, 0.6, 0.9], np.float32).tolist()
    assert outputs["probabilities"].shape == (3, 2)
    assert [(spec.name, DTYPES[spec.datatype]) for spec in task.outputs] == [
        (name, array.dtype) for name, array in outputs.items()
    ]


@pytest.mark.parametrize(
    ("manifest", "scores"),
    [
        ({}, [[0.7, 0.7]]),
        ({}, [[-0.5, 1.5]]),
        ({}, [[0.4, 0.4]]),
        (MULTI | {"scores": "probabilities"}, [[0.4, 1.4]]),
        (MULTI | {"scores": "probabilities"}, [[-0.4, 0.4]]),
        (MULTI, [[np.nan, 0.4]]),
    ],
)
def test_scores_that_are_not_what_the_manifest_says_are_an_error(tmp_path, manifest, scores):
    with pytest.raises(ValueError, match="model output: expected"):
        text_task(tmp_path, **manifest).split([[CLS]], {"scores": np.array(scores, np.float32)})


@pytest.mark.parametrize("dtype", [np.float16, "int8"])
@pytest.mark.parametrize("labels", [2, 28])
def test_probabilities_that_were_rounded_are_probabilities_all_the_same(tmp_path, labels, dtype):
    logits = np.random.default_rng(0).standard_normal((64, labels)) * 3
    rows = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.round(rows * 255) / 255 if dtype == "int8" else rows.astype(dtype)
    task = text_task(
        tmp_path, labels=[str(each) for each in range(labels)], outputs=[TensorSpec("scores", "FP32", [-1, labels])]
    )
    assert len(task.split([[CLS]] * 64, {"scores": rows})) == 64


@pytest.mark.parametrize(
    ("manifest", "scores", "said"),
    [
        ({}, [[-1.5, 2.5], [0.3, 0.7]], "`scores`: expected logits: golden rows .* -1.5 … 2.5 .*; found probabilities"),
        ({}, [[0.9, 0.8]], "expected multi_label for `problem_type`, since rows do not sum to 1"),
        ({}, [[np.nan, 0.8]], "expected finite numbers"),
        (MULTI | {"scores": "probabilities"}, [[-1.5, 0.5]], "`scores`: expected sigmoid: .* found probabilities"),
        ({"scores": "logits"}, [[0.25, 0.75], [1, 0]], "`scores`: expected probabilities: .*already; found logits"),
    ],
)
def test_golden_scores_that_are_not_what_the_manifest_says_are_refused_with_what_fits(tmp_path, manifest, scores, said):
    task, rows = text_task(tmp_path, **manifest), iter(scores)
    task.golden_scores = lambda infer: [np.array([row]) for row in rows]
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        task.check(lambda inputs: {})


@pytest.mark.parametrize(
    ("manifest", "scores"),
    [
        ({}, [[0.25, 0.75]]),
        ({"scores": "logits"}, [[0.25, 0.75], [3, -1]]),
        (MULTI, [[0.25, 0.75], [0.1, 0.1]]),
        (MULTI | {"scores": "probabilities"}, [[0.9, 0.8]]),
    ],
)
def test_golden_scores_that_are_what_the_manifest_says_pass(tmp_path, manifest, scores):
    task, rows = text_task(tmp_path, **manifest), iter(scores)
    task.golden_scores = lambda infer: [np.array([row]) for row in rows]
    task.check(lambda inputs: {})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer_file": None}, "`tokenizer_file`: expected a value"),
        ({"max_tokens": None}, "`max_tokens`: expected a value"),
        ({"labels": []}, "`labels`: expected"),
        ({"labels": ["yes"]}, "`labels`: expected 2 different ones, .* found 1"),
        ({"labels": ["yes", "yes"]}, "`labels`: expected 2 different ones"),
        ({"labels": ["a", "b", "c"]}, "`labels`: expected 2 different ones, .* found 3"),
        ({"outputs": [TensorSpec("scores", "INT64", [-1, 2])]}, r"expected float \[rows, labels\], found INT64"),
        ({"outputs": [TensorSpec("scores", "FP32", [-1])]}, r"expected float \[rows, labels\], found FP32 \[-1\]"),
        ({"scores": "sigmoid"}, "`scores`: expected logits or probabilities for single_label .*, found sigmoid"),
        (MULTI | {"scores": "logits"}, "`scores`: expected sigmoid or probabilities for multi_label .*, found logits"),
        (MULTI | {"labels": []}, "`labels`: expected"),
        ({"tokenizer_file": "other.json"}, "'other.json' is used but not listed in `files`"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_manifest_that_lacks_what_the_task_needs_is_refused(tmp_path, change, said):
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        text_task(tmp_path, **change)
