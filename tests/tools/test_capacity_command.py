"""`python -m loadtest.capacity` as people run it, on the real server: every file, every metric, exit codes."""

import subprocess
import sys

import pytest

from loadtest.benchmark.server import free_port
from loadtest.capacity import schema
from loadtest.connection import Target, TargetError
from tests.process import ROOT

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
