"""app/README.md's examples of a new route and a new task, applied to a copy of the server and asked."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from app.artifact.manifest import MANIFEST
from tests import onnx_models
from tests.process import ROOT, ServerProcess

BLOCK = re.compile(r"```(python|diff)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server with both examples in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, text in BLOCK.findall((ROOT / "app" / "README.md").read_text()):
        if kind == "diff":
            subprocess.run(["git", "apply", "--recount", "-"], cwd=folder, input=text, text=True, check=True)
        elif text.startswith("# app/"):
            name, _, code = text.partition("\n")
            (folder / name[2:]).write_text(code)
    return folder


def test_a_new_route_is_a_handler_and_a_row(copy):
    with ServerProcess(cwd=copy) as server:
        server.ready()
        answer = httpx.post(f"{server.url}/scores", json={"text": "a lovely film"}).json()
        assert answer["scores"]["positive"] > 0.5
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert httpx.get(f"{server.url}/scores").status_code == 405
        assert "/scores" in httpx.get(f"{server.url}/openapi.json").json()["paths"]
        assert server.metric("inference_requests_total", route="/scores", code="200") == 1


def test_a_new_task_is_a_file_and_an_entry(copy, package):
    folder = package(onnx_models.mlp)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    labels = [f"class-{index}" for index in range(manifest["outputs"][0]["shape"][1])]
    # Edited by hand, so it has no checksum of its own any more.
    path.write_text(json.dumps(manifest | {"task": "tensor-classification", "labels": labels, "checksum": None}))
    name, (spec,) = manifest["name"], manifest["inputs"]
    rows = [[0.5] * spec["shape"][1], [-1.0] * spec["shape"][1]]
    body = {"inputs": [{"name": spec["name"], "shape": [2, len(rows[0])], "datatype": "FP32", "data": rows}]}
    with ServerProcess(folder, cwd=copy) as server:
        server.ready()
        answer = httpx.post(f"{server.url}/v2/models/{name}/infer", json=body).json()
        outputs = {output["name"]: output for output in answer["outputs"]}
        scores, found = outputs[manifest["outputs"][0]["name"]], outputs["label"]["data"]
        width = scores["shape"][1]
        for row, label in enumerate(found):
            values = scores["data"][row * width : (row + 1) * width]
            assert label == labels[values.index(max(values))]
        declared = httpx.get(f"{server.url}/v2/models/{name}").json()["outputs"]
        assert declared[-1] == {"name": "label", "datatype": "BYTES", "shape": [-1]}
