"""`python -m loadtest.capacity` as people run it, on the real server: every file, every metric, exit codes."""

import subprocess
import sys

import numpy as np
import pytest

from loadtest.benchmark.server import free_port
from loadtest.capacity import schema
from loadtest.connection import Target, TargetError
from tests import onnx_models
from tests.process import ROOT, ServerProcess

QUICK = ("--min-step-seconds", "0.3", "--max-step-seconds", "0.5", "--max-in-flight", "2", "--start-seconds", "2")


def capacity(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "loadtest.capacity", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """One quick run with a wide objective, and where its files are."""
    folder = tmp_path_factory.mktemp("capacity")
    return capacity("--url", f"{server.url}/predict", "--out", folder, "--slo-p95-ms", 5000, *QUICK), folder


def test_it_writes_report_figures_and_components_and_prints_the_answer(run):
    done, folder = run
    assert done.returncode == 0, done.stderr
    assert "In-flight target" in done.stdout
    assert (folder / "report.html").stat().st_size > 50_000
    assert (folder / "latency-in-flight.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "component").iterdir()) == ["cpu", "inflight", "keda"]
    assert "step 2: 2 in flight" in done.stderr  # the progress bar


def test_every_step_has_what_the_server_says_of_itself(run):
    report = schema.read(run[1] / "report.json")
    for step in report.steps:
        server = step.server
        for name in (
            "cpu_cores",
            "memory_bytes",
            "queue_wait_ms",
            "run_ms",
            "batch_rows",
            "runner_busy_share",
            "runners",
        ):
            assert getattr(server, name) is not None, name
        assert 0 <= server.padding_share < 1
        assert server.memory_bytes > 10 * 2**20
        assert step.errors == 0
    assert report.run.server["provider"] == "cpu"


def test_an_objective_that_nothing_meets_is_exit_code_1_and_no_component(server, tmp_path):
    done = capacity("--url", f"{server.url}/predict", "--out", tmp_path, "--slo-p95-ms", 0.01, "--quiet", *QUICK)
    assert done.returncode == 1, done.stderr
    assert "not even one request" in done.stdout
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "component").exists()


def test_a_url_that_never_answers_200_is_one_line_and_nothing_written(server, tmp_path):
    done = capacity("--url", f"{server.url}/nowhere", "--out", tmp_path / "out", "--quiet", *QUICK)
    assert done.returncode == 2
    assert "no request was answered with 200" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def lookup(package):
    """A model that takes no text, and fails on an index of 10 or more."""
    with ServerProcess(package(onnx_models.lookup), max_queue_wait_ms=600_000) as process:
        yield process.ready()


def test_without_a_path_it_sends_what_the_served_model_takes(server, lookup, tmp_path):
    for process, route in ((server, "/predict"), (lookup, "/v2/models/infer")):
        done = capacity("--url", process.url, "--out", tmp_path / route[1:3], "--slo-p95-ms", 5000, "--quiet", *QUICK)
        assert done.returncode == 0, done.stderr
        report = schema.read(tmp_path / route[1:3] / "report.json")
        assert sum(step.requests for step in report.steps) > 0
        assert [step.errors for step in report.steps] == [0] * len(report.steps)
        # The first request asks whether any is answered.
        assert process.metric("inference_requests_total", route=route, code="200") > report.steps[0].requests


def test_a_request_that_fails_is_shown_with_its_status_its_answer_and_what_to_do(lookup, tmp_path):
    np.savez(tmp_path / "inputs.npz", index=[99])
    done = capacity("--url", lookup.url, "--inputs", tmp_path / "inputs.npz", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "/v2/models/test-model/infer: no request was answered with 200: the first got 500: " in line
    assert "the model failed on this input" in line


def test_nothing_listening_is_one_line(tmp_path):
    port = free_port()
    done = capacity("--url", f"http://127.0.0.1:{port}/predict", "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "nonsense", "http:///predict"])
def test_a_bad_url_is_one_line_that_names_it(url):
    with pytest.raises(TargetError) as caught:
        Target.of(url)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
