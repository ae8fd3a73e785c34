"""Vectors against ONNX Runtime and NumPy by hand: pooling, normalization, and rows that share a run."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from app.artifact.manifest import TensorSpec
from app.errors import ArtifactError
from app.runtime.loading import load_model
from app.runtime.tasks.text_embedding import TextEmbedding
from tests import task_models
from tests.unit.runtime.tasks.test_text import CLS, artifact


def by_hand(folder: Path, text: str, pooling: str) -> np.ndarray:
    """One text through plain ONNX Runtime, not normalized."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(task_models.MAX_TOKENS)
    ids = np.array([tokenizer.encode(text).ids])
    (scores,) = ort.InferenceSession(folder / "model.onnx").run(
        None, {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    )
    return {"none": scores[0], "cls": scores[0][0], "mean": scores[0].mean(axis=0)}[pooling]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["none", "mean", "cls"])
def test_vectors_are_those_of_plain_onnx_runtime_alone_and_beside_others(tmp_path, pooling, normalize):
    model = load_model(task_models.embedding(tmp_path, pooling, normalize=normalize))
    units = model.task.encode(task_models.TEXTS)
    assert len({unit.length for unit in units}) > 3
    together = model.task.respond(units, model.run([unit.payload for unit in units]))["embedding"]
    for text, unit, beside in zip(task_models.TEXTS, units, together, strict=True):
        expected = by_hand(tmp_path, text, pooling)
        if normalize:
            expected = expected / np.sqrt((expected**2).sum())
        alone = model.task.respond([unit], model.run([unit.payload]))["embedding"][0]
        np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(beside, expected, rtol=1e-5, atol=1e-6)
        assert np.linalg.norm(beside) == pytest.approx(1) or not normalize


@pytest.mark.parametrize("manifest", [True, False])
def test_a_request_may_say_whether_vectors_are_normalized(tmp_path, manifest):
    task = TextEmbedding(embedding_artifact(tmp_path, normalize=manifest), 8)
    results = [np.array([3, 4], np.float32), np.array([0, 0], np.float32)]
    assert task.embeddings([], results, normalize=True).tolist() == [[np.float32(0.6), np.float32(0.8)], [0, 0]]
    assert task.embeddings([], results, normalize=False).tolist() == [[3, 4], [0, 0]]
    assert np.array_equal(task.embeddings([], results), task.embeddings([], results, normalize=manifest))


def embedding_artifact(folder: Path, **changes: object):
    return artifact(folder, **{"task": "text-embedding", "labels": [], **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pooling", "spec"),
    [
        ("none", TensorSpec("scores", "FP32", [-1, -1, 2])),
        ("none", TensorSpec("scores", "FP32", [-1, -1])),
        ("none", TensorSpec("scores", "INT64", [-1, 2])),
        ("mean", TensorSpec("scores", "FP32", [-1, 2])),
        ("cls", TensorSpec("scores", "FP32", [-1, -1, -1])),
    ],
)
def test_an_output_that_is_no_vector_of_a_known_size_is_refused(tmp_path, pooling, spec):
    said = rf"manifest\.json: output 'scores': expected float \[rows, .*dimensions\] .* `pooling` {pooling}, found"
    with pytest.raises(ArtifactError, match=said):
        TextEmbedding(embedding_artifact(tmp_path, pooling=pooling, outputs=[spec]), 8)


def test_a_vector_that_is_not_finite_is_an_error(tmp_path):
    task = TextEmbedding(embedding_artifact(tmp_path), 8)
    with pytest.raises(ValueError, match="finite"):
        task.split([[CLS]], {"scores": np.array([[1, np.nan]], np.float32)})


def test_what_padding_gives_need_not_be_finite_where_it_is_not_pooled(tmp_path):
    outputs = [TensorSpec("scores", "FP32", [-1, -1, 2])]
    task = TextEmbedding(embedding_artifact(tmp_path, pooling="mean", outputs=outputs), 8)
    scores = np.array([[[1, 2], [3, 4]], [[5, 6], [np.nan, np.inf]]], np.float16)
    found = task.split([[CLS, CLS], [CLS]], {"scores": scores})
    assert [row.tolist() for row in found] == [[2, 3], [5, 6]]
