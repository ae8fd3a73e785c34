"""`make rename` gives the whole starter another name, in a copy of what is here, committed or not."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.manifests import JOBS, K8S, OVERLAYS, kustomize
from tests.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
# However somebody may have written it.
SPELT = PROJECT.replace("-", "[-_ ]")
# One as usual, and the longest there may be: no line may become too long by it.
NAMES = ("renamed-starter", "the-longest-name-that-a-starter-can-have")
FOLDERS = {"overlays": OVERLAYS, "jobs": JOBS}


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Variables of a make around these tests would reach the make within.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "GIT_"))}
    return subprocess.run(command, cwd=folder, env=clean | variables, capture_output=True, text=True, check=False)


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the files of this one, and this one's tools as its virtual environment."""
    files = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if files.returncode:
        pytest.skip("not in a git repository")
    if "-" not in PROJECT:
        pytest.skip("a name of one word may be a word of the code as well: it cannot be replaced")
    folder = tmp_path_factory.mktemp("original")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    tools = folder / ".venv"
    tools.mkdir()
    (tools / "bin").symlink_to(Path(sys.prefix) / "bin")
    for stamp in ("cpu", "dev"):
        (tools / stamp).touch()
    for arguments in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "all")):
        assert git(folder, *arguments).returncode == 0
    return folder


@pytest.fixture(scope="module", params=NAMES)
def renamed(original: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("renamed") / request.param
    shutil.copytree(original, folder, symlinks=True)
    done = run(folder, "make", "rename", f"NAME={request.param}")
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_the_old_name_is_nowhere(renamed: Path) -> None:
    found = git(renamed, "grep", "--ignore-case", "--extended-regexp", SPELT)

    assert (found.returncode, found.stdout) == (1, "")
    assert not [name for name in git(renamed, "ls-files").stdout.splitlines() if re.search(SPELT, name, re.IGNORECASE)]


def test_what_was_named_for_the_starter_is_named_anew(renamed: Path) -> None:
    folders = [renamed / "k8s" / folder / name for folder, names in FOLDERS.items() for name in names]
    objects = [each for folder in folders for each in yaml.load_all(kustomize(folder), yaml.CSafeLoader)]
    names = {each["metadata"]["name"] for each in objects}
    namespaces = {each["metadata"]["namespace"] for each in objects if "namespace" in each["metadata"]}

    assert renamed.name in names & namespaces
    assert {name for name in names | namespaces if not name.startswith(renamed.name)} == set()
    # Names of ConfigMaps may be longer.
    assert max(len(each["metadata"]["name"]) for each in objects if each["kind"] != "ConfigMap") <= 63


def test_the_style_and_the_server_are_as_before(renamed: Path) -> None:
    ruff = str(renamed / ".venv" / "bin" / "ruff")
    for command in (("check", "--no-cache", "."), ("format", "--no-cache", "--check", ".")):
        done = run(renamed, ruff, *command)
        assert done.returncode == 0, done.stdout

    started = run(renamed, sys.executable, "-m", "app", APP_PORT="none")
    assert started.returncode == 2
    assert re.match(rf"{renamed.name}: .*APP_PORT", started.stderr)


@pytest.mark.parametrize("name", ["Fraud-Scoring", "fraud_scoring", "-x", "x-", "1st", "a.b", "", "a'b", "x" * 41])
def test_a_name_that_kubernetes_would_not_take_is_refused_in_one_line(original: Path, name: str) -> None:
    refused = run(original, "make", "--silent", "rename", f"NAME={name}")

    assert refused.returncode == 2
    line, made = refused.stderr.splitlines()
    assert line.startswith(f"NAME='{name}' will not do")
    assert made.startswith("make: ***")
    assert git(original, "status", "--porcelain").stdout == ""


def test_a_change_that_is_not_committed_is_not_mixed_with_the_rename(original: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(original, folder, symlinks=True)
    (folder / "README.md").write_text("mine\n")

    refused = run(folder, "make", "--silent", "rename", "NAME=renamed-starter")

    assert refused.returncode == 2
    assert "commit or stash" in refused.stderr
    assert git(folder, "diff", "--name-only").stdout == "README.md\n"


def test_every_namespace_in_the_manifests_readme_is_one_of_the_overlays() -> None:
    overlays = [K8S / "overlays" / name / "kustomization.yaml" for name in OVERLAYS]
    namespaces = {yaml.safe_load(path.read_text())["namespace"] for path in overlays}
    named = set(re.findall(r"(?<= -n )[a-z][\w-]*", (K8S / "README.md").read_text()))

    assert named
    assert named <= namespaces
