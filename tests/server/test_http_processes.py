"""A server of several processes, as real ones: what holds for one process holds for them together.

Tests of one process's life run again here where the engine has a part in it; what a connection alone decides cannot
differ.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.process import NO_TLS, ROOT, ServerProcess

# A fixture of another module is found by being named here.
from tests.server import test_lifecycle as life
from tests.server.test_lifecycle import pool, turner  # noqa: F401
from tests.text_model import NAME

PROCESSES = 2
TEXTS = [f"a calm and ordinary morning, number {number}" for number in range(40)]


@pytest.fixture(autouse=True, scope="module")
def several() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerProcess, "defaults", {"http_processes": PROCESSES})
        yield


@pytest.fixture(scope="module")
def server(several: None) -> Iterator[ServerProcess]:
    with ServerProcess() as running:
        yield running.ready()


def workers(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def ask(server: ServerProcess, text: str) -> httpx.Response:
    """On a connection of its own, so that any of the processes may answer."""
    return httpx.post(f"{server.url}/predict", json={"text": text}, timeout=60, verify=NO_TLS)


def each_worker(server: ServerProcess, path: str) -> list[httpx.Response]:
    """Answers on so many connections that no process is left out, but for one time in a million."""
    return [server.get(path) for _ in range(20)]


def samples(text: str) -> dict[str, float]:
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_answers_are_those_of_one_process(server: ServerProcess) -> None:
    with ServerProcess(http_processes=1).ready() as alone:
        expected = [ask(alone, text).json() for text in TEXTS]
        batch = httpx.post(f"{alone.url}/predict/batch", json={"texts": TEXTS}, timeout=60, verify=NO_TLS).json()
    with ThreadPoolExecutor(8) as together:
        answers = list(together.map(lambda text: ask(server, text), TEXTS))
    assert [answer.json() for answer in answers] == expected
    assert httpx.post(f"{server.url}/predict/batch", json={"texts": TEXTS}, timeout=60, verify=NO_TLS).json() == batch
    timing = re.compile(r"queue;dur=[\d.]+, inference;dur=([\d.]+)")
    assert all(float(timing.fullmatch(answer.headers["server-timing"])[1]) > 0 for answer in answers)


def test_connections_are_dealt_out_to_all_processes(server: ServerProcess) -> None:
    before = [process.cpu_times().user for process in workers(server)]
    assert len(before) == PROCESSES

    def all_worked() -> bool:
        each_worker(server, f"/v2/models/{NAME}")
        after = [process.cpu_times().user for process in workers(server)]
        return all(now > then for then, now in zip(before, after, strict=True))

    life.until(all_worked)


def test_metrics_and_statistics_are_whole_whichever_process_is_asked(server: ServerProcess) -> None:
    def count() -> tuple[float, ...]:
        found = samples(server.get("/metrics").text)
        statistics = server.get("/v2/models/stats").json()["model_stats"][0]
        return (
            found['inference_requests_total{"code": "200", "route": "/predict"}'],
            found['inference_request_duration_seconds_count{"route": "/predict"}'],
            found["inference_batch_rows_sum{}"],
            statistics["inference_count"],
            statistics["inference_stats"]["success"]["count"],
        )

    before = count()
    with ThreadPoolExecutor(8) as together:
        assert all(answer.status_code == 200 for answer in together.map(lambda text: ask(server, text), TEXTS))
    after = count()
    assert [now - then for then, now in zip(before, after, strict=True)] == [len(TEXTS)] * 5
    for answer in each_worker(server, "/metrics"):
        found = samples(answer.text)
        assert (found["inference_requests_in_flight{}"], found["inference_queue_rows{}"], found["model_ready{}"]) == (
            0, 0, 1,
        )  # fmt: skip
        assert sum(value for name, value in found.items() if name.startswith("model_info")) == 1


def test_every_process_is_ready_before_any_says_so() -> None:
    with ServerProcess() as starting:
        starting.ready()
        assert {answer.status_code for answer in each_worker(starting, "/ready")} == {200}
        assert [line["event"] for line in starting.logs()].count("ready") == 1
        assert {ask(starting, text).status_code for text in TEXTS} == {200}


def test_an_http_worker_that_is_killed_takes_the_server_down_with_an_error_and_without_orphans() -> None:
    with ServerProcess().ready() as dying:
        processes = workers(dying)
        processes[0].send_signal(signal.SIGKILL)
        assert dying.wait() == 1
        assert [line for line in dying.logs() if line["event"] == "an HTTP worker ended"]
        psutil.wait_procs(processes, 60)
        assert not any(process.is_running() for process in processes)


def test_a_signal_to_all_processes_at_once_is_one_signal() -> None:
    with ServerProcess(drain_delay_seconds=1).ready() as ending, httpx.Client(base_url=ending.url) as client:
        assert client.post("/predict", json={"text": TEXTS[0]}).status_code == 200
        for process in [*workers(ending), psutil.Process(ending.process.pid)]:
            process.send_signal(signal.SIGTERM)
        assert client.post("/predict", json={"text": TEXTS[1]}).status_code == 200
        assert ending.wait() == 0


def test_without_its_engine_no_http_worker_stays() -> None:
    with ServerProcess().ready() as dying:
        processes = workers(dying)
        os.kill(dying.process.pid, signal.SIGKILL)
        _, left = psutil.wait_procs(processes, 60)
        assert not left


# Read by every process at its start: as in service, but sooner.
IMPATIENT = """
from app.multiprocess import remote
remote.SILENCE_SECONDS, remote.ASK_SECONDS = 1.0, 0.5
"""


def test_a_stopped_engine_makes_every_process_not_live(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(IMPATIENT)
    with ServerProcess(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}).ready() as halted:
        engine = psutil.Process(halted.process.pid)
        engine.suspend()
        try:
            life.until(lambda: {answer.status_code for answer in each_worker(halted, "/live")} == {503})
            assert halted.get("/metrics").status_code == 503
        finally:
            engine.resume()


def test_the_end_of_a_life_is_that_of_one_process(turner: Path, pool: ThreadPoolExecutor) -> None:  # noqa: F811
    life.test_what_runs_and_what_waits_is_answered_before_the_process_ends(turner, pool)
    life.test_a_drain_lasts_no_longer_than_it_may(turner)
    life.test_a_second_signal_ends_the_process_without_waiting(turner, signal.SIGTERM)


def test_under_load_a_signal_loses_no_accepted_request() -> None:
    life.test_under_load_a_signal_loses_no_accepted_request(signal.SIGTERM)


def test_the_start_of_a_life_is_that_of_one_process(package) -> None:
    life.test_while_the_gate_runs_the_server_is_live_and_not_ready_and_says_at_which_stage(package)
    life.test_a_signal_while_the_gate_runs_ends_the_process_without_waiting_for_it(package, signal.SIGINT)


def test_rows_that_nobody_waits_for_any_more_are_not_run(turner: Path, pool: ThreadPoolExecutor) -> None:  # noqa: F811
    settings = {"runners": 1, "max_queue_rows": 8, "request_timeout_ms": life.HOUR_MS}
    with life.HeldServer(turner, **settings).ready() as turning:
        life.test_the_rows_of_clients_that_are_killed_while_they_wait_are_not_run(turning, pool, reset=True)
        life.test_a_client_that_is_killed_while_its_row_runs_is_forgotten(turning, reset=False)


def test_a_runner_that_hangs_makes_every_process_not_live(turner: Path, pool: ThreadPoolExecutor) -> None:  # noqa: F811
    life.test_a_runner_that_hangs_makes_the_process_not_live(turner, pool)


def test_a_model_that_does_not_pass_ends_all_processes_with_its_exit_code_and_one_line(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "nowhere") as refused:
        assert refused.wait() == 3
        (line,) = refused.errors().splitlines()
        assert "nowhere" in line


def test_a_port_in_use_is_exit_code_2_and_one_line(server: ServerProcess) -> None:
    with ServerProcess(port=server.port) as second:
        assert second.wait() == 2
        (line,) = second.errors().splitlines()
        assert str(server.port) in line


@pytest.mark.parametrize("batching", [True, False])
def test_tensors_travel_too(package, batching: bool) -> None:
    from tests.onnx_models import mlp

    folder = package(mlp)
    manifest = json.loads((folder / "manifest.json").read_text())
    if not batching:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"batching": False, "checksum": None}))
    with ServerProcess(folder).ready() as tensors:
        described = tensors.get(f"/v2/models/{manifest['name']}").json()
        (given,) = described["inputs"]
        width = given["shape"][-1]

        def infer(number: int) -> list[float]:
            data = [float(number + column) for column in range(2 * width)]
            body = {"inputs": [{"name": given["name"], "shape": [2, width], "datatype": "FP32", "data": data}]}
            answer = httpx.post(
                f"{tensors.url}/v2/models/{manifest['name']}/infer", json=body, timeout=60, verify=NO_TLS
            )
            assert answer.status_code == 200, answer.text
            return answer.json()["outputs"][0]["data"]

        alone = [infer(number) for number in range(12)]
        assert len({tuple(row) for row in alone}) == 12
        with ThreadPoolExecutor(6) as together:
            for expected, found in zip(alone, together.map(infer, range(12)), strict=True):
                assert found == pytest.approx(expected, rel=1e-5)
