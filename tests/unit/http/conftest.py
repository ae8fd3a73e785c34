"""The text model, loaded once for all tests here."""

import pytest

from app.runtime.loading import load_model
from app.runtime.session import Model
from tests.text_model import text_model


@pytest.fixture(scope="package")
def reviews() -> Model:
    return load_model(text_model())
