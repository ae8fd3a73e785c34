"""The bundled model, if it is there; with another model in its place these tests say so and are skipped."""

import json
from pathlib import Path

import pytest

from app.artifact.manifest import MANIFEST
from app.runtime.loading import load_model
from app.runtime.session import Model
from tests.process import ROOT

FOLDER = ROOT / "model" / "sentiment"
RELEASE = ("sentiment", "1.0.0")


@pytest.fixture(scope="session", autouse=True)
def folder() -> Path:
    try:
        manifest = json.loads((FOLDER / MANIFEST).read_text())
    except FileNotFoundError:
        pytest.skip("model/sentiment is not there")
    found = manifest["name"], manifest["version"]
    if found != RELEASE:
        pytest.skip(f"model/sentiment has {' '.join(found)}, not the bundled {' '.join(RELEASE)}")
    return FOLDER


@pytest.fixture(scope="session")
def bundled(folder: Path) -> Model:
    return load_model(folder)
