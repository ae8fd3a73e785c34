"""What packaging prints is what the server answers: the printed `curl`, run against the real server."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import onnx_models
from tests.onnx_models import save, tensor
from tests.process import ServerProcess
from tests.tools.packaging import Command, folder
from tests.tools.test_package_files import SIZES, image_folder, linear_classifier
from tests.tools.test_package_text import MULTI, REGRESSION, embedder


@pytest.fixture
def command(monkeypatch, capfd, tmp_path) -> Command:
    return Command(monkeypatch, capfd, tmp_path)


def strings_and_scalar(path: Path) -> Path:
    """x [rows, 2] strings and a scalar → both unchanged."""
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s"], ["t"])]
    inputs = [tensor("x", ["rows", 2], TensorProto.STRING), tensor("s", [], TensorProto.BOOL)]
    return save(path, nodes, inputs, [tensor("y", ["rows", 2], TensorProto.STRING), tensor("t", [], TensorProto.BOOL)])


def large(path: Path, side: int) -> Path:
    """side x side pixels and an index."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Gather", ["table", "i"], ["found"]),
        helper.make_node("Add", ["mean", "found"], ["y"]),
    ]
    inputs = [tensor("x", [1, 3, side, side]), tensor("i", [1], TensorProto.INT64)]
    return save(path, nodes, inputs, [tensor("y", [1])], table=np.arange(10, dtype=np.float32))


KINDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "labels": lambda root: (folder(root / "s", config=MULTI) / "model.onnx",),
    "number": lambda root: (folder(root / "s", 1, config=REGRESSION) / "model.onnx",),
    "pair": lambda root: (folder(root / "s", 1) / "model.onnx", "--task", "text-pair"),
    "embedding": lambda root: (embedder(root / "s"), "--pooling", "mean"),
    "entities": lambda root: (
        folder(root / "s", config={"architectures": ["XForTokenClassification"]}, per_token=True) / "model.onnx",
    ),
    "image": lambda root: (image_folder(root / "s", SIZES) / "model.onnx",),
    "table": lambda root: (linear_classifier(root / "t.onnx", zipmap=True),),
    "strings": lambda root: (strings_and_scalar(root / "t.onnx"),),
    "half floats": lambda root: (onnx_models.identity(root / "t.onnx", TensorProto.FLOAT16),),
    "larger than a command line": lambda root: (large(root / "t.onnx", 300),),
    "larger than bodies may be": lambda root: (large(root / "t.onnx", 1000),),
}


@pytest.mark.parametrize("build", KINDS.values(), ids=list(KINDS))
def test_the_printed_request_is_answered(command, tmp_path, build):
    assert command(*build(tmp_path)) == 0, command.err
    printed = {line.split()[0]: line.split(None, 1)[1] for line in command.out.splitlines()}
    settings = dict(re.findall(r"APP_(\w+)=(\S+)", printed["serve"]))
    assert settings.pop("MODEL_DIR") == str(command.made)
    named = {name.lower(): value for name, value in settings.items()}
    with ServerProcess(command.made, max_queue_wait_ms=600_000, request_timeout_ms=600_000, **named) as server:
        address = f"127.0.0.1:{server.ready().port}"
        line = printed["try"].replace("localhost:8000", address).replace("curl -s", "curl -s -w ' %{http_code}'")
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    body, _, status = done.stdout.rpartition(" ")
    assert status == "200", body
    assert json.loads(body)
