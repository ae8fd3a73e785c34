"""`--engine ray` on a real cluster of two node processes: `make test-ray`, in an environment that has Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.texts import sentences
from tests.process import ROOT, START_SECONDS, free_port
from tests.text_model import text_model

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
RAY = Path(sys.executable).parent / "ray"
ROWS, SHARD_ROWS = 2000, 100
# Ray's processes start slowly, and one that is lost is noticed late.
SECONDS = 5 * START_SECONDS


class Node:
    """One node's processes, which end with it. Each has one CPU, so that each has one actor."""

    def __init__(self, *arguments: object) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in kill
        command = [RAY, "start", "--block", "--num-cpus", 1, "--disable-usage-stats", *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self._log, stderr=self._log, start_new_session=True
        )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(SECONDS)
        self._log.close()


@pytest.fixture
def cluster() -> Iterator[tuple[str, list[Node]]]:
    """Its address, and its nodes."""
    # A socket's path has at most 107 characters.
    folder, port = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port()
    address = f"127.0.0.1:{port}"
    head = ("--head", "--port", port, "--include-dashboard=false", "--temp-dir", folder, "--node-ip-address=127.0.0.1")
    nodes = [Node(*head)]
    try:
        await_nodes(address, 1)
        nodes.append(Node("--address", address, "--node-ip-address=127.0.0.1"))
        await_nodes(address, 2)
        yield address, nodes
    finally:
        for node in reversed(nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)


ALIVE = """
import sys, time
import ray
while True:
    try:
        ray.init(address=sys.argv[1], logging_level="critical", log_to_driver=False)
        break
    except ConnectionError:
        time.sleep(0.5)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.1)
"""


def await_nodes(address: str, count: int) -> None:
    subprocess.run([sys.executable, "-c", ALIVE, address, str(count)], timeout=SECONDS, check=True)


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    settings = {"APP_MODEL_DIR": str(text_model(300)), "APP_PROVIDER": "cpu", "APP_RUNNERS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "app.scoring", *map(str, arguments), "--shard-rows", str(SHARD_ROWS)],
        cwd=ROOT,
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data set, and beside it what one process makes of it."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": text}) for text in sentences(ROWS)]
    (folder / "reviews.jsonl").write_text("\n".join([*lines[:777], "{", *lines[777:]]))
    process = start(folder / "reviews.jsonl", folder / "expected")
    assert process.communicate(timeout=SECONDS)[1] == ""
    assert process.returncode == 0
    return folder


@pytest.mark.parametrize("lost", [False, True], ids=["undisturbed", "one node lost"])
def test_two_nodes_write_the_same_bytes_as_one_process(cluster, data, tmp_path, lost):
    address, (_, other) = cluster
    on_ray = ("--engine", "ray", "--actors", 2)
    process = start(data / "reviews.jsonl", tmp_path / "out", *on_ray, RAY_ADDRESS=address)
    assert process.stdout is not None
    if lost:
        while '"shard":' not in process.stdout.readline():
            assert process.poll() is None
        other.kill()
    out, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    assert '"complete"' in out
    assert tree(tmp_path / "out") == tree(data / "expected")


def test_an_error_has_its_exit_code_and_its_line(cluster, data, tmp_path):
    address, _ = cluster
    bad = ("--engine", "ray", "--max-bad-rows", 0)
    process = start(data / "reviews.jsonl", tmp_path / "out", *bad, RAY_ADDRESS=address)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 6
    assert "row 777: not JSON" in errors.splitlines()[-1]
