"""`python -m model.verify`: the gate's answer as an exit code and one line."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from model.package import file_entry
from model.verify import main
from tests.process import ROOT, START_SECONDS, warning_libraries
from tests.unit.runtime.test_loading import FAILURES, Failure, good_artifacts, named


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return good_artifacts(tmp_path_factory.mktemp("good"))


@pytest.fixture
def verify(command):
    """Runs the command with arguments; returns its exit code."""
    return partial(command, main)


@pytest.mark.parametrize("failure", **named(FAILURES))
def test_a_broken_artifact_ends_it_with_one_line_on_stderr(good, tmp_path, verify, capfd, failure: Failure):
    folder = failure.apply(good, tmp_path / "artifact")
    code = verify(folder, "--digest", failure.digest, "--provider", failure.provider)
    out, err = capfd.readouterr()
    assert code == failure.exit_code
    assert out == ""
    *others, line = err.splitlines()
    assert line.startswith("model.verify: ")
    assert failure.noisy or others == []
    assert "Traceback" not in err


def test_what_libraries_warn_of_is_not_beside_the_one_line(good, tmp_path):
    folder = shutil.copytree(good["tensors"], tmp_path / "artifact")
    (folder / MANIFEST).write_text("no JSON")
    ended = subprocess.run(
        [sys.executable, "-m", "model.verify", str(folder)],
        cwd=ROOT,
        env={**os.environ, **warning_libraries(tmp_path)},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    assert line.startswith("model.verify: ")


@pytest.mark.parametrize("kind", ["text", "tensors"])
def test_a_good_artifact_is_named_with_its_digest(good, verify, capfd, kind):
    assert verify(good[kind]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert f"{'words' if kind == 'text' else 'numbers'} 1 passes on cpu" in out
    assert f"digest {file_entry(good[kind] / MANIFEST).sha256}" in out


def test_the_digest_it_prints_is_the_one_to_pin(good, verify, capfd):
    verify(good["text"])
    digest = capfd.readouterr().out.split("digest ")[1].split()[0]
    assert verify(good["text"], "--digest", digest) == 0
    assert verify(good["tensors"], "--digest", digest) == 3


@pytest.mark.parametrize("arguments", [(), ("--provider", "tpu", "folder")])
def test_wrong_arguments_are_a_usage_error(verify, capfd, arguments):
    assert verify(*arguments) == 2
    assert "usage: python -m model.verify" in capfd.readouterr().err
