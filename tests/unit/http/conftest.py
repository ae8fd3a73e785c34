"""The bundled model."""

import pytest

from app.runtime.loading import load_model
from app.runtime.session import Model
from tests.process import BUNDLED


@pytest.fixture(scope="package")
def bundled() -> Model:
    return load_model(BUNDLED)
