"""Scores of pairs against ONNX Runtime by hand: types of tokens, windows, and rows that share a run."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

from app.artifact.manifest import Golden, GoldenText, TensorSpec
from app.errors import ArtifactError, Invalid
from app.runtime.loading import load_model
from app.runtime.tasks.text import QUICK_CHARACTERS
from app.runtime.tasks.text_pair import TextPair
from tests import task_models
from tests.unit.runtime.tasks.test_text import CLS, DAY, FINE, GOOD, SEP, artifact

QUERY = "Zoë in Berlin"


def by_hand(folder: Path, query: str, text: str) -> float:
    """The logit of one pair through plain ONNX Runtime."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(task_models.MAX_TOKENS)
    encoding = tokenizer.encode(query, text)
    ids, types = np.array([encoding.ids]), np.array([encoding.type_ids])
    assert 0 < types.mean() < 1
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}
    return float(ort.InferenceSession(folder / "model.onnx").run(None, inputs)[0].item())


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("scores", ["sigmoid", "logits"])
def test_scores_are_those_of_plain_onnx_runtime_alone_and_beside_others(tmp_path, scores, rank):
    model = load_model(task_models.pair(tmp_path, rank=rank, scores=scores))
    task = model.task
    assert isinstance(task, TextPair)
    units = task.encode([(QUERY, text) for text in task_models.TEXTS])
    results = model.run([unit.payload for unit in units])
    logits = np.array([by_hand(tmp_path, QUERY, text) for text in task_models.TEXTS])
    expected = 1 / (1 + np.exp(-logits)) if scores == "sigmoid" else logits
    np.testing.assert_allclose(task.scored(units, results), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(task.scored(units, results, raw=True), logits, rtol=1e-4, atol=1e-5)
    for unit, score in zip(units, expected, strict=True):
        alone = task.respond([unit], model.run([unit.payload]))["score"]
        np.testing.assert_allclose(alone, [score], rtol=1e-4, atol=1e-5)


def pair_task(folder: Path, **changes: object) -> TextPair:
    fields = {
        "task": "text-pair",
        "labels": [],
        "scores": "sigmoid",
        "outputs": [TensorSpec("scores", "FP32", [-1, 1])],
        "inputs": ("input_ids", "attention_mask", "token_type_ids"),
        "golden": Golden(0.1, [GoldenText("good", text_pair="day", outputs={"score": [0.5]})]),
        "max_tokens": 8,
    }
    return TextPair(artifact(folder, **(fields | changes)), 8)  # type: ignore[arg-type]


def test_a_pair_is_one_row_whose_tokens_say_which_text_is_theirs(tmp_path):
    task = pair_task(tmp_path)
    units = task.encode([("good", "fine day"), ("day", "good")])
    assert units[0].payload == ([CLS, GOOD, SEP, FINE, DAY, SEP], [0, 0, 0, 1, 1, 1])
    assert [(unit.length, unit.truncated) for unit in units] == [(6, False), (5, False)]
    inputs = task.assemble([unit.payload for unit in units])
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]


@pytest.mark.parametrize("long", ["fine " * 9, "fine " * 9_999, "fine" + " " * 9_999 + "fine " * 9])
def test_a_pair_that_is_longer_than_the_window_is_cut_and_says_so(tmp_path, long):
    task = pair_task(tmp_path)
    for pair in (("good", long), (long, "good")):
        (unit,) = task.encode([pair])
        assert (unit.length, unit.truncated) == (8, True)
        assert GOOD in unit.payload[0]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [([("good", "day"), ("good", " ")], "^text 1: "), ([("", "day")], "^query 0: "), ([("good", "\ud800")], "surrog")],
)
def test_a_blank_or_broken_text_of_a_pair_is_invalid(tmp_path, pairs, said):
    with pytest.raises(Invalid, match=said):
        pair_task(tmp_path).encode(pairs)


def test_pairs_come_as_two_tensors_of_as_many_rows(tmp_path):
    task = pair_task(tmp_path)
    query, text = np.array([b"good", b"day"], object), np.array([b"fine", "é".encode()], object)
    assert task.read({"text": text, "query": query}) == [("good", "fine"), ("day", "é")]
    for tensors, said in (
        ({"text": text}, "expected query and text"),
        ({"text": text, "query": query[:1]}, "as many rows"),
        ({"text": text, "query": np.zeros(2)}, "input query: expected BYTES"),
    ):
        with pytest.raises(Invalid, match=said):
            task.read(tensors)


def test_characters_of_both_texts_count_as_slow(tmp_path):
    task, half = pair_task(tmp_path), "g" * (QUICK_CHARACTERS // 2)
    assert not task.encodes_slowly([(half, half)])
    assert task.encodes_slowly([(half, half + "g")])


@pytest.mark.parametrize("shape", [[-1, 2], [-1, -1, 1]])
def test_an_output_of_more_than_one_number_is_refused(tmp_path, shape):
    with pytest.raises(ArtifactError, match=r"output 'scores': expected float \[rows, 1\] or \[rows\], found FP32"):
        pair_task(tmp_path, outputs=[TensorSpec("scores", "FP32", shape)])


def test_a_golden_example_of_one_text_is_refused(tmp_path):
    task = pair_task(tmp_path, golden=Golden(0.1, [GoldenText("good", outputs={"score": [0.5]})]))
    with pytest.raises(ArtifactError, match=r"`text_pair`: expected a second text"):
        task.golden()


def test_logits_that_are_called_probabilities_are_refused_by_the_gate_and_by_a_run(tmp_path):
    task = pair_task(tmp_path, scores="probabilities")
    with pytest.raises(ArtifactError, match=r"`scores`: expected sigmoid .* 3 … 3; found probabilities"):
        task.check(lambda inputs: {"scores": np.full((1, 1), 3, np.float32)})
    with pytest.raises(ValueError, match="probabilities"):
        task.split([([CLS], [0])], {"scores": np.array([[3]], np.float32)})
    assert task.split([([CLS], [0])], {"scores": np.array([[1]], np.float32)}) == [1]
