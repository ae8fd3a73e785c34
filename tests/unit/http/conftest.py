"""The bundled model, and logging left as it was."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from app.runtime.loading import load_model
from app.runtime.session import Model
from tests.process import BUNDLED


@pytest.fixture(autouse=True)
def logging_left_as_it_was() -> Iterator[None]:
    """An application sets up logging for its process; this process is pytest's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture(scope="package")
def bundled() -> Model:
    return load_model(BUNDLED)
