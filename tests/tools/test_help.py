"""Every command says what it does, with an example that its own parser takes."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.process import ROOT

COMMANDS = (
    "model.package",
    "model.verify",
    "model.sign",
    "model.bom",
    "model.compare",
    "model.fetch",
    "model.release",
    "loadtest.capacity",
    "loadtest.simulate",
    "loadtest.benchmark",
    "loadtest.benchmark.alone",
    "loadtest.benchmark.budget",
    "loadtest.benchmark.ceiling",
    "loadtest.benchmark.gpu_check",
    "loadtest.benchmark.over_grpc",
)


def ask(command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does_and_ends_with_an_example_of_its_own_options(command):
    usage, _, example = ask(command).rpartition(f"python -m {command} ")
    assert re.search(r"examples?:", usage), "no example"
    described = usage.split("]")[-1] if "positional" not in usage else usage.partition("positional arguments")[0]
    assert len(re.findall(r"\w+", described)) > 10
    options = {word for word in shlex.split(example) if word.startswith("--")}
    assert options <= set(re.findall(r"--[\w-]+", usage))
