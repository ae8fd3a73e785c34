"""The manifest, read from real folders, and the paths it names."""

import hashlib
import json
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST, Manifest, ReferenceDistribution, read_artifact
from app.errors import ArtifactError

WEIGHTS = b"\x00weights\xff" * 100


def entry(content: bytes) -> dict:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def minimal() -> dict:
    """The least that a manifest of a tensor model may say."""
    return {
        "manifest_version": 1,
        "name": "model",
        "version": "1",
        "task": "tensors",
        "precision": "fp32",
        "model_file": "model.onnx",
        "files": {"model.onnx": entry(WEIGHTS), "golden.npz": entry(b"golden")},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
        "golden": {"tolerance": 0.1, "file": "golden.npz"},
    }


def write(folder: Path, manifest: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(manifest or minimal()))
    (folder / "model.onnx").write_bytes(WEIGHTS)
    (folder / "golden.npz").write_bytes(b"golden")
    return folder


def test_a_minimal_manifest_is_read(tmp_path):
    artifact = read_artifact(write(tmp_path))
    assert (artifact.manifest.name, artifact.manifest.version, artifact.manifest.batching) == ("model", "1", True)
    assert artifact.path("model.onnx").read_bytes() == WEIGHTS


def test_the_digest_is_the_sha256_of_the_manifest_and_pins_it(tmp_path):
    digest = hashlib.sha256((write(tmp_path) / MANIFEST).read_bytes()).hexdigest()
    assert read_artifact(tmp_path).digest == digest
    assert read_artifact(tmp_path, digest).digest == digest
    with (tmp_path / MANIFEST).open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=f"digest pin mismatch: expected sha256 {digest}, found"):
        read_artifact(tmp_path, digest)


@pytest.mark.parametrize("paste", [str.upper, "sha256:{}".format, lambda digest: f"SHA256:{digest.upper()}"])
def test_a_digest_pins_as_people_paste_it(tmp_path, paste):
    digest = hashlib.sha256((write(tmp_path) / MANIFEST).read_bytes()).hexdigest()
    assert read_artifact(tmp_path, paste(digest)).digest == digest
    with pytest.raises(ArtifactError, match=f"digest pin mismatch: expected sha256 {'0a' * 32}, found {digest}"):
        read_artifact(tmp_path, paste("0a" * 32))


def test_the_pin_is_checked_before_the_manifest_is_parsed(tmp_path):
    (write(tmp_path) / MANIFEST).write_text("not JSON")
    with pytest.raises(ArtifactError, match="digest pin mismatch"):
        read_artifact(tmp_path, "0" * 64)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 128])
@pytest.mark.parametrize("field", ["name", "version"])
def test_names_and_versions_fit_a_path_and_a_header(tmp_path, field, name):
    assert getattr(read_artifact(write(tmp_path, minimal() | {field: name})).manifest, field) == name


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a/b", "a\n", "\n", "a\r\nx: y", "é", "x" * 129])
@pytest.mark.parametrize("field", ["name", "version"])
def test_names_and_versions_that_do_not_fit_a_path_and_a_header_are_refused(tmp_path, field, name):
    with pytest.raises(ArtifactError, match=rf"`\$\.{field}`$"):
        read_artifact(write(tmp_path, minimal() | {field: name}))


def test_what_the_checksum_is_taken_of_is_kept_as_it_was_read(tmp_path):
    assert read_artifact(write(tmp_path)).raw == (tmp_path / MANIFEST).read_bytes()


def test_a_task_may_be_one_that_only_the_runtime_knows(tmp_path):
    assert read_artifact(write(tmp_path, minimal() | {"task": "any"})).manifest.task == "any"


def test_only_listed_files_are_handed_out(tmp_path):
    folder = write(tmp_path)
    (folder / "notes.txt").write_text("not listed")
    with pytest.raises(ArtifactError, match=r"'notes.txt'.*not listed"):
        read_artifact(folder).path("notes.txt")


@pytest.mark.parametrize("field", list(minimal()))
def test_a_field_of_the_minimal_manifest_may_not_be_left_out(tmp_path, field):
    manifest = minimal()
    del manifest[field]
    with pytest.raises(ArtifactError, match=f"missing required field `{field}`"):
        read_artifact(write(tmp_path, manifest))


def test_a_manifest_cannot_be_changed_once_read(tmp_path):
    manifest: Manifest = read_artifact(write(tmp_path)).manifest
    with pytest.raises(AttributeError):
        manifest.name = "other"  # type: ignore[misc]


def test_a_manifest_may_have_a_reference_distribution(tmp_path):
    assert read_artifact(write(tmp_path)).manifest.reference_distribution is None
    record = {"predictions": 3, "ratios": {"no": 0.333, "yes": 0.667}}
    found = read_artifact(write(tmp_path, minimal() | {"reference_distribution": record})).manifest
    assert found.reference_distribution == ReferenceDistribution(3, {"no": 0.333, "yes": 0.667})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"predictions": 3, "ratios": {"no": 0.5, "yes": 0.4}}, "ratios: expected a sum of 1, found 0.9"),
        ({"predictions": 3, "ratios": {}}, "ratios: expected a sum of 1, found 0"),
        ({"predictions": 3, "ratios": {"no": 1.5}}, r"<= 1.*reference_distribution\.ratios"),
        ({"predictions": 0, "ratios": {"no": 1}}, r">= 1.*reference_distribution\.predictions"),
        ({"ratios": {"no": 1}}, "missing required field `predictions`"),
    ],
)
def test_a_reference_distribution_that_is_none_is_refused(tmp_path, record, said):
    with pytest.raises(ArtifactError, match=said):
        read_artifact(write(tmp_path, minimal() | {"reference_distribution": record}))
