"""A server of several processes, as real ones: what holds for one process holds for them together.

Tests of one process's life run again here where the engine has a part in it; what a connection alone decides cannot
differ.
"""

import http.client
import json
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import combinations
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
COUNTED = 'inference_requests_total{"code": "200", "route": "/predict"}'
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


# A signal that a process loses keeps the server for longer than any test waits.
PATIENT = {"drain_timeout_seconds": 600}


class StartingServer(ServerProcess):
    """On its way to ready; `left()`: its processes that are still there, whoever their parent is by now."""

    def __init__(self, **settings: object) -> None:
        self._mark = uuid.uuid4().hex
        super().__init__(environment={"TEST_SERVER": self._mark}, **(PATIENT | settings))

    def left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TEST_SERVER") == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def begun(self) -> bool:
        """Whether `app.multiprocess` has taken over: before that, a signal does what it does to any process."""
        return signal.SIGQUIT in handled_signals(self.process.pid)

    def running(self) -> int:
        """How many workers are more than a copy of the engine."""
        return sum("app.multiprocess.http_worker" in worker.cmdline() for worker in workers(self))

    def handling(self) -> int:
        """How many of them have handlers of their own for signals."""
        return sum(signal.SIGTERM in handled_signals(worker.pid) for worker in workers(self)) if self.running() else 0


def handled_signals(process_id: int) -> set[int]:
    """Those for which the process has a handler."""
    status = Path(f"/proc/{process_id}/status").read_text()
    bits = int(re.search(r"SigCgt:\t(\w+)", status)[1], 16)
    return {number for number in range(1, 32) if bits >> (number - 1) & 1}


# Moments of start-up, in their order.
MOMENTS: dict[str, Callable[[StartingServer], object]] = {
    "it begins": StartingServer.begun,
    "a worker is there": lambda server: len(workers(server)) >= 1,
    "all workers are there": lambda server: len(workers(server)) >= PROCESSES,
    "all workers run Python": lambda server: server.running() >= PROCESSES,
    "a worker handles signals": lambda server: server.handling() >= 1,
    "all workers handle signals": lambda server: server.running() >= PROCESSES and server.handling() >= PROCESSES,
    **{f"{lines} log lines": lambda server, lines=lines: len(server.logs()) >= lines for lines in range(1, 7)},
}


def until_moment(server: StartingServer, moment: str) -> None:
    while not MOMENTS[moment](server):
        assert server.process.poll() is None, server.errors()


def ended(server: StartingServer) -> int:
    """The exit code, once no process is left."""
    code = server.wait()
    life.until(lambda: not server.left())
    return code


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_of_start_up_ends_all_processes_with_exit_code_0(moment: str) -> None:
    with StartingServer() as starting:
        until_moment(starting, moment)
        starting.terminate()
        assert ended(starting) == 0
        assert not [line for line in starting.logs() if line["level"] == "error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_other_signals_that_ask_to_end_do_the_same(number: signal.Signals) -> None:
    for moment in ("it begins", "a worker is there", "all workers handle signals"):
        with StartingServer() as starting:
            until_moment(starting, moment)
            starting.process.send_signal(number)
            assert ended(starting) == 0
    with StartingServer().ready() as serving:
        serving.process.send_signal(number)
        assert ended(serving) == 0


def test_a_hangup_that_is_ignored_at_start_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        starting = StartingServer()
    finally:
        signal.signal(signal.SIGHUP, before)
    with starting:
        until_moment(starting, "all workers are there")
        starting.process.send_signal(signal.SIGHUP)
        starting.ready()
        starting.process.send_signal(signal.SIGHUP)
        assert starting.get("/ready").status_code == 200
        starting.terminate()
        assert ended(starting) == 0


def test_signals_that_go_on_until_the_end_do_not_change_the_exit_code() -> None:
    with StartingServer().ready() as ending:
        while ending.process.poll() is None:
            ending.terminate()
        assert ended(ending) == 0


@pytest.mark.parametrize("moment", list(MOMENTS)[2:6])
def test_a_signal_to_all_processes_is_one_signal_at_any_moment_of_start_up(moment: str) -> None:
    with StartingServer() as starting:
        until_moment(starting, moment)
        for process in [*workers(starting), psutil.Process(starting.process.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        assert ended(starting) == 0


# Read by every process at its start: the file that a worker opens takes forever.
ENDLESS = """
import time
from app.multiprocess import remote
remote.open_model = lambda *_: time.sleep(3600)
"""


def test_a_signal_does_not_wait_for_a_worker_that_still_opens_the_model(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ENDLESS)
    with ServerProcess(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, **PATIENT) as starting:
        life.until(lambda: starting.get("/ready").json()["stage"] == "warming")
        time.sleep(0.5)  # the engine has told the workers to open it, or does so now: both must end
        starting.terminate()
        assert starting.wait() == 0


@pytest.mark.parametrize("moment", list(MOMENTS)[1:6])
def test_without_its_engine_no_http_worker_stays_at_any_moment_of_start_up(moment: str) -> None:
    with StartingServer() as dying:
        until_moment(dying, moment)
        dying.process.kill()
        assert ended(dying) == -signal.SIGKILL


def test_an_http_worker_has_no_connection_of_another_process(server: ServerProcess) -> None:
    def connections(process: psutil.Process) -> set[str]:
        files = {file.name: str(file.readlink()) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
        standard = {files.get(number) for number in "012"}
        return {file for file in files.values() if file.startswith(("socket:", "pipe:"))} - standard

    processes = [psutil.Process(server.process.pid), *workers(server)]
    for one, other in combinations(map(connections, processes), 2):
        assert not one & other


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


def connection_to(server: ServerProcess, worker: psutil.Process) -> http.client.HTTPConnection:
    """A connection that this worker has accepted."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/live")
        connection.getresponse().read()
        ours = connection.sock.getsockname()[1]
        if any(found.raddr and found.raddr.port == ours for found in worker.net_connections()):
            return connection
        connection.close()


# Read by every process at its start: {} s without an answer.
LIMIT = """
from app.multiprocess import workers
workers.SILENCE_SECONDS = {}
"""


def test_a_stopped_http_worker_is_noticed_and_ends_the_server_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LIMIT.format(2))
    with ServerProcess(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, **PATIENT).ready() as halted:
        processes = workers(halted)
        processes[1].suspend()
        assert halted.wait() == 1
        (line,) = [line for line in halted.logs() if line["event"] == "an HTTP worker does not answer"]
        assert line["process_id"] == processes[1].pid
        assert not psutil.wait_procs(processes, 60)[1]


def test_a_worker_that_is_busy_for_a_moment_is_left_alone(server: ServerProcess) -> None:
    processes = workers(server)
    processes[0].suspend()
    time.sleep(2)
    processes[0].resume()
    connection = connection_to(server, processes[0])
    connection.request("GET", "/ready")
    assert connection.getresponse().status == 200
    connection.close()
    assert workers(server) == processes


def test_counters_do_not_fall_while_an_http_worker_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LIMIT.format(3600))
    with ServerProcess(environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"}).ready() as halted:
        processes = workers(halted)
        first, second = (connection_to(halted, process) for process in processes)

        def counted(connection: http.client.HTTPConnection) -> float:
            connection.request("GET", "/metrics")
            return samples(connection.getresponse().read().decode())[COUNTED]

        for connection in [first, second] * 5:
            body = json.dumps({"text": TEXTS[0]})
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            assert connection.getresponse().read()
        assert counted(first) == 10
        processes[1].suspend()
        try:
            assert [counted(first) for _ in range(3)] == [10, 10, 10]
        finally:
            processes[1].resume()
        assert counted(second) == 10
        first.close()
        second.close()


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
