"""`python -m model.release`: what is released is an artifact that passes the gate, and is written in one place."""

import json
import re
from pathlib import Path

import pytest

from app import __version__
from app.artifact.manifest import MANIFEST
from model.package import file_entry
from model.release import main, read, retagged
from tests import onnx_models
from tests.text_model import NAME, VERSION, text_model

OLD_DIGEST = f"sha256:{1:064}"
BEFORE = f"""# A comment.
SERVER_VERSION=0.0.9
SERVER_ARCH=amd64
SERVER_IMAGE=r:5000/server:0.0.9@{OLD_DIGEST}
FETCH_IMAGE=fetch:{__version__}@{OLD_DIGEST}
MODEL_NAME=old
MODEL_VERSION=1
MODEL_DIGEST=
MODEL_IMAGE=model:1-000000000000

GPU_SERVER_VERSION=0.0.9
GPU_SERVER_IMAGE=server-gpu:0.0.9
GPU_MODEL_NAME=old
GPU_MODEL_VERSION=1
GPU_MODEL_DIGEST=
GPU_MODEL_IMAGE=model:1-000000000000

CANARY_SERVER_VERSION=0.0.9
CANARY_SERVER_IMAGE=candidate:0.0.9
CANARY_MODEL_NAME=another
CANARY_MODEL_VERSION=2
CANARY_MODEL_DIGEST=
CANARY_MODEL_IMAGE=candidate-model:2-000000000000
"""
DIGEST = file_entry(text_model() / MANIFEST).sha256
MODEL_TAG = f"{VERSION}-{DIGEST[:12]}"
IDENTITY = {"SERVER_VERSION": __version__, "MODEL_NAME": NAME, "MODEL_VERSION": VERSION, "MODEL_DIGEST": DIGEST}
IMAGES = {"SERVER_IMAGE": f"r:5000/server:{__version__}", "MODEL_IMAGE": f"model:{MODEL_TAG}"}
OF_GPU = {"GPU_SERVER_IMAGE": f"server-gpu:{__version__}", "GPU_MODEL_IMAGE": f"model:{MODEL_TAG}"}


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    path = tmp_path / "release.env"
    path.write_text(BEFORE)
    return path


@pytest.fixture
def release(command, env_file):
    """Runs the command; returns its exit code."""
    return lambda folder, *options: command(main, folder, "--to", env_file, *options)


def changed(env_file: Path) -> dict[str, str]:
    before = dict(re.findall(r"^([A-Z_]+)=(.*)$", BEFORE, re.MULTILINE))
    return dict(read(env_file).items() - before.items())


def for_pool(prefix: str) -> dict[str, str]:
    return {prefix + name: value for name, value in IDENTITY.items()}


def test_server_and_model_are_written_and_who_had_the_same_goes_with_them(release, env_file):
    assert release(text_model()) == 0
    # An image of this version keeps its digest, and the candidate what it has.
    assert changed(env_file) == for_pool("") | IMAGES | for_pool("GPU_") | OF_GPU
    assert re.findall("^#.*|^$", env_file.read_text(), re.MULTILINE) == re.findall("^#.*|^$", BEFORE, re.MULTILINE)


def test_one_pool_s_lines_can_be_written_alone(release, env_file, capsys):
    assert release(text_model(), "--for", "gpu") == 0
    assert changed(env_file) == for_pool("GPU_") | OF_GPU
    assert release(text_model(), "--for", "canary") == 0
    assert read(env_file)["CANARY_MODEL_IMAGE"] == f"candidate-model:{MODEL_TAG}"
    assert read(env_file)["MODEL_NAME"] == "old"
    capsys.readouterr()
    # What GPUs have is not the same as the rest any more.
    assert release(text_model()) == 0
    assert "gpu keeps what it has" in capsys.readouterr().out


def test_images_that_were_pushed_are_released_by_digest(release, env_file, tmp_path):
    names = ("SERVER_IMAGE", "GPU_SERVER_IMAGE", "MODEL_IMAGE")
    pushed = {name: f"r/{name.lower()}:1@{OLD_DIGEST}" for name in names}
    images = tmp_path / "images.env"
    images.write_text("".join(f"{name}={value}\n" for name, value in pushed.items()))
    assert release(text_model(), "--images", images) == 0
    found = read(env_file)
    assert {name: found[name] for name in names} == pushed
    assert found["GPU_MODEL_IMAGE"] == pushed["MODEL_IMAGE"]
    assert found["CANARY_SERVER_IMAGE"] == "candidate:0.0.9"
    assert release(text_model(), "--images", images, "--for", "canary") == 0
    assert read(env_file)["CANARY_SERVER_IMAGE"] == pushed["SERVER_IMAGE"]


def test_an_image_by_digest_that_stays_although_the_model_changes_is_pointed_at(release, env_file, capsys):
    env_file.write_text(BEFORE.replace("server:0.0.9@", f"server:{__version__}@"))
    assert release(text_model()) == 0
    assert "\nSERVER_IMAGE is the image of before" in capsys.readouterr().out
    assert release(text_model()) == 0
    assert "of before" not in capsys.readouterr().out


def test_an_image_that_is_none_of_the_release_s_is_one_line(release, env_file, tmp_path, capsys):
    (tmp_path / "images.env").write_text("SERVERIMAGE=x\n")
    assert release(text_model(), "--images", tmp_path / "images.env") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("model.release: SERVERIMAGE is no image of the release: expected one of SERVER_IMAGE, ")
    assert env_file.read_text() == BEFORE


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("name", "name:2"),
        ("name:1", "name:2"),
        ("name:2@sha256:1", "name:2@sha256:1"),
        ("name:1@sha256:1", "name:2"),
        ("name@sha256:1", "name:2"),
        ("host:5000/name", "host:5000/name:2"),
        ("host:5000/name:1", "host:5000/name:2"),
    ],
)
def test_a_digest_goes_with_the_tag_it_was_pushed_with(image, expected):
    assert retagged(image, "2") == expected


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
