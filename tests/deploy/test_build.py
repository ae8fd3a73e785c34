"""docker/build.sh without a builder: which artifact goes into which image, and what is said of it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from app.settings import Settings
from model.package import file_entry
from tests import onnx_models
from tests.process import ROOT
from tests.text_model import NAME, VERSION, text_model


def build(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What it would run, with a builder that is always there."""
    environment = {**os.environ, "DRY_RUN": "1", "BUILDER": "true"}
    command = ["sh", str(ROOT / "docker/build.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_the_artifact_that_was_named_goes_in_and_the_image_says_which_it_is(kind):
    done = build(kind, "x:1", text_model())
    assert done.returncode == 0, done.stderr
    digest = file_entry(text_model() / MANIFEST).sha256
    assert f"--build-context model={text_model()} " in done.stdout
    for name, value in (("NAME", NAME), ("VERSION", VERSION), ("DIGEST", digest)):
        assert f"--build-arg MODEL_{name}={value} " in done.stdout


def test_a_folder_is_looked_for_where_the_command_is_run():
    done = build("cpu", "x:1", NAME, cwd=text_model().parent)
    assert f"--build-context model={text_model()} " in done.stdout


@pytest.mark.parametrize(("precision", "noted"), [("fp16", False), ("bf16", False), ("fp32", True), ("int8", True)])
def test_a_gpu_image_gets_what_it_is_given_and_the_build_says_when_fp16_would_be_faster(package, precision, noted):
    folder = package(onnx_models.mlp)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": precision}))
    done = build("gpu", "x:1", folder)
    assert f"--build-context model={folder} " in done.stdout
    assert (f"its precision is {precision}" in done.stderr) == noted
    assert build("cpu", "x:1", folder).stderr == ""


@pytest.mark.parametrize("kind", ["fetch", "train"])
def test_the_images_of_tools_take_no_artifact(kind):
    done = build(kind, "x:1")
    assert done.returncode == 0, done.stderr
    assert "model=" not in done.stdout


@pytest.mark.parametrize("folder", [(), ("",), (".",), ("/nowhere",)])
def test_a_folder_that_is_no_artifact_is_one_line_that_says_so(tmp_path, folder):
    done = build("cpu", "x:1", *folder, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "expected an artifact" in line


@pytest.mark.parametrize("target", ["image-cpu", "image-gpu", "release"])
def test_make_takes_the_artifact_that_is_named_else_the_one_that_is_served_by_default(target):
    def lines(*arguments: str) -> str:
        command = ["make", "--dry-run", "--assume-old=.venv/cpu", target, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert f'"{Settings.model_fields["model_dir"].default}"' in lines()
    assert '"../mine"' in lines("MODEL=../mine")
