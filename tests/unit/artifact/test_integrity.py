"""Files and manifests that are not what was packaged, in real folders."""

import hashlib
import json
from pathlib import Path

import pytest

from app.artifact.integrity import checksum_of, verify_files, verify_manifest
from app.artifact.manifest import MANIFEST, Artifact, read_artifact
from app.errors import ArtifactError
from tests.unit.artifact.test_manifest import entry, minimal, write


def test_the_files_of_a_minimal_manifest_are_proven(tmp_path):
    verify_files(read_artifact(write(tmp_path)))


def test_a_file_in_a_subfolder_belongs_to_the_artifact(tmp_path):
    manifest = minimal()
    manifest["files"]["weights/part.bin"] = entry(b"part")
    folder = write(tmp_path, manifest)
    (folder / "weights").mkdir()
    (folder / "weights/part.bin").write_bytes(b"part")
    verify_files(read_artifact(folder))


def test_the_folder_itself_may_be_a_link(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    verify_files(read_artifact(tmp_path / "link"))


def test_links_that_stay_inside_are_followed_as_kubernetes_mounts_them(tmp_path):
    write(tmp_path / "volume")
    hidden = tmp_path / "volume" / "..2026_01_01"
    hidden.mkdir()
    for name in (MANIFEST, "model.onnx", "golden.npz"):
        (tmp_path / "volume" / name).rename(hidden / name)
        (tmp_path / "volume" / name).symlink_to(f"..data/{name}")
    (tmp_path / "volume" / "..data").symlink_to(hidden.name)
    verify_files(read_artifact(tmp_path / "volume"))


def test_a_link_that_comes_to_lead_out_after_reading_is_refused_when_verified(tmp_path):
    folder = write(tmp_path / "artifact")
    artifact = read_artifact(folder)
    (folder / "model.onnx").rename(tmp_path / "outside.onnx")
    (folder / "model.onnx").symlink_to(tmp_path / "outside.onnx")
    with pytest.raises(ArtifactError, match="leaves the artifact folder"):
        verify_files(artifact)


def test_a_file_larger_than_one_chunk_is_checked_to_its_end(tmp_path):
    content = bytearray((3 << 20) + 17)
    manifest = minimal()
    manifest["files"]["model.onnx"] = entry(bytes(content))
    folder = write(tmp_path, manifest)
    (folder / "model.onnx").write_bytes(content)
    artifact = read_artifact(folder)
    verify_files(artifact)
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx: sha256 mismatch"):
        verify_files(artifact)


def test_a_file_of_another_size_is_named_with_both(tmp_path):
    artifact = read_artifact(write(tmp_path))
    (tmp_path / "golden.npz").write_bytes(b"gold")
    with pytest.raises(ArtifactError, match=r"golden\.npz: size mismatch: expected 6 bytes, found 4"):
        verify_files(artifact)


def sealed(folder: Path) -> Artifact:
    """An artifact whose manifest has its own checksum."""
    digits = "0" * 64
    write(folder, minimal() | {"checksum": digits})
    raw = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(raw.replace(digits.encode(), checksum_of(raw, digits).encode()))
    return read_artifact(folder)


def test_a_checksum_is_that_of_the_manifest_without_its_digits():
    assert checksum_of(b'{"checksum":"abc"}', "abc") == hashlib.sha256(b'{"checksum":""}').hexdigest()


def test_a_manifest_as_it_was_written_passes(tmp_path):
    verify_manifest(sealed(tmp_path))


def test_a_manifest_that_was_edited_does_not_pass_and_says_what_to_do(tmp_path):
    expected = sealed(tmp_path).manifest.checksum
    (tmp_path / MANIFEST).write_text((tmp_path / MANIFEST).read_text().replace("fp32", "fp16"))
    with pytest.raises(
        ArtifactError, match=rf"{MANIFEST}: checksum: expected {expected}, found .* take `checksum` out"
    ):
        verify_manifest(read_artifact(tmp_path))


def test_a_manifest_without_a_checksum_may_be_edited(tmp_path):
    manifest = json.loads(sealed(tmp_path).raw) | {"version": "2"}
    del manifest["checksum"]
    verify_manifest(read_artifact(write(tmp_path, manifest)))
