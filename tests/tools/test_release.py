"""`python -m model.release`: what is released is an artifact that passes the gate, and is written in one place."""

import json
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from model.package import file_entry
from model.release import main
from tests import onnx_models
from tests.text_model import NAME, VERSION, text_model

BEFORE = "# A comment.\nMODEL_NAME=old\nOTHER=x=y\nAPP_MODEL_DIGEST=\n"


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "release.env"
    path.write_text(BEFORE)
    return path


@pytest.fixture
def release(command, env_file):
    """Runs the command; returns its exit code."""
    return lambda folder: command(main, folder, "--to", env_file)


def test_name_version_and_digest_are_written_and_other_lines_stay(release, env_file):
    assert release(text_model()) == 0
    digest = file_entry(text_model() / MANIFEST).sha256
    assert env_file.read_text() == (
        f"# A comment.\nMODEL_NAME={NAME}\nOTHER=x=y\nAPP_MODEL_DIGEST={digest}\nMODEL_VERSION={VERSION}\n"
    )


def test_what_changed_is_printed_and_a_second_time_nothing_does(release, env_file, capsys):
    release(text_model())
    assert f"MODEL_NAME: old → {NAME}\n" in capsys.readouterr().out
    written = env_file.read_text()
    assert release(text_model()) == 0
    assert "→" not in capsys.readouterr().out
    assert env_file.read_text() == written


def test_an_artifact_that_does_not_pass_the_gate_is_not_released(release, env_file, package, capsys):
    folder = package(onnx_models.mlp)
    manifest = json.loads((folder / MANIFEST).read_text())
    # The golden outputs of one model with the weights of another.
    (folder / "model.onnx").write_bytes((package(onnx_models.image) / "model.onnx").read_bytes())
    entry = file_entry(folder / "model.onnx")
    manifest["files"]["model.onnx"] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"checksum": None}))
    assert release(folder) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert env_file.read_text() == BEFORE


@pytest.mark.parametrize("version", ["1.", "x" * 64])
def test_a_version_that_cannot_be_a_label_is_refused_in_one_line(release, env_file, package, capsys, version):
    assert release(package(onnx_models.mlp, version=version)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"model.release: version {version!r} cannot be a label")
    assert env_file.read_text() == BEFORE
