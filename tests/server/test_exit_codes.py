"""The process: how it ends when it cannot serve, and what it leaves behind for an operator to read."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from app import lifecycle
from app.artifact.manifest import MANIFEST
from app.errors import StartupError
from app.main import create_app
from app.settings import Settings
from tests.process import ROOT, START_SECONDS, ServerProcess, warning_libraries
from tests.signing import KEY, REFUSALS, Refusal, public_file, signed_copy
from tests.signing import named as named_refusals
from tests.unit.runtime.test_loading import FAILURES, Failure, good_artifacts, named

# One of each kind: the rest goes through the same gate in test_gate and test_verify.
REPRESENTATIVE = {
    "missing folder",
    "manifest is not JSON",
    "unknown version",
    "one bit of model.onnx at 0",
    "model.onnx is cut to 0.5",
    "path leaves by ..",
    "link to itself",
    "digest pin mismatch",
    "model is not ONNX",
    "input dtype",
    "too many labels",
    "tokenizer is not JSON",
    "tokenizer panics",
    "text answers otherwise",
    "CUDA is not here",
}
# Of those that tests.signing has.
UNSIGNED = {"no signature", "another key", "changed file", "missing file", "extra file", "no JSON", "payload type"}
CHOSEN = [failure for failure in FAILURES if failure.what in REPRESENTATIVE]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    return good_artifacts(tmp_path_factory.mktemp("good"))


def ready_statuses(server: ServerProcess) -> set[int]:
    """What /ready answers until the process ends. One that does not end by itself is killed."""
    statuses: set[int] = set()
    port = None
    give_up = time.monotonic() + 20
    with httpx.Client(timeout=2) as client:
        while server.process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.02)
            if port is None:
                port = next((line["port"] for line in server.logs() if line.get("event") == "listening"), None)
                continue
            with suppress(httpx.TransportError):
                statuses.add(client.get(f"http://127.0.0.1:{port}/ready").status_code)
    if server.process.poll() is None:
        server.process.kill()
    return statuses


def only_line(errors: str) -> str:
    """The one line on stderr."""
    assert "Traceback" not in errors
    (line,) = errors.splitlines()
    assert line.startswith("sentiment-inference: ")
    return line


def test_every_kind_of_failure_is_represented():
    assert {failure.what for failure in CHOSEN} == REPRESENTATIVE


@pytest.mark.parametrize("failure", **named(CHOSEN))
def test_a_model_that_cannot_be_served_ends_the_process_before_it_is_ever_ready(good, tmp_path, failure: Failure):
    folder = failure.apply(good, tmp_path / "artifact")
    with ServerProcess(folder, model_digest=failure.digest, provider=failure.provider) as server:
        statuses = ready_statuses(server)
        assert statuses <= {503}
        assert server.wait() == failure.exit_code, server.output()
        *others, line = server.errors().splitlines()
        assert failure.noisy or others == []
        assert "Traceback" not in server.errors()
        assert line.startswith("sentiment-inference: ")
        assert [part for part in failure.says if part not in line] == []
        # Standard output is log lines and nothing else.
        assert len(server.logs()) == len(server.output().splitlines())


@pytest.mark.parametrize("refusal", **named_refusals([each for each in REFUSALS if each.what in UNSIGNED]))
def test_a_model_that_none_of_the_keys_signed_as_it_is_ends_the_process_too(good, tmp_path, refusal: Refusal):
    folder = signed_copy(good["tensors"], tmp_path / "artifact")
    refusal.damage(folder)
    with ServerProcess(folder, model_public_key=public_file(tmp_path, KEY)) as server:
        assert server.wait() == 3, server.output()
        assert refusal.says in only_line(server.errors())
        assert [line for line in server.logs() if line["event"] == "ready"] == []


def test_a_model_that_one_of_the_keys_signed_is_served(good, tmp_path):
    folder = signed_copy(good["tensors"], tmp_path / "artifact")
    with ServerProcess(folder, model_public_key=public_file(tmp_path, KEY)) as server:
        assert server.ready().metric("model_load_seconds", stage="signature") > 0


def test_what_libraries_warn_of_goes_to_the_log_and_not_beside_the_one_line(good, tmp_path):
    folder = shutil.copytree(good["tensors"], tmp_path / "artifact")
    (folder / MANIFEST).write_text("no JSON")
    with ServerProcess(folder, environment=warning_libraries(tmp_path)) as server:
        assert server.wait() == 3
        assert MANIFEST in only_line(server.errors())
        warned = [line for line in server.logs() if "a library is at work" in line["event"]]
        assert [line["level"] for line in warned] == ["warning"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"port": "http"}, "APP_PORT='http'"),
        ({"model_digest": "latest"}, "APP_MODEL_DIGEST='latest'"),
    ],
    ids=["port", "digest"],
)
def test_a_bad_setting_is_exit_code_2_and_one_line(settings, says):
    with ServerProcess(**settings) as server:
        assert server.wait() == 2
        assert says in only_line(server.errors())
        assert server.output() == ""


def test_a_port_in_use_is_exit_code_2_and_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with ServerProcess(port=port) as server:
            assert server.wait() == 2
            assert f"APP_PORT={port}" in only_line(server.errors())


def test_a_host_that_is_not_this_machines_is_exit_code_2_and_one_line():
    with ServerProcess(host="203.0.113.1") as server:
        assert server.wait() == 2
        assert "APP_HOST='203.0.113.1'" in only_line(server.errors())


def test_a_host_that_no_name_can_be_is_exit_code_2_and_one_line():
    with ServerProcess(host="\udcff") as server:
        assert server.wait() == 2
        assert "APP_HOST='\\udcff'" in only_line(server.errors())


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_clean_stop(good, stop):
    with ServerProcess(good["tensors"]) as server:
        server.ready()
        server.process.send_signal(stop)
        assert server.wait() == 0
        assert server.errors() == ""


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"APP_MODEL_DIR": "/nowhere/at/all"}, 3, "/nowhere/at/all: model folder not found"),
        ({"APP_RUNNERS": "none"}, 2, "APP_RUNNERS='none'"),
    ],
    ids=["artifact", "setting"],
)
def test_the_exit_code_survives_another_way_of_serving(settings, code, says):
    ended = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "APP_PROVIDER": "cpu", **settings},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert ended.returncode == code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


SERVE_WITH_DEPENDENCIES = """
import uvicorn
from fastapi import Depends
from app.main import create_app
app = create_app()
app.router.dependencies.append(Depends(lambda: None))
uvicorn.run(app, port=0, log_config=None)
"""


def test_dependencies_that_inference_would_not_have_are_exit_code_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, "-c", SERVE_WITH_DEPENDENCIES],
        cwd=ROOT,
        env={**os.environ, "APP_PROVIDER": "cpu"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert ended.returncode == 2
    line = only_line(ended.stderr)
    assert "dependencies" in line
    assert "add_middleware" in line


SERVE_WITH_LOG = """
import sys
from pathlib import Path
import app.lifecycle
import app.main
app.lifecycle.TERMINATION_LOG = Path(sys.argv[1])
app.main.main()
"""


def end_with_log(log: Path, model_dir: str = "/nowhere") -> subprocess.CompletedProcess[str]:
    """The server with a model that is not there, and a termination log at `log`."""
    return subprocess.run(
        [sys.executable, "-c", SERVE_WITH_LOG, str(log)],
        cwd=ROOT,
        env={**os.environ, "APP_MODEL_DIR": model_dir, "APP_HOST": "127.0.0.1", "APP_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )


def test_the_reason_goes_to_the_termination_log_too(tmp_path):
    log = tmp_path / "termination-log"
    log.write_text("")
    ended = end_with_log(log)
    assert ended.returncode == 3
    assert log.read_text().splitlines() == [only_line(ended.stderr)]


def test_a_reason_that_is_no_utf8_ends_the_process_all_the_same(tmp_path):
    log = tmp_path / "termination-log"
    log.write_text("")
    ended = end_with_log(log, "/nowhere\udcff")
    assert ended.returncode == 3
    assert log.read_text() == only_line(ended.stderr)


def test_no_termination_log_is_made_where_there_is_none(tmp_path):
    assert end_with_log(tmp_path / "termination-log").returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_a_termination_log_that_cannot_be_written_changes_nothing_else(tmp_path):
    ended = end_with_log(tmp_path)
    assert ended.returncode == 3
    assert "/nowhere" in only_line(ended.stderr)


def test_the_termination_log_is_where_kubernetes_reads_it():
    assert Path("/dev/termination-log") == lifecycle.TERMINATION_LOG


async def reason_of_the_end(folder: Path) -> StartupError:
    """Why a service with this model cannot serve."""
    reasons: list[StartupError] = []
    ended = asyncio.Event()

    def on_fatal(reason: StartupError) -> None:
        reasons.append(reason)
        ended.set()

    service = create_app(Settings(model_dir=folder, provider="cpu", log_level="error"), on_fatal)
    async with service.router.lifespan_context(service):
        # A service that does not notice would wait for ever.
        async with asyncio.timeout(10):
            await ended.wait()
    (reason,) = reasons
    return reason


async def test_a_gate_that_fails_in_a_way_nobody_foresaw_ends_the_process_too(monkeypatch, good):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("nobody\nforesaw this")

    monkeypatch.setattr("app.lifecycle.load_configured", fail)
    reason = await reason_of_the_end(good["tensors"])
    assert isinstance(reason, StartupError)
    assert "\n" not in str(reason)


async def test_more_runners_than_threads_can_be_had_is_a_bad_setting(monkeypatch, good):
    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("app.batching.batcher.Batcher.start", start)
    reason = await reason_of_the_end(good["tensors"])
    assert reason.exit_code == 2
    assert "APP_RUNNERS=auto" in str(reason)
