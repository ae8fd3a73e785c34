"""The smoke test's Job, as kustomize builds it: its command, files and variables, run here against real servers."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from loadtest.benchmark.server import free_port
from tests import onnx_models, task_models
from tests.manifests import Object, Variation, containers_of, environment, of_kind, pods
from tests.process import ServerProcess

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return Variation("jobs/smoke").objects()


@pytest.fixture
def run(objects: list[Object], tmp_path: Path) -> Run:
    """Its container here, with these options in the place of its own."""
    (template,) = pods(objects)
    (container,) = containers_of(template)
    volumes = {each["name"]: each["configMap"]["name"] for each in template["spec"]["volumes"]}
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "ConfigMap")}

    def here(text: str) -> str:
        return text.replace("/opt", str(tmp_path / "opt"))

    for mount in container["volumeMounts"]:
        folder = Path(here(mount["mountPath"]))
        folder.mkdir(parents=True)
        for name, text in maps[volumes[mount["name"]]].items():
            (folder / name).write_text(text)

    def start(url: str, **options: str) -> "subprocess.CompletedProcess[str]":
        variables = {name: here(value) for name, value in environment(container, objects).items()}
        changed = {"url": url, "patience_seconds": "0"} | options
        changed = {f"SMOKE_{name.upper()}": value for name, value in changed.items()}
        assert changed.keys() <= variables.keys()
        # Without site-packages: Python is all that it asks of its image.
        command = [sys.executable, "-S", *map(here, container["command"][1:])]
        env = {"PATH": os.environ["PATH"], **variables, **changed}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    return start


def failure(done: "subprocess.CompletedProcess[str]") -> str:
    """Its one line."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("smoke test failed: ")
    return line


def test_a_text_model_is_asked_by_both_ways_in_and_named(
    run: Run, server: ServerProcess, objects: list[Object]
) -> None:
    (options,) = [each["data"] for each in of_kind(objects, "ConfigMap") if "SMOKE_TEXT" in each["data"]]
    answer = httpx.post(f"{server.url}/predict", json={"text": options["SMOKE_TEXT"]})
    label, model = answer.json()["label"], answer.headers["x-model"]

    done = run(server.url, model=model, label=label, patience_seconds="60")

    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"smoke test passed: {model} at {server.url}: {label} ")


def test_another_label_or_model_than_expected_is_one_line_and_exit_code_1(run: Run, server: ServerProcess) -> None:
    assert "not sarcastic" in failure(run(server.url, label="sarcastic"))
    assert "not other/2" in failure(run(server.url, model="other/2"))


def test_what_does_not_answer_is_one_line_and_exit_code_1(run: Run) -> None:
    assert "refused" in failure(run(f"http://127.0.0.1:{free_port()}"))
    assert "not ready within 0 s" in failure(run("http://no-such-service.invalid:8000"))


def test_what_is_no_server_of_http_is_one_line_and_exit_code_1(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def speak() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"220 mail.example.com\r\n")
                connection.recv(65536)

        speaking = threading.Thread(target=speak, daemon=True)
        speaking.start()
        assert "did not answer" in failure(run(f"http://127.0.0.1:{listening.getsockname()[1]}"))
        speaking.join()


@pytest.mark.parametrize(
    "build", [task_models.multi_label, task_models.embedding, task_models.pair], ids=lambda build: build.__name__
)
def test_a_model_of_another_task_is_asked_over_the_protocol(
    run: Run, build: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with ServerProcess(build(folder)).ready() as server:
        done = run(server.url)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_of_tensors_is_asked_over_the_protocol(run: Run, package: Callable[..., Path]) -> None:
    with ServerProcess(package(onnx_models.mlp)).ready() as server:
        done = run(server.url, model="test-model/7")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("smoke test passed: test-model/7 at ")
