"""What holds for every file: length, an opening that says what it does, plain text, hooks that run."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.artifact.manifest import MANIFEST
from tests.process import ROOT

MODULES = sorted((ROOT / "app").rglob("*.py"))
LONGEST_MODULE_LINES = 250
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
# One small file for each hook that is given files. The others read the whole tree, as `make lint` does.
FILES = {"ruff": "app/__init__.py", "ruff-format": "app/__init__.py", "shellcheck": "docker/build.sh"}
FILES |= {"hadolint": "docker/fetch.Dockerfile"}
WHOLE_TREE = {"mypy", "import-linter"}


def each_module(test):
    return pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))(test)


@each_module
def test_a_module_is_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE_LINES


@each_module
def test_a_module_opens_by_saying_what_it_does(path):
    text = path.read_text()
    assert not text or (ast.get_docstring(ast.parse(text)) or "").strip()


def test_text_is_as_the_editorconfig_says():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not in a git repository")
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        # An artifact's files are as the tools that made them left them: digests hold them.
        if not path.is_file() or not path.stat().st_size or (path.parent / MANIFEST).exists():
            continue
        text = path.read_bytes().decode()
        assert "\r" not in text, name
        if name.endswith("dashboard.json"):
            continue
        assert text.endswith("\n"), name
        assert not re.search(r"[ \t]$", text, re.MULTILINE), name


def command(hook: dict) -> list[str]:
    """As pre-commit would run it, with this interpreter's environment in the place of .venv."""
    program, *arguments = shlex.split(hook["entry"])
    found = shutil.which(program.replace(".venv", sys.prefix))
    assert found, f"{hook['id']}: {program} does not exist"
    return [found, *arguments]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_locks_that_go_into_one_image_have_one_version_of_each_package(kind):
    # pip refuses two, but only where an image is built.
    copied = set(re.findall(r"docker/requirements-[a-z]+\.txt", (ROOT / "docker" / f"{kind}.Dockerfile").read_text()))
    pins = {}
    for path in copied:
        for name, version in re.findall(r"^([\w.-]+)==(\S+)", (ROOT / path).read_text(), re.MULTILINE):
            pins.setdefault(name, set()).add(version)

    assert f"docker/requirements-{kind}.txt" in copied
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_runs_what_is_installed_and_downloads_nothing(hook):
    assert hook["language"] == "system"
    if hook["id"] == "kustomize" and not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    takes_files = hook.get("pass_filenames", True)
    assert takes_files == (hook["id"] in FILES)
    arguments = ["--help"] if hook["id"] in WHOLE_TREE else [FILES[hook["id"]]] if takes_files else []

    done = subprocess.run([*command(hook), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hooks_are_the_linters_of_make_lint_and_the_manifests():
    recipe = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    linters = set(re.findall(r"\$\(BIN\)/([\w-]+)", recipe))

    assert {Path(shlex.split(hook["entry"])[0]).name for hook in HOOKS} == linters | {"sh"}
