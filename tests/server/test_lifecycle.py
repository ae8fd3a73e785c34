"""The life of the server as a real process: starting, serving what comes over real sockets, draining, ending.

Slow runs are real: a model whose loop turns as often as its input says, so one model is quick, slow or endless; or
they wait for the test.
"""

import hashlib
import http.client
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper
from prometheus_client.parser import text_string_to_metric_families

from tests.onnx_models import save, tensor
from tests.process import NO_TLS, ROOT, START_SECONDS, ServerProcess, await_beats, free_port

INFER = "/v2/models/test-model/infer"
QUICK = 3
# About a second, and about a year.
SLOW = 1_000_000
ENDLESS = 10**13
HOUR_MS = 3_600_000
PATIENCE_SECONDS = 60
# But those that who started the tests has made this process and its children deaf to, as `nohup` does.
SIGNALS = [
    number
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    if signal.getsignal(number) is not signal.SIG_IGN
]
TEXT = json.dumps({"text": "a calm and ordinary morning"}).encode()


def turning(path: Path) -> Path:
    """rounds int64 [rows] → done int64 [rows], the same; takes as long as the largest of them says."""
    body = helper.make_graph(
        [helper.make_node("Add", ["state", "one"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "turn",
        [
            tensor("turn_number", [], TensorProto.INT64),
            tensor("go", [], TensorProto.BOOL),
            tensor("state", [], TensorProto.INT64),
        ],
        [tensor("on", [], TensorProto.BOOL), tensor("next", [], TensorProto.INT64)],
    )
    return save(
        path,
        [
            helper.make_node("ReduceMax", ["rounds"], ["most"], keepdims=0),
            helper.make_node("Loop", ["most", "", "zero"], ["count"], body=body),
            # Zero, but nobody knows before the loop has ended.
            helper.make_node("Min", ["count", "zero"], ["nothing"]),
            helper.make_node("Add", ["rounds", "nothing"], ["done"]),
        ],
        [tensor("rounds", ["rows"], TensorProto.INT64)],
        [tensor("done", ["rows"], TensorProto.INT64)],
        zero=np.array(0, np.int64),
        one=np.array(1, np.int64),
    )


@pytest.fixture(scope="module")
def turner(package: Callable[..., Path]) -> Path:
    return package(turning)


def slow_to_pass(package: Callable[..., Path], rounds: int) -> Path:
    """An artifact that is in order, whose golden inputs make the gate's runs take long."""
    folder = package(turning)
    golden = folder / "golden.npz"
    turns = np.full(3, rounds)
    np.savez(golden, **{"input.rounds": turns, "output.done": turns})
    content, manifest = golden.read_bytes(), json.loads((folder / "manifest.json").read_text())
    manifest["files"]["golden.npz"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def infer_body(*rounds: int, timeout_ms: int = 0) -> bytes:
    """timeout_ms: the request's own, 0 for none."""
    data = {"name": "rounds", "shape": [len(rounds)], "datatype": "INT64", "data": list(rounds)}
    return json.dumps({"inputs": [data], "parameters": {"timeout": timeout_ms * 1000}}).encode()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.005)


class Connection(http.client.HTTPConnection):
    """One connection, kept open, on which a request can be sent in parts."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=PATIENCE_SECONDS)

    def begin(self, path: str, body: bytes, *, part: int, **headers: str) -> None:
        """Sends a POST's head and the first `part` bytes of its body."""
        self.putrequest("POST", path)
        for name, value in {"content-type": "application/json", "content-length": len(body), **headers}.items():
            self.putheader(name, str(value))
        self.endheaders()
        self.send(body[:part])

    def answer(self) -> tuple[int, http.client.HTTPMessage, Any]:
        """Status, headers, decoded JSON."""
        response = self.getresponse()
        content = response.read()
        return response.status, response.headers, json.loads(content) if content else None

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, http.client.HTTPMessage, Any]:
        all_headers = {"content-type": "application/json", **headers} if body is not None else headers
        self.request("GET" if body is None else "POST", path, body, all_headers)
        return self.answer()

    def vanish(self, *, reset: bool) -> None:
        """Leaves as a killed client does: politely closed by its kernel, or reset."""
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        else:
            # Right behind a request it would only say that this was all.
            await_beats(self.port)
        self.sock.close()
        self.close()


# Read by each of a server's processes at its start.
HOLDING = """
import os, time
from app.runtime.session import Session
run = Session.run
def held(self, inputs):
    while os.path.exists({held!r}):
        time.sleep(0.002)
    return run(self, inputs)
Session.run = held
"""


class HeldServer(ServerProcess):
    """A server whose runs wait for as long as the test says."""

    def __init__(self, model_dir: Path, **settings: object) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        self._held = folder / "held"
        (folder / "sitecustomize.py").write_text(HOLDING.format(held=str(self._held)))
        super().__init__(model_dir, environment={"PYTHONPATH": f"{folder}:{ROOT}"}, **settings)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._scratch.cleanup()

    @contextmanager
    def runs_held(self) -> Iterator[None]:
        self._held.touch()
        try:
            yield
        finally:
            self._held.unlink(missing_ok=True)


@contextmanager
def connected(port: int, count: int = 1) -> Iterator[list[Connection]]:
    connections = [Connection(port) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor


def post(server: ServerProcess, path: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}{path}", content=body, headers=headers, timeout=PATIENCE_SECONDS, verify=NO_TLS)


def gauges(server: ServerProcess) -> dict[str, float]:
    text = server.get("/metrics").text
    return {
        family.name.removeprefix("inference_"): family.samples[0].value
        for family in text_string_to_metric_families(text)
        if family.type == "gauge" and family.samples and not family.samples[0].labels
    }


def await_traffic(server: ServerProcess, *, in_flight: int, waiting: int) -> None:
    """Waits until so many requests are not answered yet, and so many rows of them wait for a runner."""

    def reached() -> bool:
        found = gauges(server)
        return (found["requests_in_flight"], found["queue_rows"]) == (in_flight, waiting)

    until(reached)


def occupy(server: HeldServer, pool: ThreadPoolExecutor) -> "Future[httpx.Response]":
    """Sends a request that keeps the only runner busy while runs are held; returns when it runs."""
    answer = pool.submit(post, server, INFER, infer_body(QUICK))
    await_traffic(server, in_flight=1, waiting=0)
    return answer


def await_event(server: ServerProcess, event: str) -> dict[str, Any]:
    until(lambda: any(line["event"] == event for line in server.logs()))
    return next(line for line in server.logs() if line["event"] == event)


def events(server: ServerProcess) -> list[str]:
    return [line["event"] for line in server.logs()]


# --- starting ---------------------------------------------------------------------------------------------------------


def test_while_the_gate_runs_the_server_is_live_and_not_ready_and_says_at_which_stage(
    package: Callable[..., Path],
) -> None:
    with ServerProcess(slow_to_pass(package, SLOW // 5)) as server, connected(server.port) as (connection,):
        stages = []
        while True:
            live, _, _ = connection.ask("/live")
            assert live == 200
            status, headers, content = connection.ask("/ready")
            if status == 200:
                break
            assert status == 503
            assert int(headers["retry-after"]) >= 1
            stages.append(content["stage"])
            refused, headers, content = connection.ask(INFER, infer_body(QUICK))
            if refused != 200:
                assert refused == 503
                assert int(headers["retry-after"]) >= 1
                assert list(content) == ["error"]
            protocol, _, _ = connection.ask("/v2/health/ready")
            assert protocol in (503, 200)
        order = ["verifying", "loading", "warming"]
        assert stages, "it was ready before anybody could ask"
        assert stages == sorted(stages, key=order.index)
        assert stages[-1] == "warming"
        # And it stays so.
        for _ in range(3):
            assert connection.ask("/ready")[0] == 200
            assert connection.ask(INFER, infer_body(QUICK))[0] == 200
        assert server.metric("inference_rejected_total", reason="not_ready") > 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_gate_runs_ends_the_process_without_waiting_for_it(
    package: Callable[..., Path], number: signal.Signals
) -> None:
    with ServerProcess(slow_to_pass(package, ENDLESS)) as server:
        with connected(server.port) as (connection,):
            until(lambda: connection.ask("/ready")[2]["stage"] == "warming")
        server.process.send_signal(number)
        assert server.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("imported", ["asyncio", "numpy", "app.main"])
def test_a_signal_while_modules_are_imported_ends_the_process_at_once(imported: str, number: signal.Signals) -> None:
    with ServerProcess(environment={"PYTHONPROFILEIMPORTTIME": "1"}) as server:
        until(lambda: re.search(rf"\| +{imported}\n", server.errors()) is not None)
        server.process.send_signal(number)
        assert server.wait(PATIENCE_SECONDS) == 0


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def turning_server(turner: Path) -> Iterator[HeldServer]:
    """One runner, a short queue, and all the time in the world."""
    with HeldServer(turner, runners=1, max_queue_rows=8, request_timeout_ms=HOUR_MS) as process:
        yield process.ready()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_the_rows_of_clients_that_are_killed_while_they_wait_are_not_run(
    turning_server: HeldServer, pool: ThreadPoolExecutor, reset: bool
) -> None:
    server = turning_server
    left = server.metric("inference_requests_total", route="/v2/models/infer", code="499")
    rows = server.metric("inference_batch_rows_sum")
    with server.runs_held():
        running = occupy(server, pool)
        with connected(server.port, 5) as clients:
            for client in clients:
                client.begin(INFER, infer_body(QUICK), part=10_000)
            await_traffic(server, in_flight=6, waiting=5)
            for client in clients:
                client.vanish(reset=reset)
        until(lambda: server.metric("inference_requests_total", route="/v2/models/infer", code="499") == left + 5)
    assert running.result().status_code == 200
    await_traffic(server, in_flight=0, waiting=0)
    assert server.metric("inference_batch_rows_sum") == rows + 1
    assert post(server, INFER, infer_body(QUICK)).json()["outputs"][0]["data"] == [QUICK]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_is_killed_while_its_row_runs_is_forgotten(turning_server: HeldServer, reset: bool) -> None:
    server = turning_server
    left = server.metric("inference_rejected_total", reason="client_closed")
    with server.runs_held():
        with connected(server.port) as (client,):
            client.begin(INFER, infer_body(QUICK), part=10_000)
            await_traffic(server, in_flight=1, waiting=0)
            client.vanish(reset=reset)
        await_traffic(server, in_flight=0, waiting=0)
    assert server.metric("inference_rejected_total", reason="client_closed") == left + 1
    assert post(server, INFER, infer_body(QUICK)).status_code == 200


def test_a_client_that_is_killed_while_it_sends_is_forgotten(turning_server: ServerProcess) -> None:
    server = turning_server
    with connected(server.port, 5) as clients:
        for client in clients:
            client.begin(INFER, infer_body(QUICK), part=20)
        await_traffic(server, in_flight=5, waiting=0)
        for client in clients:
            client.vanish(reset=True)
    await_traffic(server, in_flight=0, waiting=0)
    assert post(server, INFER, infer_body(QUICK)).status_code == 200


def test_a_full_queue_refuses_at_once_and_answers_what_it_accepted(
    turning_server: HeldServer, pool: ThreadPoolExecutor
) -> None:
    server = turning_server
    with connected(server.port, 8) as accepted, connected(server.port, 5) as refused:
        with server.runs_held():
            running = occupy(server, pool)
            for number, client in enumerate(accepted):
                client.begin(INFER, infer_body(number), part=10_000)
            await_traffic(server, in_flight=9, waiting=8)
            for client in refused:
                status, headers, content = client.ask(INFER, infer_body(QUICK))
                assert (status, content) == (503, {"error": "queue full"})
                assert int(headers["retry-after"]) >= 1
                assert "connection" not in headers, "it may come back on it"
        assert running.result().status_code == 200
        for number, client in enumerate(accepted):
            status, _, content = client.answer()
            assert (status, content["outputs"][0]["data"]) == (200, [number])
        assert refused[0].ask(INFER, infer_body(QUICK))[0] == 200
        status, _, _ = refused[0].ask(INFER, infer_body(*[QUICK] * 9))
        assert status == 429, "that many rows will never be accepted"
    await_traffic(server, in_flight=0, waiting=0)


def test_rows_that_wait_too_long_are_refused_at_their_deadline_and_not_run(
    turning_server: HeldServer, pool: ThreadPoolExecutor
) -> None:
    server = turning_server
    # Whatever ran before is counted when this is answered.
    assert post(server, INFER, infer_body(QUICK)).status_code == 200
    refused = server.metric("inference_rejected_total", reason="deadline")
    rows, runs = server.metric("inference_batch_rows_sum"), server.metric("inference_batch_rows_count")
    with server.runs_held():
        running = pool.submit(post, server, INFER, infer_body(QUICK, timeout_ms=3000))
        await_traffic(server, in_flight=1, waiting=0)
        waiting = [pool.submit(post, server, INFER, infer_body(QUICK, timeout_ms=200)) for _ in range(3)]
        assert [answer.result().status_code for answer in (running, *waiting)] == [504] * 4
        await_traffic(server, in_flight=0, waiting=0)
    assert server.metric("inference_rejected_total", reason="deadline") == refused + 4
    until(lambda: server.metric("inference_batch_rows_count") == runs + 1)
    assert post(server, INFER, infer_body(QUICK)).status_code == 200
    assert server.metric("inference_batch_rows_sum") == rows + 2


def test_a_runner_that_hangs_makes_the_process_not_live(turner: Path, pool: ThreadPoolExecutor) -> None:
    with ServerProcess(turner, runners=1, request_timeout_ms=300, runner_timeout_seconds=0.5).ready() as server:
        assert post(server, INFER, infer_body(ENDLESS)).status_code == 504
        with connected(server.port) as (probe,):
            until(lambda: probe.ask("/live")[0] == 503)
            assert probe.ask("/v2/health/live")[0] == 503
            assert "runner 0" in probe.ask("/live")[2]["error"]


def test_a_slow_body_is_given_until_the_deadline_and_no_longer(turner: Path, turning_server: ServerProcess) -> None:
    with ServerProcess(turner, request_timeout_ms=500).ready() as server, connected(server.port) as (stalled,):
        stalled.begin(INFER, infer_body(QUICK), part=5)
        status, headers, content = stalled.answer()
        assert (status, list(content)) == (408, ["error"])
        assert headers["connection"] == "close"
        assert server.metric("inference_rejected_total", reason="body_timeout") == 1
        assert gauges(server)["requests_in_flight"] == 0
    # In drops, but in time.
    with connected(turning_server.port) as (slow,):
        body = infer_body(QUICK)
        slow.begin(INFER, body, part=5)
        for index in range(5, len(body)):
            slow.send(body[index : index + 1])
        assert slow.answer()[0] == 200
        await_traffic(turning_server, in_flight=0, waiting=0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /predict HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\nhello\r\n",
        b"POST /predict HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nno colon here\r\n\r\n",
        b"POST /pre\xff\xfedict HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST http://[::1/predict HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /live HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        random.Random(1).randbytes(4096),
    ],
    ids=lambda garbage: repr(garbage[:24]),
)
def test_garbage_on_the_socket_harms_nobody_else(turning_server: ServerProcess, garbage: bytes) -> None:
    server = turning_server
    with connected(server.port) as (neighbour,):
        assert neighbour.ask("/live")[0] == 200
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while part := client.recv(65536):
                    answer += part
            except ConnectionResetError:
                pass
            assert not answer.startswith(b"HTTP/1.1 5")
            assert b"Traceback" not in answer
        assert neighbour.ask(INFER, infer_body(QUICK))[0] == 200
    await_traffic(server, in_flight=0, waiting=0)
    assert "unhandled" not in events(server)
    assert server.errors() == ""


@pytest.mark.parametrize(
    "headers",
    [b"".join(b"x-%d: %d\r\n" % (n, n) for n in range(300_000)), b"x: " + b"y" * 4_000_000 + b"\r\n"],
    ids=["many", "one large"],
)
def test_headers_are_not_taken_into_memory_without_end(turning_server: ServerProcess, headers: bytes) -> None:
    body = infer_body(QUICK)
    head = f"POST {INFER} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n".encode()
    answer = b""
    with (
        suppress(ConnectionError),  # it may hang up before all is sent
        socket.create_connection(("127.0.0.1", turning_server.port), PATIENCE_SECONDS) as client,
    ):
        client.sendall(head + headers + b"\r\n" + body)
        answer = client.recv(100)
    assert not answer or re.match(rb"HTTP/1.1 4\d\d ", answer), "4 MB of headers were accepted"
    assert post(turning_server, INFER, body).status_code == 200


def test_requests_sent_one_behind_the_other_are_answered_in_order(turning_server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", turning_server.port), PATIENCE_SECONDS) as client:
        sent = []
        for number in range(5):
            body = infer_body(number)
            head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\nx-request-id: n{number}\r\ncontent-length: {len(body)}\r\n"
            sent.append(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        client.sendall(b"".join(sent))
        received = b""
        while len(found := re.findall(rb"x-request-id: n(\d)", received)) < 5:
            part = client.recv(65536)
            assert part, received
            received += part
    assert found == [b"0", b"1", b"2", b"3", b"4"]


def request(server: ServerProcess, sent: bytes) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as client:
        client.sendall(sent)
        received = b""
        while part := client.recv(65536):
            received += part
    return received


UPGRADE = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_wish_for_another_protocol_does_not_cost_a_request_its_body(
    turning_server: ServerProcess, version: bytes, chunked: bool
) -> None:
    """Java's client asks so in each first request."""
    body = infer_body(QUICK)
    length = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % len(body)
    if chunked:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST %s HTTP/%s\r\nhost: x\r\n%s%s\r\n\r\n" % (INFER.encode(), version, UPGRADE, length)
    last = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" if version == b"1.1" else b""
    received = request(turning_server, head + body + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200"] * (2 if last else 1)
    assert b'"data":[%d]' % QUICK in received


def test_wishes_for_another_protocol_one_behind_the_other_are_refused(turning_server: ServerProcess) -> None:
    received = request(turning_server, b"GET /live HTTP/1.1\r\nhost: x\r\n%s\r\n" % UPGRADE * 1000)
    assert re.findall(rb"HTTP/1.1 (\d+)", received)[-1:] == [b"400"]
    assert turning_server.errors() == ""


def test_what_is_not_http_is_told_so_in_the_shape_of_every_error(turning_server: ServerProcess) -> None:
    head, _, body = request(turning_server, b"POST /predict HTTP/9.9\r\n\r\n").partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert json.loads(body) == {"error": "Invalid HTTP request received."}


def test_a_client_that_leaves_with_requests_one_behind_the_other_is_no_error(turner: Path) -> None:
    with HeldServer(turner, runners=1, request_timeout_ms=HOUR_MS).ready() as server:
        body = infer_body(QUICK)
        request = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (INFER.encode(), len(body), body)
        with server.runs_held():
            with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as client:
                client.sendall(request * 3)
                await_traffic(server, in_flight=1, waiting=0)
                await_beats(server.port)
            await_traffic(server, in_flight=0, waiting=0)
        server.terminate()
        assert server.wait() == 0
        assert [line for line in server.logs() if line["level"] == "error"] == []


def test_an_idle_connection_is_kept_open_for_the_next_request(turning_server: ServerProcess) -> None:
    with connected(turning_server.port) as (client,):
        assert client.ask("/live")[0] == 200
        kept = client.sock
        for _ in range(20):
            status, headers, _ = client.ask(INFER, infer_body(QUICK))
            assert (status, headers.get("connection")) == (200, None)
        assert client.sock is kept


def test_clients_may_be_as_many_as_the_system_lets_them() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        server = ServerProcess()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with server.ready():
        assert server.metric("process_max_fds") == hard


# --- draining and ending ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_under_load_a_signal_loses_no_accepted_request(number: signal.Signals) -> None:
    answered: dict[str, int] = {}
    unanswered: set[str] = set()
    lock = threading.Lock()
    enough = threading.Semaphore(0)

    def client(port: int, name: int) -> None:
        """Asks again and again on one connection, until it is refused or the server is gone."""
        with connected(port) as (connection,):
            for turn in range(100_000):
                request_id = f"client-{name}-{turn}"
                try:
                    status, headers, _ = connection.ask("/predict", TEXT, **{"x-request-id": request_id})
                except (OSError, http.client.HTTPException):
                    with lock:
                        unanswered.add(request_id)
                    return
                assert headers["x-request-id"] == request_id
                with lock:
                    answered[request_id] = status
                enough.release()
                if status != 200:
                    assert status == 503
                    assert headers["connection"] == "close"
                    assert int(headers["retry-after"]) >= 1
                    return

    with ServerProcess(request_timeout_ms=HOUR_MS).ready() as server:
        with ThreadPoolExecutor(16) as clients:
            ends = [clients.submit(client, server.port, name) for name in range(16)]
            for _ in range(200):
                assert enough.acquire(timeout=PATIENCE_SECONDS)
            server.process.send_signal(number)
            assert server.wait() == 0
            for end in ends:
                end.result()
        logged = {line["request_id"]: line["status"] for line in server.logs() if line["event"] == "request"}
        assert set(logged.values()) <= {200, 503}
        assert not unanswered & set(logged), "accepted, but not answered"
        assert answered == logged
        assert "drain timeout" not in events(server)
        assert server.errors() == ""


def test_while_an_accepted_request_drains_new_ones_are_refused_on_open_and_new_connections(turner: Path) -> None:
    body = infer_body(QUICK)
    with (
        ServerProcess(turner, request_timeout_ms=HOUR_MS, drain_timeout_seconds=600).ready() as server,
        connected(server.port, 5) as (accepted, asking, probing, idle, late),
    ):
        accepted.begin(INFER, body, part=10)
        for connection in (asking, probing, idle):
            assert connection.ask("/live")[0] == 200
        await_traffic(server, in_flight=1, waiting=0)
        server.terminate()
        assert await_event(server, "draining")["in_flight"] == 1
        # The signal is known: nobody is sent here any more.
        status, headers, content = probing.ask("/ready")
        assert (status, content["stage"], headers["connection"]) == (503, "draining", "close")
        # On a connection that was open before, and on a new one.
        for connection in (asking, late):
            status, headers, content = connection.ask(INFER, body)
            assert (status, list(content)) == (503, ["error"])
            assert headers["connection"] == "close"
            assert int(headers["retry-after"]) >= 1
        assert server.get("/live").status_code == 200
        assert gauges(server)["model_ready"] == 0
        assert server.metric("inference_rejected_total", reason="draining") == 2
        assert server.process.poll() is None, "it waits for what it accepted"
        accepted.send(body[10:])
        status, headers, content = accepted.answer()
        assert (status, content["outputs"][0]["data"]) == (200, [QUICK])
        assert headers["connection"] == "close"
        assert server.wait() == 0
        # An idle connection held nothing up.
        assert idle.sock.recv(1) == b""
        assert "drain timeout" not in events(server)


def test_with_a_delay_clients_on_open_connections_are_answered_and_sent_away_before_anything_is_refused(
    turner: Path,
) -> None:
    """What a rolling update needs: a proxy keeps sending to a Pod on connections that it has open."""
    with ServerProcess(turner, drain_delay_seconds=600).ready() as server, connected(server.port, 3) as clients:
        asking, probing, late = clients
        assert asking.ask(INFER, infer_body(QUICK))[1].get("connection") is None
        server.terminate()
        await_event(server, "draining")
        status, headers, content = probing.ask("/ready")
        assert (status, content["stage"], headers["connection"]) == (503, "draining", "close")
        for client in (asking, late):
            status, headers, content = client.ask(INFER, infer_body(QUICK))
            assert (status, content["outputs"][0]["data"]) == (200, [QUICK])
            assert headers["connection"] == "close"
        # The second signal ends the wait.
        server.terminate()
        assert server.wait() == 0


def test_what_runs_and_what_waits_is_answered_before_the_process_ends(turner: Path, pool: ThreadPoolExecutor) -> None:
    with HeldServer(turner, runners=1, request_timeout_ms=HOUR_MS, drain_timeout_seconds=600).ready() as server:
        with server.runs_held():
            answers = [occupy(server, pool)]
            answers += [pool.submit(post, server, INFER, infer_body(number)) for number in range(6)]
            await_traffic(server, in_flight=7, waiting=6)
            server.terminate()
            await_event(server, "draining")
        assert [answer.result().status_code for answer in answers] == [200] * 7
        assert [answer.result().json()["outputs"][0]["data"] for answer in answers[1:]] == [[n] for n in range(6)]
        assert server.wait() == 0


def test_an_idle_server_ends_at_once_with_exit_code_0(turner: Path) -> None:
    with ServerProcess(turner, drain_timeout_seconds=3600).ready() as server, connected(server.port) as (idle,):
        assert idle.ask("/live")[0] == 200
        server.terminate()
        assert server.wait() == 0
        assert server.errors() == ""
        assert events(server)[-1] != "drain timeout"


def test_a_drain_lasts_no_longer_than_it_may(turner: Path) -> None:
    with ServerProcess(turner, runners=1, request_timeout_ms=HOUR_MS, drain_timeout_seconds=0.5).ready() as server:
        with connected(server.port) as (client,):
            client.begin(INFER, infer_body(ENDLESS), part=10_000)
            await_traffic(server, in_flight=1, waiting=0)
            server.terminate()
            status, headers, content = client.answer()
            assert (status, list(content), headers["connection"]) == (503, ["error"], "close")
            assert server.wait() == 0
        assert await_event(server, "drain timeout")["in_flight"] == 1
        assert "Traceback" not in server.errors()


def test_a_deadline_that_passes_during_the_drain_ends_it(turner: Path) -> None:
    with ServerProcess(turner, runners=1, request_timeout_ms=HOUR_MS, drain_timeout_seconds=3600).ready() as server:
        body = infer_body(ENDLESS, timeout_ms=1000)
        with connected(server.port) as (client,):
            # Its deadline counts from its first byte, and is known when all of it has come.
            client.begin(INFER, body, part=10)
            await_traffic(server, in_flight=1, waiting=0)
            server.terminate()
            await_event(server, "draining")
            client.send(body[10:])
            assert client.answer()[0] == 504
            assert server.wait() == 0
        assert "drain timeout" not in events(server)


def test_a_client_that_leaves_during_the_drain_ends_it(turner: Path) -> None:
    with (
        ServerProcess(turner, runners=1, request_timeout_ms=HOUR_MS, drain_timeout_seconds=3600).ready() as server,
        connected(server.port) as (client,),
    ):
        client.begin(INFER, infer_body(ENDLESS), part=10_000)
        await_traffic(server, in_flight=1, waiting=0)
        server.terminate()
        await_event(server, "draining")
        client.vanish(reset=False)
        assert server.wait() == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_without_waiting(turner: Path, second: signal.Signals) -> None:
    with ServerProcess(turner, runners=1, request_timeout_ms=HOUR_MS, drain_timeout_seconds=3600).ready() as server:
        with connected(server.port) as (client,):
            client.begin(INFER, infer_body(ENDLESS), part=10_000)
            await_traffic(server, in_flight=1, waiting=0)
            server.terminate()
            await_event(server, "draining")
            server.process.send_signal(second)
            assert server.wait() == 0
        assert "Traceback" not in server.errors()


# --- under another server's command line ------------------------------------------------------------------------------


@contextmanager
def uvicorn_with_the_factory(**settings: object) -> Iterator[tuple[subprocess.Popen[bytes], int, Callable[[], str]]]:
    """`uvicorn app.main:create_app --factory`: its process, its port, what it wrote."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("APP_")}
    chosen = {"APP_PROVIDER": "cpu"} | {f"APP_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port)]
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=clean | chosen, stdout=output, stderr=output)
        try:
            yield process, port, lambda: Path(f"/proc/self/fd/{output.fileno()}").read_text()
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def test_uvicorn_serves_the_factory_and_a_signal_loses_no_accepted_request(turner: Path) -> None:
    body = infer_body(QUICK)
    with uvicorn_with_the_factory(model_dir=turner, request_timeout_ms=HOUR_MS) as (process, port, output):

        def is_ready() -> bool:
            assert process.poll() is None, output()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready)
        with connected(port, 2) as (accepted, other):
            assert other.ask(INFER, body)[0] == 200
            accepted.begin(INFER, body, part=10)
            while b"inference_requests_in_flight 1.0" not in httpx.get(f"http://127.0.0.1:{port}/metrics").content:
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            accepted.send(body[10:])
            assert accepted.answer()[0] == 200
        process.wait(START_SECONDS)


@pytest.mark.parametrize(
    ("settings", "code", "names"),
    [
        ({"model_dir": "/nonexistent/artifact"}, 3, "/nonexistent/artifact"),
        ({"max_queue_rows": "many"}, 2, "APP_MAX_QUEUE_ROWS"),
    ],
)
def test_under_uvicorn_what_cannot_start_ends_with_its_own_exit_code_and_one_line(
    settings: dict[str, str], code: int, names: str
) -> None:
    with uvicorn_with_the_factory(**settings) as (process, _, output):
        assert process.wait(START_SECONDS) == code
        (line,) = [line for line in output().splitlines() if line.startswith("sentiment-inference:")]
        assert names in line
        assert "Traceback" not in output()
