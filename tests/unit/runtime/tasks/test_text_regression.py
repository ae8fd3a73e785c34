"""Values of texts against ONNX Runtime by hand, one of them or several that have names."""

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from app.artifact.manifest import TensorSpec
from app.errors import ArtifactError
from app.runtime.loading import load_model
from app.runtime.tasks import Encoded
from app.runtime.tasks.answers import Value
from app.runtime.tasks.text_regression import TextRegression
from tests import task_models
from tests.unit.runtime.tasks.test_text import CLS, artifact


@pytest.mark.parametrize("labels", [(), ("joy", "anger")])
def test_values_are_those_of_plain_onnx_runtime_alone_and_beside_others(tmp_path, labels):
    model = load_model(task_models.regression(tmp_path, labels))
    units = model.task.encode(task_models.TEXTS)
    together = model.task.respond(units, model.run([unit.payload for unit in units]))["value"]
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(task_models.MAX_TOKENS)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    for text, unit, beside in zip(task_models.TEXTS, units, together, strict=True):
        ids = np.array([tokenizer.encode(text).ids])
        (expected,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        alone = model.task.respond([unit], model.run([unit.payload]))["value"]
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose([beside], expected, rtol=1e-5, atol=1e-5)


def regression(folder, shape=(-1, 1), datatype="FP32", **changes):
    outputs = [TensorSpec("scores", datatype, list(shape))]
    return TextRegression(
        artifact(folder, **{"task": "text-regression", "labels": [], "outputs": outputs} | changes), 8
    )


def test_one_value_is_a_number_and_several_have_their_names(tmp_path):
    units = [Encoded([CLS], 1), Encoded([CLS], 1, truncated=True)]
    rows = [np.array([0.5], np.float32), np.array([-2], np.float32)]
    assert regression(tmp_path).predictions(units, rows) == [Value(0.5), Value(-2.0, truncated=True)]
    task = regression(tmp_path, (-1, -1), labels=["joy", "anger"])
    row = np.array([0.5, 0.25], np.float32)
    assert task.predictions(units[:1], [row]) == [Value({"joy": 0.5, "anger": 0.25})]


def test_an_output_without_a_second_axis_is_one_value(tmp_path):
    found = regression(tmp_path, (-1,)).split([[CLS]] * 2, {"scores": np.array([1, 2], np.float16)})
    assert [row.tolist() for row in found] == [[1], [2]]


@pytest.mark.parametrize(
    ("shape", "datatype", "labels"),
    [
        ((-1, 2), "FP32", []),
        ((-1, 2), "FP32", ["a", "b", "c"]),
        ((-1,), "FP32", ["a", "b"]),
        ((-1, -1, 1), "FP32", []),
        ((-1, 1), "INT64", []),
    ],
)
def test_an_output_that_does_not_fit_the_names_is_refused(tmp_path, shape, datatype, labels):
    with pytest.raises(
        ArtifactError, match=r"output 'scores': expected float \[rows, \d\], as many as `labels`, found"
    ):
        regression(tmp_path, shape, datatype, labels=labels)


@pytest.mark.parametrize("scores", [[[np.nan]], [[1, 2]], [[1], [2]]])
def test_values_that_are_not_finite_or_not_one_for_each_name_are_an_error(tmp_path, scores):
    with pytest.raises(ValueError, match="model output: expected"):
        regression(tmp_path, (-1, -1)).split([[CLS]], {"scores": np.array(scores, np.float32)})
