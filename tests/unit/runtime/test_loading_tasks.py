"""The readiness gate and each task: what a good artifact of it is, and which claims about a model it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.artifact.manifest import MANIFEST
from app.errors import ArtifactError
from app.runtime.loading import load_model
from app.runtime.session import Session
from tests import onnx_models, task_models

ROUGHLY = {"tolerance": 100}


def changed(folder: Path, **fields: object) -> Path:
    """The artifact, whose manifest says something else."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) | fields | {"checksum": None}
    path.write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", task_models.BUILD)
def test_a_good_artifact_of_each_task_passes(tmp_path, name):
    model = load_model(task_models.BUILD[name](tmp_path / "artifact"))
    assert model.golden_error < 1e-4
    assert model.tokens_per_second > 0


@pytest.mark.parametrize("name", task_models.BUILD)
def test_golden_outputs_that_the_model_does_not_answer_are_refused_for_each_task(tmp_path, name):
    folder = task_models.BUILD[name](tmp_path / "artifact")
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    if golden["file"]:
        with np.load(folder / golden["file"]) as file:
            arrays = dict(file)
        arrays["output.probabilities"] = arrays["output.probabilities"][:, ::-1]
        np.savez(folder / golden["file"], **arrays)
        entry = task_models.file_entry(folder / golden["file"])
        files = json.loads((folder / MANIFEST).read_text())["files"]
        changed(folder, files=files | {golden["file"]: {"sha256": entry.sha256, "bytes": entry.bytes}})
    else:
        outputs = golden["examples"][1]["outputs"]
        numbers = next(name for name in ("probabilities", "embedding", "value", "score") if name in outputs)
        outputs[numbers][0] += 0.1
        changed(folder, golden=golden)
    with pytest.raises(ArtifactError, match="outside tolerance"):
        load_model(folder)


def wrong(build: Callable[..., Path], said: str, **fields: object):
    return pytest.param(build, fields, said, id=f"{build.__name__} {fields}")


@pytest.mark.parametrize(
    ("build", "fields", "said"),
    [
        wrong(task_models.classification, "`scores`: expected logits", scores="probabilities"),
        wrong(task_models.multi_label, "`scores`: expected sigmoid", scores="probabilities"),
        wrong(task_models.multi_label, "`scores`: expected sigmoid or probabilities", scores="logits"),
        wrong(task_models.multi_label, "`scores`: expected logits or prob", problem_type="single_label"),
        wrong(task_models.tags, "`scores`: expected logits", scores="probabilities"),
        wrong(task_models.pair, "`scores`: expected sigmoid", scores="probabilities"),
        wrong(task_models.images, "`scores`: expected logits", scores="probabilities"),
        wrong(task_models.embedding, "`pooling` none", pooling="none"),
        wrong(task_models.regression, r"expected float \[rows, 2\], as many as `labels`", labels=["joy", "anger"]),
    ],
)
def test_a_manifest_that_is_wrong_about_the_models_output_is_refused_with_what_fits(tmp_path, build, fields, said):
    folder = build(tmp_path / "artifact")
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    # However tolerant: the golden outputs are not what finds it.
    changed(folder, **fields, golden=golden | ROUGHLY)
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("activation", "fields", "said"),
    [
        ("Softmax", {"scores": "logits"}, "`scores`: expected probabilities: .* already; found logits"),
        ("Sigmoid", {"scores": "probabilities"}, "expected multi_label for `problem_type`"),
    ],
)
def test_a_model_with_the_activation_in_its_file_is_not_given_another(tmp_path, activation, fields, said):
    model = {"size": 3, "activation": activation}
    labels = ["dry", "wet", "cold"]
    good = {"scores": "probabilities", "labels": labels}
    if activation == "Sigmoid":
        good["problem_type"] = "multi_label"
    folder = task_models.text_artifact(tmp_path / "artifact", "text-classification", model=model, **good)
    load_model(folder)
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    for example in golden["examples"]:
        example["outputs"] = {"probabilities": example["outputs"]["probabilities"]}
    with pytest.raises(ArtifactError, match=rf"manifest\.json: .*{said}"):
        load_model(changed(folder, **({"problem_type": "single_label"} | fields), golden=golden | ROUGHLY))


POSITIONS = {
    "text-classification": ({"size": 3}, {"labels": ["dry", "wet", "cold"], "scores": "logits"}),
    "text-embedding": ({"size": 6}, {}),
    "text-pair": ({"size": 1, "types": True}, {"scores": "sigmoid"}),
    "text-regression": ({"size": 1}, {}),
    "token-classification": ({"size": 5, "per_token": True}, {"labels": task_models.TAGS, "scores": "logits"}),
}


@pytest.mark.parametrize("positions", [20, 21, 40, 63])
@pytest.mark.parametrize("task", POSITIONS)
def test_a_model_with_fewer_positions_than_max_tokens_is_refused_with_how_many_it_has(tmp_path, task, positions):
    model, fields = POSITIONS[task]
    folder = task_models.text_artifact(
        tmp_path / "artifact", task, model=model | {"positions": positions}, max_tokens=positions, **fields
    )
    assert load_model(folder).task.max_tokens == positions
    said = rf"`max_tokens`: expected at most {positions}, the longest row that model.onnx takes, found 64$"
    with pytest.raises(ArtifactError, match=rf"manifest\.json: {said}"):
        load_model(changed(folder, max_tokens=64))


def test_a_golden_text_that_fills_the_window_does_not_hide_that_it_is_too_large(tmp_path):
    folder = task_models.text_artifact(
        tmp_path / "artifact", "text-regression", model={"size": 1, "positions": 21}, max_tokens=21
    )
    golden = json.loads((folder / MANIFEST).read_text())["golden"]
    golden["examples"].insert(0, {"text": "new york " * 99, "outputs": {"value": [0.0]}})
    with pytest.raises(ArtifactError, match=r"`max_tokens`: expected at most 21, .* found 64$"):
        load_model(changed(folder, max_tokens=64, golden=golden))


def test_a_model_that_takes_fewer_rows_than_a_run_may_have_is_refused(package):
    folder = package(onnx_models.few_rows)
    load_model(folder, max_batch_rows=8)
    said = r"model\.onnx: run failed on the largest batch, 9 rows of length 1; lower APP_MAX_BATCH_ROWS or "
    with pytest.raises(ArtifactError, match=said):
        load_model(folder, max_batch_rows=9)


def shapes_of_runs(monkeypatch: pytest.MonkeyPatch, key: str) -> list[tuple[int, ...]]:
    """Shapes of that input in every run from now on."""
    seen: list[tuple[int, ...]] = []

    def run(session: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append(inputs[key].shape)
        return actual(session, inputs)

    actual = Session.run
    monkeypatch.setattr(Session, "run", run)
    return seen


def test_golden_texts_run_together_as_texts_do_later_within_the_tokens_of_a_run(tmp_path, monkeypatch):
    folder = task_models.classification(tmp_path / "artifact")
    seen = shapes_of_runs(monkeypatch, "input_ids")
    task = load_model(folder, max_batch_rows=8, max_batch_tokens=20).task
    lengths = sorted(unit.length for case in task.golden() for unit in case.units)
    assert sum(lengths[:2]) <= 20 < 3 * lengths[2]
    assert (2, lengths[1]) in seen
    assert max(rows * tokens for rows, tokens in seen if rows > 1) <= 20


@pytest.mark.parametrize("name", ["text-classification", "text-pair", "token-classification", "image-classification"])
def test_rows_that_do_not_share_runs_never_do(tmp_path, monkeypatch, name):
    folder = task_models.BUILD[name](tmp_path / "artifact")
    seen = shapes_of_runs(monkeypatch, "pixels" if "image" in name else "input_ids")
    load_model(folder)
    assert max(rows for rows, *_ in seen) == 8
    seen.clear()
    task = load_model(changed(folder, batching=False)).task
    assert {rows for rows, *_ in seen} == {1}
    text = task_models.picture() if "image" in name else ("Anna", "Bob") if "pair" in name else "Anna"
    for inputs in ([text], [text] * 3):
        keys = {unit.key for unit in task.encode(inputs)}
        assert len(keys) == len(inputs)
        assert None not in keys
