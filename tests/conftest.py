"""Fixtures shared by modules: packaged artifacts and a running server."""

import csv
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from model.package import package_tensors
from tests.process import ServerProcess
from tests.redis_server import RedisServer

Build = Callable[[Path], Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--live-within-seconds", type=float, default=60, help="/live's slowest answer to a hostile client")
    parser.addoption("--corruptions", type=int, default=60, help="times that a signed artifact is corrupted")
    parser.addoption("--jobs", type=int, default=200, help="jobs that are answered while workers are killed")
    parser.addoption("--scoring-kills", type=int, default=3, help="times that a run of app.scoring is killed")
    parser.addoption("--soak-requests", type=int, default=2000, help="requests that the soak test sends")
    parser.addoption("--overload-seconds", type=float, default=4, help="seconds of the test at five times capacity")


@pytest.fixture(autouse=True)
def logging_left_as_it_was() -> Iterator[None]:
    """An application sets up logging for its process; this process is pytest's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def csv_limit_left_as_it_was() -> Iterator[None]:
    """A run of app.scoring sets it for its process."""
    limit = csv.field_size_limit()
    yield
    csv.field_size_limit(limit)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Build], Path]:
    """Builds a model with a function of tests.onnx_models and packages it: `package(onnx_models.mlp)` → its folder."""

    def make(build: Build, name: str = "test-model", version: str = "7") -> Path:
        root = tmp_path_factory.mktemp("artifact")
        folder = root / "artifact"
        folder.mkdir()
        source = build(root / "source.onnx")
        package_tensors(source, folder, name=name, version=version, inputs=None, size=8, tolerance=1e-4)
        return folder

    return make


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The server with the text model, ready, shared by one module's tests. It refuses nothing for being late, so
    that no test depends on how busy the machine is."""
    with ServerProcess(max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Runs a command's `main` as its command line does; returns its exit code."""

    def run(main: Callable[[], None], *arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    return run
