"""What a single client must not be able to do to a replica: take its memory, hold its connections, silence its probes.

Each attack's bytes go to a real process, which must answer probes all along and afterwards hold hardly more memory.
"""

import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper

from tests.onnx_models import save, tensor
from tests.process import ServerProcess
from tests.text_model import NAME

INFER = f"/v2/models/{NAME}/infer"
MAX_GROWTH_BYTES = 64 << 20
# While it lasts: a few bodies of the largest size, and what is made of them.
MAX_PEAK_BYTES = 128 << 20
PATIENCE_SECONDS = 60
HEAD = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


# How long an answer of /live may take. In `make test` no clock decides; `make soak` says half a second.
LIVE_WITHIN = [float(PATIENCE_SECONDS)]


@pytest.fixture(autouse=True, scope="module")
def live_within(request: pytest.FixtureRequest) -> None:
    LIVE_WITHIN[0] = request.config.getoption("--live-within-seconds")


@contextmanager
def probed(server: ServerProcess) -> Iterator[None]:
    """Asks /live ten times a second meanwhile, which must not take longer than `LIVE_WITHIN`; at the end nothing is in
    flight, and memory is much as it was and has been."""
    process = psutil.Process(server.process.pid)
    before, over, failures = process.memory_info().rss, threading.Event(), list[str]()
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak counts from now on

    def probe() -> None:
        with httpx.Client(timeout=LIVE_WITHIN[0]) as client:
            while not over.wait(0.1):
                try:
                    assert client.get(f"{server.url}/live").status_code == 200
                except (httpx.HTTPError, AssertionError) as error:
                    failures.append(repr(error))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert failures == []
    status = Path(f"/proc/{process.pid}/status").read_text()
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert int(peak_kib) * 1024 - before < MAX_PEAK_BYTES
    assert process.memory_info().rss - before < MAX_GROWTH_BYTES
    while server.metric("inference_requests_in_flight"):
        assert server.process.poll() is None


def connect(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS)


def send_until_closed(server: ServerProcess, start: bytes, piece: bytes, most_bytes: int) -> int:
    """Sends `piece` for as long as the server takes it; how many bytes it took. Fails if it took `most_bytes`."""
    sent = 0
    with connect(server) as client, suppress(ConnectionError):
        client.sendall(start)
        while sent < most_bytes:
            client.sendall(piece)
            sent += len(piece)
    assert sent < most_bytes, "the server goes on reading"
    return sent


CHUNKED = b"GET /live HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (CHUNKED + b"0\r\n", b"A:\r\n" * 1024),
        (CHUNKED + b"0\r\n", b"A" * 4096),
        (CHUNKED + b"0\r\n", b"A: " + b"b" * 4093),
        (CHUNKED, b"0" * 4096),
        (CHUNKED + b"1;", b"x" * 4096),
        (b"GET /live HTTP/1.1\r\n", b"A:b\r\n" * 1024),
        (b"GET /live HTTP/1.1\r\nx: ", b"x" * 4096),
        (b"GET /", b"x" * 4096),
    ],
    ids=["trailers", "a trailer's name", "a trailer's value", "a chunk's size", "a chunk's extension",
         "headers", "a header's value", "a path"],
)  # fmt: skip
def test_what_is_no_body_and_has_no_end_is_not_read_without_end(server, start, piece):
    with probed(server):
        for _ in range(4):
            send_until_closed(server, start, piece, 16 << 20)


def test_more_headers_than_anybody_needs_are_refused(server):
    with connect(server) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200 + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
    with connect(server) as client:
        client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50 + b"\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_trailers_behind_a_body_are_dropped_and_the_request_is_answered(server):
    body = b'{"text": "fine"}'
    chunks = b"%x\r\n%s\r\n0\r\nx-checksum: 1\r\nx-more: 2\r\n\r\n" % (len(body), body)
    with connect(server) as client:
        for _ in range(2):
            client.sendall(HEAD % b"/predict" + b"transfer-encoding: chunked\r\n\r\n" + chunks)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def text_input(**more: object) -> dict:
    return {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["fine"], **more}


@pytest.mark.parametrize(
    "content",
    [
        {"inputs": [text_input()], "outputs": [{"name": "probabilities"}] * 100_000},
        {"inputs": [text_input()], "id": "x" * 3_900_000},
        {"inputs": [text_input(shape=[1099511627776, 0], data=[])]},
        {"inputs": [text_input(shape=[0, 1099511627776], data=[])]},
        {"inputs": [text_input(shape=[10**400], data=[])]},
        {"inputs": [text_input()] * 5000},
    ],
    ids=["an output 100,000 times", "an id of 3.9 MB", "2^40 rows of nothing", "nothing of 2^40", "10^400 rows",
         "an input 5,000 times"],
)  # fmt: skip
def test_an_answer_or_a_row_that_the_question_does_not_pay_for_is_refused(server, content):
    with probed(server):
        for _ in range(4):
            response = httpx.post(server.url + INFER, json=content, timeout=PATIENCE_SECONDS)
            assert response.status_code in (400, 422)
            assert len(response.content) < 1000


@pytest.mark.parametrize(
    "text",
    ["a" * 10241 + " " + "!" * 600_000, "!" * 4_000_000, "a" * 4_000_000, " " * 3_999_990 + "a", "a " * 2_000_000],
    ids=["marks behind a long word", "marks", "one word", "blanks", "words"],
)
def test_a_text_of_any_kind_takes_hardly_any_memory(server, text):
    httpx.post(f"{server.url}/predict", json={"text": "b " * 2_000_000}, timeout=PATIENCE_SECONDS)
    with probed(server):
        for _ in range(2):
            response = httpx.post(f"{server.url}/predict", json={"text": text}, timeout=PATIENCE_SECONDS)
            assert response.status_code == 200
            assert response.json()["truncated"] is True


def test_a_bomb_is_not_unpacked(server):
    bomb = gzip.compress(bytes(400 << 20), 9)
    with probed(server):
        for _ in range(8):
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            response = httpx.post(f"{server.url}/predict", content=bomb, headers=headers, timeout=PATIENCE_SECONDS)
            assert response.status_code == 413


@pytest.mark.parametrize("path", [b"/predict/", b"/live/", b"//evil.example/predict", b"/v2/"])
def test_nobody_is_sent_anywhere_else(server, path):
    with connect(server) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 0\r\n\r\n" % path)
        answer = client.recv(65536)
    assert answer[9:12] in (b"404", b"405")
    assert b"location" not in answer.lower()


def test_who_sends_all_and_says_so_gets_the_answer(server):
    body = b'{"text": "fine"}'
    with connect(server) as client:
        client.sendall(HEAD % b"/predict" + b"content-length: %d\r\n\r\n" % len(body) + body)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(partial(client.recv, 65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/live", "/ready", "/v2/health/live", "/v2/health/ready", "/metrics"])
def test_a_head_request_is_answered_as_a_get_without_its_body(server, path):
    with httpx.Client(timeout=PATIENCE_SECONDS) as client:
        head = client.head(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
        got = client.get(server.url + path)
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("files", [64, 200])
def test_idle_connections_give_way_before_files_run_out(files):
    with ServerProcess(max_files=files) as server, ExitStack() as stack:
        server.ready()
        for _ in range(2 * files):
            stack.enter_context(connect(server)).sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n")
            assert server.get("/live").status_code == 200
        assert server.metric("http_connections_shed_total", reason="count") > files / 2
        assert server.metric("http_connections") < files
        assert server.metric("process_open_fds") < files
        lines = [line for line in server.logs() if line["event"] == "connection shed"]
    assert lines[0]["reason"] == "count"
    # Not one for each: they would be a log of the attack.
    assert len(lines) < files / 2


def test_a_burst_of_connections_leaves_room_for_who_comes_next(server):
    with ServerProcess(max_connections=100).ready() as server, ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(server))
        assert server.get("/live").status_code == 200
        assert server.metric("http_connections") <= 100


def test_idle_connections_cost_little(server):
    with probed(server), ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(server)).sendall(b"GET /live HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 4000)
        while server.metric("http_connections") < 1000:
            assert server.process.poll() is None


def test_requests_that_wait_behind_one_take_hardly_any_memory(server):
    with probed(server), ExitStack() as stack:
        for _ in range(100):
            client = stack.enter_context(connect(server))
            with suppress(ConnectionError):
                client.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n" * 8000)


@pytest.fixture(scope="module")
def tokens(package) -> Iterator[ServerProcess]:
    """A model whose rows may be of any length, and cost as much as their length squared."""
    with ServerProcess(package(attention), max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


def attention(path: Path) -> Path:
    """ids int64 [rows, length] → best float32 [rows, length]: of each with each other."""
    nodes = [
        helper.make_node("Cast", ["ids"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["values", "last"], ["column"]),
        helper.make_node("Unsqueeze", ["values", "middle"], ["line"]),
        helper.make_node("Mul", ["column", "line"], ["each"]),
        helper.make_node("ReduceMax", ["each"], ["best"], axes=[2], keepdims=0),
    ]
    ids, best = tensor("ids", ["rows", "length"], TensorProto.INT64), tensor("best", ["rows", "length"])
    return save(path, nodes, [ids], [best], last=np.array([2], np.int64), middle=np.array([1], np.int64))


def ask_for_rows(server: ServerProcess, rows: int, length: int) -> int:
    """The status of one request for so many rows of such a length."""
    data = np.ones((rows, length), np.int64).tobytes()
    spec = {"name": "ids", "datatype": "INT64", "shape": [rows, length], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [spec], "parameters": {"binary_data_output": True}}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    url = f"{server.url}/v2/models/test-model/infer"
    return httpx.post(url, content=head + data, headers=headers, timeout=PATIENCE_SECONDS).status_code


@pytest.mark.parametrize(
    ("rows", "length", "status"), [(1, 200_000, 422), (1, 2049, 422), (240, 2048, 200), (500, 900, 200)]
)
def test_a_row_of_a_length_that_the_client_chose_costs_no_more_than_any_may(tokens, rows, length, status):
    # The longest there may be, for each runner.
    for _ in range(4):
        assert ask_for_rows(tokens, 2, 2048) == 200
    with probed(tokens):
        for _ in range(3):
            assert ask_for_rows(tokens, rows, length) == status


@pytest.fixture
def unread(server) -> Callable[[int], list[socket.socket]]:
    """Connections whose clients ask for documents and read none of them."""

    def make(count: int) -> list[socket.socket]:
        clients = []
        for _ in range(count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 200)
            clients.append(client)
        return clients

    return make


def test_answers_that_nobody_reads_pile_up_nowhere(server, unread):
    with probed(server):
        clients = unread(60)
        assert httpx.post(f"{server.url}/predict", json={"text": "fine"}).status_code == 200
        for client in clients:
            client.close()


def many(piece: bytes, count: int) -> bytes:
    return b",".join([piece] * count)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [%s]}' % many(b'{"name":"a","datatype":"INT8","shape":[1],"data":[1]}', 75_000),
        b'{"inputs": [], "outputs": [%s]}' % many(b'{"name":""}', 340_000),
        b'{"inputs": [], "parameters": {%s}}' % many(b'"timeout":1', 340_000),
        b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [%s]}]}' % many(b'""', 1_390_000),
    ],
    ids=["inputs", "outputs", "parameters", "strings"],
)
def test_a_body_of_very_many_small_things_is_refused_before_they_are_made(server, body):
    with probed(server):
        for _ in range(4):
            response = httpx.post(server.url + INFER, content=body, timeout=PATIENCE_SECONDS)
            assert response.status_code == 422
            assert "strings in JSON" in response.json()["error"]


def test_probes_are_answered_while_numbers_that_are_hard_to_read_are_read(server):
    data = many(b"2.2250738585072011e-308", 170_000)
    body = b'{"inputs": [{"name": "text", "datatype": "FP64", "shape": [170000], "data": [%s]}]}' % data
    answered, over = [], threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_SECONDS) as client:
            while not over.is_set():
                answered.append(client.get("/live").status_code)

    thread = threading.Thread(target=probe)
    with connect(server) as client:
        client.sendall(HEAD % INFER.encode() + b"content-length: %d\r\n\r\n" % len(body) + body[:-1])
        thread.start()
        while len(answered) < 5:
            assert server.process.poll() is None
        before = len(answered)
        client.sendall(body[-1:])
        answer = client.recv(65536)
        after = len(answered)
        over.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 422 ")
    assert set(answered) == {200}
    # One may be on its way when reading begins, and one come back when it ends.
    assert after - before > 4
