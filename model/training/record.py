"""What a run is, and run.json beside what it made: code, data, seed, versions, parent, metrics. No times: the same run
is the same bytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

RUN_FILE = "run.json"
# An image has no repository; its build writes the commit here.
REVISION_VARIABLE = "CODE_REVISION"
LIBRARIES = ("numpy", "onnx", "onnxruntime", "safetensors", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Run:
    """All that decides the weights, but code and versions: a run whose image was renewed goes on.

    data: sha256 of each file; parent: what it starts from; processes: that share each step.
    """

    command: str
    data: Mapping[str, str]
    recipe: Mapping[str, Any]
    parent: Mapping[str, Any]
    processes: int = 1

    @property
    def fingerprint(self) -> str:
        """Of this run among all: 16 hexadecimal digits."""
        return digest_of(
            [self.command, dict(self.data), dict(self.recipe), dict(self.parent), self.processes],
        )[:16]

    def record(self, metrics: Mapping[str, Any], device: str) -> dict[str, Any]:
        """What run.json holds."""
        return {
            "run": self.fingerprint,
            "command": self.command,
            "code_revision": code_revision(),
            "data": {"sha256": digest_of(dict(self.data)), "files": dict(self.data)},
            "seed": self.recipe.get("seed"),
            "recipe": dict(self.recipe),
            "processes": self.processes,
            "device": device,
            "versions": versions(),
            "parent": dict(self.parent),
            "metrics": dict(metrics),
        }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """run.json in one step."""
    aside = folder / f".{RUN_FILE}.tmp"
    aside.write_text(json.dumps(record, indent=2) + "\n")
    aside.replace(folder / RUN_FILE)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a folder; empty if it has none."""
    path = folder / RUN_FILE
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def digest_of(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_revision() -> str:
    """The commit that runs, with `-dirty` if files differ from it; what the image says; or `unknown`."""
    if said := os.environ.get(REVISION_VARIABLE):
        return said
    if not shutil.which("git"):
        return "unknown"
    here = Path(__file__).parent
    done = [
        subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
    ]
    return done[0].stdout.strip() + ("-dirty" if done[1].stdout else "") or "unknown"


def versions() -> dict[str, str]:
    """Of Python and of each library that is installed."""
    found = {"python": python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
