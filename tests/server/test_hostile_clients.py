"""What a single client must not be able to do to a replica: take its memory, hold its connections, silence its probes.

Each attack's bytes go to a real process, which must answer probes all along and afterwards hold hardly more memory.
"""

import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
import pytest

from tests.process import ServerProcess
from tests.text_model import NAME

INFER = f"/v2/models/{NAME}/infer"
MAX_GROWTH_BYTES = 64 << 20
PATIENCE_SECONDS = 60
HEAD = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess(max_queue_wait_ms=600_000, request_timeout_ms=600_000) as process:
        yield process.ready()


@contextmanager
def probed(server: ServerProcess) -> Iterator[None]:
    """Asks /live again and again meanwhile; at the end nothing is in flight, and memory is much as it was."""
    process = psutil.Process(server.process.pid)
    before, over, failures = process.memory_info().rss, threading.Event(), list[str]()

    def probe() -> None:
        with httpx.Client(timeout=PATIENCE_SECONDS) as client:
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
