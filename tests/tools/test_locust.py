"""The locustfile as people run it: real locust processes against the real server, for seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from loadtest.benchmark.server import free_port
from loadtest.texts import MIX, mixed
from tests import onnx_models
from tests.otlp_receiver import Receiver
from tests.process import ROOT, ServerProcess

LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"
# A shared machine may be slow; tests are about what is sent, not how fast.
LENIENT = ("--slo-p95-ms", "20000")


def command(server, *arguments):
    host = ("--host", server.url)
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *host, *LENIENT, *map(str, arguments)]


def environment():
    # gevent patches what it finds; the tests' own settings are none of its business.
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def locust(server, *arguments, folder):
    """A headless run to its end: exit code, what it logged, its statistics by name."""
    done = subprocess.run(
        [*command(server, "--headless", "--json"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=folder,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr, statistics(done.stdout)


def statistics(output):
    """What `--json` prints, by name; a worker prints a list too, and it is empty."""
    rows, decoder, text = {}, json.JSONDecoder(), output.strip()
    while text:
        found, end = decoder.raw_decode(text)
        rows |= {each["name"]: each for each in found}
        text = text[end:].strip()
    return rows


def count(rows, column="num_requests"):
    return sum(row[column] for row in rows.values())


def test_closed_loop_users_send_all_kinds_and_nothing_fails(server, tmp_path):
    code, output, rows = locust(server, "--users", 10, "--spawn-rate", 10, "--run-time", "2s", folder=tmp_path)
    assert code == 0, output
    assert set(rows) == {"/predict", "/predict/batch", "/v2/models/infer"}
    assert count(rows, column="num_failures") == 0
    assert "objective held" in output


def test_a_share_of_the_requests_begins_a_trace(tmp_path):
    receiver = Receiver()
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    with ServerProcess(environment=receiver.environment | sampler) as server:
        server.ready()
        arguments = ("--users", 4, "--spawn-rate", 4, "--run-time", "2s", "--trace-ratio", 0.5, "--kinds", "single")
        code, output, rows = locust(server, *arguments, folder=tmp_path)
        assert code == 0, output
        spans = receiver.named("POST /predict")
        # What began elsewhere, each in a trace of its own; the server alone samples nothing.
        assert all(span.parent_span_id for span in spans)
        assert len({span.trace_id for span in spans}) == len(spans) <= count(rows)
    receiver.close()


def test_a_trace_from_csv_is_replayed_as_an_open_loop_by_two_processes(server, tmp_path):
    (tmp_path / "trace.csv").write_text("seconds,rate\n0,40\n3,40\n")
    arguments = ("--loop", "open", "--shape", "csv", "--trace", tmp_path / "trace.csv", "--processes", 2)
    code, output, rows = locust(server, *arguments, "--kinds", "single", folder=tmp_path)
    assert code == 0, output
    assert "2 workers connected" in output
    assert set(rows) == {"/predict"}
    # 120 were due, less the moment until the first source is there; Poisson, so give or take.
    assert 20 <= count(rows) <= 200


def test_a_latency_in_an_open_loop_counts_from_when_the_request_was_due(server):
    # A stopped server answers nothing for a second. Clients that wait see that once each; arrivals see it often.
    arguments = ("--loop", "open", "--shape", "constant", "--peak", 40, "--shape-seconds", 5, "--kinds", "single")
    running = subprocess.Popen(
        [*command(server, "--headless", "--json"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    try:
        before = server.metric("inference_requests_total", route="/predict", code="200")
        while server.metric("inference_requests_total", route="/predict", code="200") < before + 10:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        server.process.send_signal(signal.SIGCONT)
        rows = statistics(running.communicate(timeout=60)[0])
    finally:
        server.process.send_signal(signal.SIGCONT)
        running.kill()
        running.communicate()
    waited = [float(ms) for ms, times in rows["/predict"]["response_times"].items() for _ in range(times)]
    # 40 were due while it stood still, evenly over its second: half of them waited over half of it.
    assert sum(ms >= 500 for ms in waited) >= 10


def test_a_violated_objective_is_exit_code_1(server, tmp_path):
    arguments = ("--users", 2, "--run-time", "1s", "--slo-p95-ms", "0.01")
    code, output, _ = locust(server, *arguments, folder=tmp_path)
    assert code == 1
    assert "objective violated" in output


def test_failures_over_what_is_allowed_are_exit_code_1(server, tmp_path):
    arguments = ("--users", 2, "--run-time", "1s", "--kinds", "oip", "--model", "no-such-model")
    code, output, rows = locust(server, *arguments, folder=tmp_path)
    assert code == 1
    assert "failed 100.00 %" in output
    assert count(rows, column="num_failures") == count(rows) > 0
    # Once before, by name, and then as each request's error.
    assert "404: " in output
    assert "unknown model" in output
    assert "sending texts" in output


def test_a_model_that_takes_no_text_gets_tensors_from_users_and_arrivals_alike(package, tmp_path):
    with ServerProcess(package(onnx_models.two_outputs), max_queue_wait_ms=600_000).ready() as tensors:
        closed = ("--users", 10, "--spawn-rate", 10, "--run-time", "2s")
        arrivals = ("--loop", "open", "--shape", "constant", "--peak", 20, "--shape-seconds", 2)
        for arguments in (closed, arrivals):
            code, output, rows = locust(tensors, *arguments, folder=tmp_path)
            assert code == 0, output
            assert set(rows) == {"/v2/models/infer"}
            assert count(rows, column="num_failures") == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--shape", "csv", "--trace", "nowhere.csv"), "nowhere.csv: No such file"), (("--mix", "1,2"), "--mix")],
)
def test_wrong_options_end_before_anything_is_sent(server, tmp_path, arguments, says):
    code, output, rows = locust(server, *arguments, folder=tmp_path)
    assert code != 0
    assert says in output
    assert rows == {}


def wait_for(ready):
    for _ in range(600):
        try:
            if found := ready():
                return found
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def test_the_web_page_starts_users_on_a_worker(server, tmp_path):
    port, bind = free_port(), free_port()
    web = command(server, "--master", "--web-port", port, "--web-host", "127.0.0.1", "--master-bind-port", bind)
    worker = command(server, "--worker", "--master-host", "127.0.0.1", "--master-port", bind)
    url = f"http://127.0.0.1:{port}"
    processes = [
        subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=tmp_path)
        for each in (web, worker)
    ]
    try:
        wait_for(lambda: httpx.get(f"{url}/stats/requests").json()["workers"])
        form = {"user_count": "3", "spawn_rate": "3", "host": server.url, "kinds": "single"}
        assert httpx.post(f"{url}/swarm", data=form).json()["success"]
        stats = wait_for(
            lambda: [s for s in httpx.get(f"{url}/stats/requests").json()["stats"] if s["num_requests"] > 9]
        )
        assert {each["name"] for each in stats} == {"/predict", "Aggregated"}
        assert httpx.post(f"{url}/stop").json()["success"]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_mix_has_short_medium_and_long_texts_in_their_shares():
    texts = mixed(4000, seed=2)
    assert texts == mixed(4000, seed=2)
    lengths = [len(text.split()) for text in texts]
    for share, low, high in MIX.values():
        assert sum(low <= length <= high for length in lengths) / 4000 == pytest.approx(share, abs=0.03)
    assert sum(share for share, _, _ in MIX.values()) == pytest.approx(1)


def test_the_files_that_go_to_the_cluster_need_only_locust():
    """Its image has nothing else."""
    for name in ("locustfile.py", "shapes.py", "texts.py", "__init__.py", "payloads.py"):
        text = (Path(LOCUSTFILE).parent / name).read_text()
        assert not any(f"import {library}" in text for library in ("numpy", "msgspec", "psutil"))
