"""Entities: which tokens make one up, where it stands in the text, and rows that share a run."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from app.artifact.manifest import Artifact, TensorSpec
from app.errors import ArtifactError
from app.runtime.loading import load_model
from app.runtime.tasks.answers import Entities, Entity
from app.runtime.tasks.token_classification import TokenClassification
from tests import task_models
from tests.unit.runtime.tasks.test_text import artifact

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def by_hand(folder: Path, text: str) -> list[tuple[str, float, int, int]]:
    """Entities of one text through plain ONNX Runtime: group, score, start, end."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(task_models.MAX_TOKENS)
    encoding = tokenizer.encode(text)
    ids = np.array([encoding.ids])
    (logits,) = ort.InferenceSession(folder / "model.onnx").run(
        None, {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    )
    powers = np.exp(logits[0].astype(np.float64))
    rows = powers / powers.sum(axis=1, keepdims=True)
    entities: list[list] = []
    last = ""
    for row, (start, end), special in zip(rows, encoding.offsets, encoding.special_tokens_mask, strict=True):
        if special:
            continue
        label = TAGS[int(row.argmax())]
        group = label.removeprefix("B-").removeprefix("I-")
        if group != last or label.startswith("B-"):
            entities.append([group, [], start, end])
        entities[-1][1].append(row.max())
        entities[-1][3] = end
        last = group
    return [(group, float(np.mean(scores)), start, end) for group, scores, start, end in entities if group != "O"]


def test_entities_are_those_of_plain_onnx_runtime_alone_and_beside_others(tmp_path):
    model = load_model(task_models.tags(tmp_path))
    task = model.task
    assert isinstance(task, TokenClassification)
    units = task.encode(task_models.TEXTS)
    together = task.predictions(units, model.run([unit.payload for unit in units]))
    assert sum(len(each.entities) for each in together) > len(task_models.TEXTS)
    for text, unit, beside in zip(task_models.TEXTS, units, together, strict=True):
        (alone,) = task.predictions([unit], model.run([unit.payload]))
        for found in (alone, beside):
            assert [(e.entity_group, pytest.approx(e.score, abs=1e-5), e.start, e.end) for e in found.entities] == [
                *by_hand(tmp_path, text)
            ]
            assert [entity.word for entity in found.entities] == [text[e.start : e.end] for e in found.entities]
    assert [each.truncated for each in together] == [unit.truncated for unit in units]
    assert any(each.truncated for each in together)


def tagging_artifact(folder: Path, labels: list[str], **changes: object) -> Artifact:
    outputs = [TensorSpec("scores", "FP32", [-1, -1, len(labels)])]
    fields = {"task": "token-classification", "labels": labels, "scores": "logits", "outputs": outputs}
    return artifact(folder, **(fields | {"max_tokens": 32} | changes))  # type: ignore[arg-type]


def tagging(folder: Path, labels: list[str] = TAGS, **changes: object) -> TokenClassification:
    return TokenClassification(tagging_artifact(folder, labels, **changes), 8)


def entities(task: TokenClassification, text: str, tokens: str, scores: list[float] | None = None) -> list[Entity]:
    """What is answered to a text whose tokens, without those at its ends, have these labels."""
    (unit,) = task.encode([text])
    labels = ["O", *tokens.split(), "O"]
    assert unit.length == len(labels)
    found = [np.array([task._labels.labels.index(each) for each in labels])]
    found.append(np.array([1, *(scores or [1] * (len(labels) - 2)), 1], np.float32))
    ((answer,),) = [task.predictions([unit], [tuple(found)])]
    assert isinstance(answer, Entities)
    return answer.entities


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("O O O O", []),
        ("B-PER O B-LOC I-LOC", [("PER", "good"), ("LOC", "fine day")]),
        ("B-PER B-PER I-PER O", [("PER", "good"), ("PER", "bad fine")]),
        ("B-PER I-LOC I-LOC O", [("PER", "good"), ("LOC", "bad fine")]),
        ("I-PER I-PER O I-PER", [("PER", "good bad"), ("PER", "day")]),
        ("B-PER I-PER I-PER I-PER", [("PER", "good bad fine day")]),
        ("I-LOC B-LOC O B-LOC", [("LOC", "good"), ("LOC", "bad"), ("LOC", "day")]),
    ],
)
def test_neighbours_of_one_kind_are_one_entity_unless_another_begins(tmp_path, tokens, expected):
    found = entities(tagging(tmp_path), "good bad fine day", tokens)
    assert [(entity.entity_group, entity.word) for entity in found] == expected


def test_labels_without_a_prefix_make_entities_too(tmp_path):
    found = entities(tagging(tmp_path, ["O", "PER", "LOC"]), "good bad fine day", "PER PER LOC O")
    assert [(entity.entity_group, entity.word) for entity in found] == [("PER", "good bad"), ("LOC", "fine")]


def test_the_score_of_an_entity_is_the_mean_of_its_tokens(tmp_path):
    (found,) = entities(tagging(tmp_path), "good bad fine day", "O B-PER I-PER O", [0.9, 0.5, 0.75, 0.9])
    assert found == Entity("PER", 0.625, "bad fine", 5, 13)


def test_places_are_counted_in_code_points_of_the_text_as_it_came(tmp_path):
    text = "😀 日本 e\u0301té  İstanbul"
    found = entities(tagging(tmp_path), text, "O B-LOC B-PER I-PER")
    assert [(entity.start, entity.end, entity.word) for entity in found] == [
        (2, 4, "日本"),
        (5, len(text), text[5:]),
    ]


def test_places_are_right_where_tokens_are_bytes_of_a_character(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["good day"], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet))
    made = tagging_artifact(tmp_path, TAGS)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = TokenClassification(made, 8)
    text = "日😀é"
    (unit,) = task.encode([text])
    assert unit.length > len(text)
    labels, scores = np.full(unit.length, 1), np.ones(unit.length, np.float32)
    labels[1:] = 2
    assert task.predictions([unit], [(labels, scores)])[0].entities == [Entity("PER", 1.0, text, 0, 3)]


def test_texts_together_are_encoded_as_each_would_be_alone(tmp_path):
    task = tagging(tmp_path, max_tokens=4)
    texts = ["good bad fine", "Day", "good " + " " * 9_999 + "bad"]
    assert task.encode(texts) == [task.encode([text])[0] for text in texts]


def test_no_more_of_a_text_is_kept_than_its_tokens_cover(tmp_path):
    (unit,) = tagging(tmp_path, max_tokens=4).encode(["good bad fine" + " fine" * 999])
    assert (unit.payload[2], unit.truncated) == ("good bad", True)


def test_what_the_model_says_of_padding_need_not_be_a_number(tmp_path):
    task = tagging(tmp_path, ["O", "PER"])
    units = task.encode(["good", "good day"])
    scores = np.zeros((2, 4, 2), np.float32)
    scores[0, 3:], scores[:, 1, 1] = np.nan, 9
    found = task.predictions(units, task.split([unit.payload for unit in units], {"scores": scores}))
    assert [[entity.word for entity in each.entities] for each in found] == [["good"], ["good"]]


def test_answers_of_the_protocol_say_whose_entity_each_is(tmp_path):
    task = tagging(tmp_path)
    units = task.encode(["good day", "bad", "fine"])
    results = [(np.array(labels), np.ones(len(labels), np.float32)) for labels in ([0, 1, 3, 0], [0, 0, 0], [0, 4, 0])]
    outputs = task.respond(units, results)
    assert {name: array.tolist() for name, array in outputs.items()} == {
        "row": [0, 0, 2],
        "entity_group": ["PER", "LOC", "LOC"],
        "score": [1, 1, 1],
        "word": ["good", "day", "fine"],
        "start": [0, 5, 0],
        "end": [4, 8, 4],
    }
    assert list(outputs) == [spec.name for spec in task.outputs]
    assert all(array.shape == (0,) for array in task.respond([units[1]], [results[1]]).values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem_type": "multi_label", "scores": "sigmoid"}, "`problem_type`: expected single_label"),
        ({"scores": "sigmoid"}, "`scores`: expected logits or probabilities"),
        ({"outputs": [TensorSpec("scores", "FP32", [-1, 5])]}, r"expected float \[rows, tokens, labels\], found FP32"),
        ({"outputs": [TensorSpec("scores", "FP32", [-1, -1, 4])]}, "`labels`: expected 4 different ones"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, said):
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        tagging(tmp_path, **change)
