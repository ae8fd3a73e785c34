"""`python -m model.bom`: what the manifest says, as CycloneDX; held to its schema where that is installed."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from model.bom import datasets, main
from model.package import file_entry
from tests.text_model import LABELS, NAME, VERSION, text_model
from tests.unit.runtime.test_loading import edit


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = shutil.copytree(text_model(), tmp_path / "artifact")
    lineage = {"data": "one; two", "license": "MIT", "training": {"seeds": [7, 31]}}
    evaluation = {"threads": 2, "accuracy": {"held-out": {"accuracy": 0.9, "rows": 250}}, "exact": True}
    edit(lambda manifest: manifest.update(lineage=lineage, evaluation=evaluation))(folder)
    return folder


def valid(text: str) -> bool:
    """By the schema of CycloneDX, strictly."""
    if find_spec("cyclonedx") is None:
        return True
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_model_is_a_component_with_its_digest_licence_data_and_evaluation(command, artifact, capfd):
    assert command(main, artifact) == 0
    text = capfd.readouterr().out
    assert valid(text)
    found = json.loads(text)["metadata"]["component"]
    assert (found["type"], found["name"], found["version"]) == ("machine-learning-model", NAME, VERSION)
    assert found["hashes"] == [{"alg": "SHA-256", "content": file_entry(artifact / MANIFEST).sha256}]
    assert found["licenses"] == [{"license": {"id": "MIT"}}]
    files = {each["name"]: each["hashes"][0]["content"] for each in found["components"]}
    assert files == {name: file_entry(artifact / name).sha256 for name in (MANIFEST, "model.onnx", "tokenizer.json")}
    card = found["modelCard"]
    assert [each["name"] for each in card["modelParameters"]["datasets"]] == ["one", "two"]
    assert card["modelParameters"]["task"] == "text-classification"
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "threads", "value": "2"},
        {"type": "accuracy", "value": "0.9", "slice": "accuracy.held-out"},
        {"type": "rows", "value": "250", "slice": "accuracy.held-out"},
    ]
    known = {each["name"].partition(":")[2]: each["value"] for each in found["properties"]}
    assert known["labels"] == ", ".join(LABELS)
    assert known["lineage:training.seeds"] == "[7, 31]"


def test_the_same_artifact_is_the_same_bom(command, artifact, capfd):
    texts = [(command(main, artifact, "--licence", "Apache-2.0"), capfd.readouterr().out)[1] for _ in range(2)]
    assert texts[0] == texts[1]
    assert '"id": "MIT"' in texts[0]


def test_a_model_that_says_little_is_described_too_with_the_licence_that_is_given(command, capfd):
    assert command(main, text_model(), "--licence", "Apache-2.0") == 0
    text = capfd.readouterr().out
    assert valid(text)
    assert json.loads(text)["metadata"]["component"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]


def test_the_model_goes_into_an_images_bom_once(command, artifact, tmp_path):
    path = tmp_path / "image.json"
    library = {"type": "library", "bom-ref": "numpy", "name": "numpy", "version": "2.4.6"}
    path.write_text(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "components": [library]}))
    for _ in range(2):
        assert command(main, artifact, "--into", path) == 0
    assert valid(path.read_text())
    assert [each["name"] for each in json.loads(path.read_text())["components"]] == ["numpy", NAME]


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"bomFormat": "CycloneDX", "specVersion": "1.3"}'])
def test_what_is_no_bom_of_this_version_is_exit_code_2_and_one_line(command, artifact, tmp_path, capfd, content):
    path = tmp_path / "image.json"
    path.write_text(content)
    assert command(main, artifact, "--into", path) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("model.bom: ")


def test_what_is_no_sound_artifact_is_exit_code_3(command, artifact, capfd):
    (artifact / "model.onnx").write_bytes(b"x")
    assert command(main, artifact) == 3
    assert "model.onnx: size mismatch" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (None, []),
        ("", []),
        ("one set; another", ["one set", "another"]),
        (["one", {"name": "two"}], ["one", '{"name": "two"}']),
        ({"train.tsv": "0a1b", "dev.tsv": {"rows": 3}}, ["train.tsv 0a1b", "dev.tsv"]),
        (7, []),
    ],
)
def test_data_is_told_in_whatever_way_the_lineage_has_it(data, names):
    assert datasets(data) == names
