"""`python -m model.package --reference`: what the model predicts of inputs like production's is in its manifest."""

import json
from collections import Counter
from pathlib import Path

import pytest

from app.runtime.loading import load_model
from model.package.distribution import LEAST_PREDICTIONS_PER_LABEL, read_reference, record_reference
from tests import task_models
from tests.tools.packaging import Command, folder

TEXTS = ["good day", "bad", "fine fine bad day"]
MANY = TEXTS * LEAST_PREDICTIONS_PER_LABEL


@pytest.fixture
def command(monkeypatch, capfd, tmp_path) -> Command:
    return Command(monkeypatch, capfd, tmp_path)


@pytest.fixture
def model(tmp_path) -> Path:
    return folder(tmp_path / "source", 2, labels=["no", "yes"]) / "model.onnx"


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(texts) + "\n")
    return path


def test_the_share_of_each_label_over_all_given_texts_is_recorded_and_told(command, model, tmp_path):
    found = command.manifest(model, "--reference", lines(tmp_path / "texts.txt", MANY))["reference_distribution"]

    served = load_model(command.made)
    units = served.task.encode(TEXTS)
    answers = served.task.predictions(units, [served.run([unit.payload])[0] for unit in units])
    counts = Counter(answer.label for answer in answers)
    assert found["predictions"] == len(MANY)
    assert found["ratios"] == {label: pytest.approx(counts[label] / 3, abs=1e-6) for label in ("no", "yes")}
    assert (
        f"reference    of {len(MANY)} predictions: no {counts['no'] / 3:.4g}, yes {counts['yes'] / 3:.4g}"
        in command.out
    )


def test_texts_may_be_rows_of_jsonl(command, model, tmp_path):
    rows = [json.dumps({"text": text, "label": "whatever"}) for text in MANY]
    plain = command.manifest(model, "--reference", lines(tmp_path / "texts.txt", MANY))["reference_distribution"]
    command.made.rename(tmp_path / "first")
    assert command.manifest(model, "--reference", lines(tmp_path / "t.jsonl", rows))["reference_distribution"] == plain


def test_only_the_end_of_a_line_ends_a_text(tmp_path):
    file = lines(tmp_path / "texts.jsonl", ['{"text": "good\u2028day"}', '{"text": "bad"}\r'])
    assert read_reference(file, "text-classification") == ["good\u2028day", "bad"]


def test_without_one_there_is_none(command, model):
    assert command.manifest(model)["reference_distribution"] is None
    assert "reference " not in command.out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("few.txt", TEXTS, "few.txt: expected at least 200 predictions, found 3: with fewer, chance alone looks like"),
        ("bad.jsonl", ['{"text": "good"}', "good"], "bad.jsonl: row 2: `text`: expected a string that is not blank"),
        ("blank.jsonl", ['{"text": " "}'], "blank.jsonl: row 1: `text`: expected a string that is not blank"),
        ("lone.jsonl", [r'{"text": "\ud800"}'], "lone.jsonl: text: expected valid Unicode"),
        ("empty.txt", [""], "empty.txt: expected at least one text"),
    ],
)
def test_what_makes_no_reference_is_refused_and_leaves_nothing_behind(command, model, tmp_path, name, content, said):
    assert said in command.refused(model, "--reference", lines(tmp_path / name, content))


def test_a_file_that_is_not_there_is_refused_by_its_name(command, model, tmp_path):
    assert "none.txt" in command.refused(model, "--reference", tmp_path / "none.txt")


def test_it_means_nothing_for_a_task_without_labels(command, tmp_path):
    model = folder(tmp_path / "source", 1, config={"problem_type": "regression"}) / "model.onnx"
    assert "--reference: means nothing for task text-regression" in command.refused(model, "--reference", model)


def test_several_labels_of_a_row_and_entities_count_each(tmp_path):
    for build, labels in ((task_models.multi_label, ["dry", "wet", "cold"]), (task_models.tags, ["PER", "LOC"])):
        artifact = build(tmp_path / build.__name__)
        found = record_reference(artifact, task_models.TEXTS * 100, "here").reference_distribution
        assert list(found.ratios) == labels
        assert sum(found.ratios.values()) == pytest.approx(1, abs=1e-5)
        assert found.predictions > 700
        assert load_model(artifact).artifact.manifest.reference_distribution == found


def test_images_are_all_of_a_folder(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(task_models.picture(seed=number))
    files = read_reference(tmp_path, "image-classification")
    assert len(files) == 20
    found = record_reference(task_models.images(tmp_path / "artifact"), files * 15, "here").reference_distribution
    assert (found.predictions, list(found.ratios)) == (300, ["cat", "dog", "fish"])
