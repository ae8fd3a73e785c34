"""docker/build.sh without a builder: which artifact goes into which image, and what is said of it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from app.settings import Settings
from model.package import file_entry
from model.release import read
from tests import onnx_models
from tests.process import ROOT
from tests.text_model import NAME, VERSION, text_model

DIGEST = "sha256:" + "0123456789abcdef" * 4
OWN_BASE = {"BUILD_FLAGS": "--build-arg BASE=x"}


def run(script: Path, *arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=False)


def build(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """What it would run, with a builder that is always there, on a base of one's own."""
    given = {"DRY_RUN": "1", "BUILDER": "true", **OWN_BASE, **variables}
    return run(ROOT / "docker" / "build.sh", *arguments, cwd=cwd, **given)


def with_program(folder: Path, name: str, text: str) -> str:
    """A PATH on which this shell script comes first."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / name).write_text(f"#!/bin/sh\n{text}\n")
    (tools / name).chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A copy of the folder, beside what its scripts read: they write to it."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text('__version__ = "9.9"')
    copy = Path(shutil.copytree(ROOT / "docker", tmp_path / "docker"))
    # Without what pip says of this machine, which takes pip longest.
    (copy / "pip-conf.sh").write_text("")
    return copy


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


def test_a_model_s_image_is_called_by_version_and_digest_and_has_nothing_but_the_model():
    done = build("model", "localhost:5000/mine-model", text_model(), BUILD_FLAGS="")
    digest = file_entry(text_model() / MANIFEST).sha256
    assert f"--tag localhost:5000/mine-model:{VERSION}-{digest[:12]} " in done.stdout
    assert f"--build-context model={text_model()} " in done.stdout
    assert not [word for word in ("BASE", "EXTRAS", "--secret") if word in done.stdout]
    assert done.stderr == ""


def test_a_base_is_named_by_its_digest_and_the_build_says_so_when_there_is_none(docker):
    def built() -> subprocess.CompletedProcess[str]:
        return run(docker / "build.sh", "fetch", "x:1", DRY_RUN="1", BUILDER="true", BUILD_FLAGS="")

    bases = (docker / "bases.env").read_text()
    tag = next(line.partition("=")[2] for line in bases.splitlines() if line.startswith("PYTHON_BASE="))
    (docker / "bases.env").write_text(f"PYTHON_BASE={tag}\nPYTHON_BASE_DIGEST=\n")
    done = built()
    assert f"BASE={tag} " in done.stdout
    (line,) = done.stderr.splitlines()
    assert f"no digest for {tag}" in line
    (docker / "bases.env").write_text(f"PYTHON_BASE={tag}\nPYTHON_BASE_DIGEST={DIGEST}\n")
    done = built()
    assert f"BASE={tag}@{DIGEST} " in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("answer", [DIGEST, "unauthorized", ""])
def test_the_base_s_digest_is_what_the_registry_says_if_that_is_one(docker, answer):
    path = with_program(docker.parent, "docker", f"[ \"$2\" = version ] || echo '{answer}'")
    before = (docker / "bases.env").read_text()
    done = run(docker / "base-digests.sh", PATH=path)
    after = (docker / "bases.env").read_text()
    if answer == DIGEST:
        assert (done.returncode, done.stderr) == (0, "")
        assert f"PYTHON_BASE_DIGEST={DIGEST}\n" in after
        assert after.replace(DIGEST, "") == before
    else:
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert after == before


def test_every_file_of_an_image_has_the_same_time_whenever_it_is_built():
    assert " --timestamp 0 " in build("cpu", "x:1", text_model()).stdout
    assert " --timestamp 7 " in build("cpu", "x:1", text_model(), SOURCE_DATE_EPOCH="7").stdout


def test_docker_gives_files_their_time_when_it_pushes(docker):
    given = {"PATH": with_program(docker.parent, "docker", ""), "BUILDER": "docker", "DRY_RUN": "1", **OWN_BASE}
    pushed = run(docker / "build.sh", "fetch", "x:1", PUSH="1", RECORD="FETCH_IMAGE", **given).stdout
    assert " --build-arg SOURCE_DATE_EPOCH=0 " in pushed
    assert " --output type=registry,rewrite-timestamp=true " in pushed
    assert "--timestamp" not in pushed
    assert "--output" not in run(docker / "build.sh", "fetch", "x:1", **given).stdout


def test_with_a_bom_the_image_is_built_looked_through_and_labelled_before_it_is_pushed(docker):
    bom = docker.parent / "cpu.cdx.json"
    bom.write_text("{}")
    given = {"PATH": with_program(docker.parent, "docker", ""), "BUILDER": "docker", "DRY_RUN": "1", **OWN_BASE}
    done = run(docker / "build.sh", "fetch", "x:1", SBOM=str(bom), PUSH="1", RECORD="FETCH_IMAGE", **given)
    assert done.returncode == 0, done.stderr
    first, saved, looked, second = done.stdout.splitlines()
    assert "--output" not in first
    assert saved.startswith("docker save --output ")
    assert looked.endswith(f"docker/image_sbom.py {saved.split()[3]} {bom}")
    assert f"--label sentiment-inference.sbom.digest={file_entry(bom).sha256} " in second
    assert second.startswith(first[: first.index(" --build-arg VERSION")])
    assert " --output type=registry" in second


def test_a_bom_is_of_one_image():
    done = build("fetch", "x:1", SBOM="sbom/fetch.cdx.json", PLATFORM="linux/amd64,linux/arm64")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "expected one PLATFORM, found linux/amd64,linux/arm64" in line


@pytest.mark.parametrize(("platform", "named"), [("linux/arm64", "--tag"), ("linux/amd64,linux/arm64", "--manifest")])
def test_several_platforms_make_a_list_of_images(platform, named):
    done = build("fetch", "x:1", PLATFORM=platform, PUSH="1", RECORD="FETCH_IMAGE")
    assert f" {named} x:1 " in done.stdout
    assert f" --platform {platform} " in done.stdout
    assert (" manifest push --all " in done.stdout) == ("," in platform)


# What each does with the digest that a registry gave the image.
PUSHING = {
    "podman": '[ "$1" != push ] || cp digest "$3"',
    "docker": """while [ $# -gt 1 ]; do
        [ "$1" != --metadata-file ] || printf '{"containerimage.digest": "%s"}' "$(cat digest)" >"$2"; shift
    done""",
}


@pytest.mark.parametrize("builder", PUSHING)
def test_what_was_pushed_is_noted_by_its_digest_for_the_release(docker, builder):
    folder = docker.parent
    given = {"PATH": with_program(folder, builder, PUSHING[builder]), "BUILDER": builder, "PUSH": "1", **OWN_BASE}
    for number, kind in enumerate(["fetch", "train", "fetch"]):
        (folder / "digest").write_text(f"sha256:{number:064}")
        done = run(docker / "build.sh", kind, f"r/{kind}:1", RECORD=f"{kind.upper()}_IMAGE", **given)
        assert done.returncode == 0, done.stderr
    noted = read(folder / "artifacts" / "images.env")
    assert noted == {"FETCH_IMAGE": f"r/fetch:1@sha256:{2:064}", "TRAIN_IMAGE": f"r/train:1@sha256:{1:064}"}


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


@pytest.mark.parametrize("target", ["image-cpu", "image-gpu", "image-model", "release"])
def test_make_takes_the_artifact_that_is_named_else_the_one_that_is_served_by_default(target):
    def lines(*arguments: str) -> str:
        command = ["make", "--dry-run", "--assume-old=.venv/cpu", target, *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert f'"{Settings.model_fields["model_dir"].default}"' in lines()
    assert '"../mine"' in lines("MODEL=../mine")
