"""A real MLflow server on SQLite: a run and its resumption are one there; and a server that is away stops nothing."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.process import free_port
from tests.train import tiny
from tests.train.tiny import await_step, finish, record, start

TRAIN = "model.training.train"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Its address."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "files"), "--port", str(port), "--workers", "1"]
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log, stderr=log) as process:
        end = time.monotonic() + tiny.WAIT_SECONDS
        while not answers(address):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
        process.terminate()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[object, ...]:
    root = tmp_path_factory.mktemp("inputs")
    return ("--data", tiny.corpus(root / "data"), "--backbone", tiny.backbone(root / "tiny" / "model"), *tiny.OPTIONS)


def test_a_run_and_its_resumption_are_one_run_with_parameters_metrics_and_its_record(server, inputs, tmp_path):
    out, checkpoints = tmp_path / "base", tmp_path / "checkpoints"
    command = (TRAIN, *inputs, "--out", out, "--checkpoints", checkpoints, "--checkpoint-minutes", 0)
    process = start(*command, MLFLOW_TRACKING_URI=server)
    await_step(process, checkpoints, 9)
    process.kill()
    process.communicate()
    finish(*command, MLFLOW_TRACKING_URI=server)

    api = f"{server}/api/2.0/mlflow"
    (run,) = httpx.post(f"{api}/runs/search", json={"experiment_ids": ["0"]}, trust_env=False).json()["runs"]
    written = record(out)
    parameters = {each["key"]: each["value"] for each in run["data"]["params"]}
    assert parameters == {name: str(value) for name, value in written["recipe"].items()} | {"processes": "1"}
    tags = {each["key"]: each["value"] for each in run["data"]["tags"]}
    assert tags["code_revision"] == "tested"
    assert tags["data_sha256"] == written["data"]["sha256"]
    assert run["info"]["status"] == "FINISHED"
    # Evaluations of both processes, none of them lost.
    name = "accuracy_sst2-dev"
    query = {"run_id": run["info"]["run_id"], "metric_key": name}
    history = httpx.get(f"{api}/metrics/get-history", params=query, trust_env=False).json()["metrics"]
    assert len({int(each["step"]) for each in history}) == 4
    files = f"{server}/api/2.0/mlflow-artifacts/artifacts/0/{run['info']['run_id']}/artifacts/run.json"
    assert json.loads(httpx.get(files, trust_env=False).text) == written


def test_a_server_that_is_away_is_said_and_stops_nothing(inputs, tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    output = finish(TRAIN, *inputs, "--out", tmp_path / "base", MLFLOW_TRACKING_URI=nowhere)
    assert output.count("the run goes on") == 1
    assert (tmp_path / "base" / "run.json").exists()


def test_without_a_server_mlflow_is_not_imported(inputs, tmp_path):
    (tmp_path / "mlflow.py").write_text("raise SystemExit(99)")
    finish(TRAIN, *inputs, "--out", tmp_path / "base", PYTHONPATH=str(tmp_path))
