"""The service's own routes over real server processes: predictions, their headers, and every refusal of the contract.

Whatever is refused or fails, no word of the input is repeated in an answer or in what the server writes.
"""

import asyncio
import gzip
import json
import re
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import onnx_models
from tests.process import ServerProcess, await_beats, free_port
from tests.text_model import MAX_TOKENS, NAME, VERSION

MAX_BODY_BYTES = 20_000
MAX_QUEUE_ROWS = 20
POSITIVE = "What a delightful little shop, I love everything about it!"
NEGATIVE = "Horrible service, the worst meal I have ever had."
# In no message, path or library that the server could mention by itself.
SECRET = "quixotrywarble"
# Beyond any wait on a busy machine; nothing here takes that long.
LONG_SECONDS = 120
PATIENT = {"request_timeout_ms": LONG_SECONDS * 1000}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The text model behind limits small enough to reach."""
    with ServerProcess(max_body_bytes=MAX_BODY_BYTES, max_queue_rows=MAX_QUEUE_ROWS, **PATIENT) as process:
        yield process.ready()


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    """A server that waits only 300 ms for anything."""
    with ServerProcess(request_timeout_ms=300) as process:
        yield process.ready()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=LONG_SECONDS) as client:
        yield client


def slow(path: Path) -> Path:
    """turns int64 [rows] → same float32 [rows]; takes as long as the largest number of turns, each a matrix product."""
    size = 64
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["before", "weights"], ["after"]),
            helper.make_node("Identity", ["going"], ["on"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [size, size]),
        ],
    )
    return onnx_models.save(
        path,
        [
            helper.make_node("ReduceMax", ["turns"], ["most"], keepdims=0),
            helper.make_node("Loop", ["most", "yes", "zeros"], ["state"], body=body),
            helper.make_node("ReduceSum", ["state"], ["nothing"], keepdims=0),
            helper.make_node("Cast", ["turns"], ["numbers"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["numbers", "nothing"], ["same"]),
        ],
        [onnx_models.tensor("turns", ["rows"], TensorProto.INT64)],
        [onnx_models.tensor("same", ["rows"])],
        weights=np.ones((size, size), np.float32),
        zeros=np.zeros((size, size), np.float32),
        yes=np.array(True),
    )


def turns_input(*turns: int) -> dict:
    return {"name": "turns", "datatype": "INT64", "shape": [len(turns)], "data": turns}


# Turns that no test waits for: the server is killed long before.
FOREVER = 10**12


def refused(response: httpx.Response, status: int) -> str:
    """Asserts the status and the one shape of errors; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert list(content) == ["error"]
    assert content["error"]
    assert SECRET not in response.text
    return content["error"]


class Wire:
    """One connection, byte by byte, for what no well-behaved client would send."""

    def __init__(self, server: ServerProcess) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=LONG_SECONDS)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, path: str, *lines: str, body: bytes = b"") -> None:
        head = "\r\n".join([f"POST {path} HTTP/1.1", "host: test", "content-type: application/json", *lines, "", ""])
        self._socket.sendall(head.encode("latin-1") + body)

    def more(self, body: bytes) -> None:
        self._socket.sendall(body)

    def answer_until_closed(self) -> httpx.Response:
        """The answer, once the server has ended the connection."""
        received = bytearray()
        while chunk := self._socket.recv(65536):
            received += chunk
        head, _, body = bytes(received).partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return httpx.Response(int(status.split()[1]), headers=headers, content=body)


# Predictions.


@pytest.mark.parametrize(("text", "label"), [(POSITIVE, "positive"), (NEGATIVE, "negative")])
def test_a_polar_sentence_gets_its_label_and_a_score(client, text, label):
    response = client.post("/predict", json={"text": text})
    assert response.status_code == 200
    content = response.json()
    assert set(content) == {"label", "score"}
    assert content["label"] == label
    assert 0.5 < content["score"] <= 1


def test_a_batch_is_answered_in_order(client):
    texts = [NEGATIVE, POSITIVE, POSITIVE, NEGATIVE, POSITIVE * 3, NEGATIVE, POSITIVE, NEGATIVE * 4, NEGATIVE, POSITIVE]
    predictions = client.post("/predict/batch", json={"texts": texts}).json()["predictions"]
    expected = ["positive" if text.startswith(POSITIVE) else "negative" for text in texts]
    assert [prediction["label"] for prediction in predictions] == expected


def test_a_batch_of_one_is_answered_as_the_text_alone(client):
    alone = client.post("/predict", json={"text": POSITIVE}).json()
    assert client.post("/predict/batch", json={"texts": [POSITIVE]}).json() == {"predictions": [alone]}


def test_a_batch_as_large_as_the_queue_is_answered_whole(client):
    response = client.post("/predict/batch", json={"texts": [POSITIVE] * MAX_QUEUE_ROWS})
    assert len(response.json()["predictions"]) == MAX_QUEUE_ROWS


def test_a_text_beyond_the_models_window_is_answered_and_flagged(client):
    longer = "good " * (MAX_TOKENS + 1)
    assert client.post("/predict", json={"text": longer}).json()["truncated"] is True
    predictions = client.post("/predict/batch", json={"texts": [POSITIVE, longer]}).json()["predictions"]
    assert ["truncated" in prediction for prediction in predictions] == [False, True]


@pytest.mark.parametrize("text", ["k", "👍", "¿Qué?", "很好", "a\0b", "\u202e.", "e\u0301" * 50, "x" * 9000], ids=ascii)
def test_any_text_that_is_not_blank_is_answered(client, text):
    assert client.post("/predict", json={"text": text}).status_code == 200


def test_fields_that_nobody_asked_for_are_ignored(client):
    assert client.post("/predict", json={"text": POSITIVE, SECRET: 1}).status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_recognised_however_it_is_written(client, kind):
    body = json.dumps({"text": POSITIVE})
    assert client.post("/predict", content=body, headers={"content-type": kind}).status_code == 200


def test_a_body_may_come_in_chunks(client):
    chunks = (bytes([byte]) for byte in json.dumps({"text": POSITIVE}).encode())
    assert client.post("/predict", content=chunks, headers=JSON).json()["label"] == "positive"


# Headers.


@pytest.mark.parametrize(
    ("path", "body"), [("/predict", {"text": POSITIVE}), ("/predict/batch", {"texts": [POSITIVE]})]
)
def test_an_answer_names_its_model_and_its_times(client, path, body):
    headers = client.post(path, json=body).headers
    assert headers["x-model"] == f"{NAME}/{VERSION}"
    times = re.fullmatch(r"queue;dur=(\d+\.?\d*), inference;dur=(\d+\.?\d*)", headers["server-timing"])
    assert times is not None
    assert float(times[2]) > 0


@pytest.mark.parametrize("given", ["a", "req-1.2_3:4/5+6=7@8", "0" * 128])
def test_a_request_id_is_taken_over(client, given):
    response = client.post("/predict", json={"text": POSITIVE}, headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "0" * 129, "two words", "a\tb", "<b>", 'quote"', "é", "a;b", "{}"], ids=ascii)
def test_a_request_id_that_could_harm_a_log_is_replaced(client, given):
    headers = {"x-request-id": given.encode("latin-1")}
    found = client.post("/predict", json={"text": POSITIVE}, headers=headers).headers["x-request-id"]
    assert re.fullmatch(r"[A-Za-z0-9-]{8,128}", found)
    assert found != given


def test_requests_without_an_id_get_one_each(client):
    found = {client.post("/predict", json={"text": POSITIVE}).headers["x-request-id"] for _ in range(3)}
    assert len(found) == 3


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("GET", "/predict"), ("GET", "/nowhere")])
def test_refusals_carry_the_request_id_too(client, method, path):
    assert client.request(method, path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


async def test_the_log_line_of_a_request_carries_its_id_and_its_cost(server, client):
    client.post("/predict", json={"text": POSITIVE}, headers={"x-request-id": "log-me"})

    def lines() -> list[dict]:
        return [line for line in server.logs() if line.get("request_id") == "log-me"]

    # Written after the answer.
    await until(lambda: bool(lines()))
    (line,) = lines()
    assert (line["route"], line["status"], line["rows"]) == ("/predict", 200, 1)
    assert line["tokens"] > 1
    assert (line["model"], line["model_version"]) == (NAME, VERSION)


# Refusals.

# FIELD and VALUE stand for what the route asks for, so that nothing else is wrong.
NO_JSON = {
    "nothing": b"",
    "half an object": b"{FIELD: VALUE",
    "a word": SECRET.encode(),
    "a word before the object": SECRET.encode() + b"{FIELD: VALUE}",
    "a word after the object": b"{FIELD: VALUE} " + SECRET.encode(),
    "two objects": b"{FIELD: VALUE}{FIELD: VALUE}",
    "a trailing comma": b"{FIELD: VALUE,}",
    "single quotes": b"{FIELD: '" + SECRET.encode() + b"'}",
    "UTF-16": json.dumps({"text": SECRET}).encode("utf-16"),
    "a line break in a string": b'{FIELD: VALUE, "more": "\n"}',
    "brackets without end": b'{FIELD: VALUE, "more": ' + b"[" * 15_000,
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON)
def test_a_body_that_is_no_json_is_a_bad_request(client, body):
    for path, field, value in (("/predict", "text", SECRET), ("/predict/batch", "texts", [SECRET])):
        content = body.replace(b"FIELD", json.dumps(field).encode()).replace(b"VALUE", json.dumps(value).encode())
        refused(client.post(path, content=content, headers=JSON), 400)


@pytest.mark.parametrize(("path", "body"), [("/predict", b'{"text": "%s"}'), ("/predict/batch", b'{"texts": ["%s"]}')])
def test_text_that_is_not_utf8_is_a_bad_request(client, path, body):
    refused(client.post(path, content=body % (SECRET.encode() + b"\xff"), headers=JSON), 400)


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", f"/v2/models/{NAME}/infer"])
@pytest.mark.parametrize("ending", ["%0A", "%00", "%20", "%2F", "/"])
def test_a_path_that_only_almost_is_a_route_is_no_server_error(client, path, ending):
    assert client.post(path + ending, json={"text": SECRET}).status_code == 404


def test_brackets_without_end_are_refused(client):
    response = client.post("/predict", content=b"[" * 15_000, headers=JSON)
    assert response.status_code in (400, 422)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        SECRET,
        None,
        {SECRET: SECRET},
        {"text": None},
        {"text": 1},
        {"text": [SECRET]},
        {"text": {SECRET: SECRET}},
        {"texts": [SECRET]},
        {"text": ""},
        {"text": " "},
        {"text": "\t\r\n\u00a0\u2003\u3000"},
    ],
    ids=ascii,
)
def test_a_prediction_without_a_text_that_says_something_is_invalid(client, body):
    refused(client.post("/predict", content=json.dumps(body), headers=JSON), 422)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [SECRET],
        {"text": SECRET},
        {"texts": []},
        {"texts": SECRET},
        {"texts": {SECRET: SECRET}},
        {"texts": [SECRET, 1]},
        {"texts": [SECRET, None]},
        {"texts": [SECRET, ""]},
        {"texts": ["\n", SECRET]},
        {"texts": [[SECRET]]},
    ],
    ids=ascii,
)
def test_a_batch_with_anything_but_texts_that_say_something_is_invalid_as_a_whole(client, body):
    refused(client.post("/predict/batch", json=body), 422)


@pytest.mark.parametrize("escape", [r"\ud83d", r"\ude00", r"\ud83d\u0041", r"\ude00\ud83d"])
def test_half_an_emoji_is_refused(client, escape):
    body = f'{{"text": "{SECRET} {escape}"}}'
    assert client.post("/predict", content=body, headers=JSON).status_code in (400, 422)
    body = f'{{"texts": ["fine", "{SECRET} {escape}"]}}'
    response = client.post("/predict/batch", content=body, headers=JSON)
    refused(response, 400 if response.status_code == 400 else 422)


def test_a_whole_emoji_may_be_escaped(client):
    body = r'{"text": "I love it \ud83d\ude00"}'
    assert client.post("/predict", content=body, headers=JSON).json()["label"] == "positive"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", SECRET])
def test_another_content_type_is_unsupported(client, kind):
    body = json.dumps({"text": SECRET})
    refused(client.post("/predict", content=body, headers={"content-type": kind}), 415)
    refused(client.post("/predict/batch", content=body, headers={"content-type": kind}), 415)


def test_no_content_type_is_unsupported(client):
    refused(client.post("/predict", content=json.dumps({"text": SECRET})), 415)


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("coding", PACKED)
def test_a_packed_body_is_answered_as_it_would_be_plain(client, coding):
    headers = {**JSON, "content-encoding": coding}
    for path, body in (("/predict", {"text": POSITIVE}), ("/predict/batch", {"texts": [POSITIVE, NEGATIVE]})):
        packed = PACKED[coding](json.dumps(body).encode())
        plain = client.post(path, json=body).json()
        assert client.post(path, content=packed, headers=headers).json() == plain
        chunks = (packed[index : index + 7] for index in range(0, len(packed), 7))
        assert client.post(path, content=chunks, headers=headers).json() == plain


@pytest.mark.parametrize("coding", PACKED)
def test_a_packed_body_is_bounded_by_what_it_unpacks_to(client, coding):
    headers = {**JSON, "content-encoding": coding}
    body = json.dumps({"text": POSITIVE}).encode().ljust(MAX_BODY_BYTES)
    assert client.post("/predict", content=PACKED[coding](body), headers=headers).status_code == 200
    refused(client.post("/predict", content=PACKED[coding](body + b" "), headers=headers), 413)
    refused(client.post("/predict", content=PACKED[coding](bytes(1000 * MAX_BODY_BYTES)), headers=headers), 413)


@pytest.mark.parametrize("coding", PACKED)
def test_a_body_that_is_not_packed_as_it_says_is_a_bad_request(client, coding):
    packed = PACKED[coding](json.dumps({"text": SECRET}).encode())
    for body in (packed[:-1], packed + b"x", SECRET.encode(), b""):
        refused(client.post("/predict", content=body, headers={**JSON, "content-encoding": coding}), 400)


@pytest.mark.parametrize("coding", ["br", SECRET])
def test_a_body_in_another_packing_is_unsupported(client, coding):
    body = gzip.compress(json.dumps({"text": SECRET}).encode())
    refused(client.post("/predict", content=body, headers={**JSON, "content-encoding": coding}), 415)


def test_a_route_that_does_not_exist_is_not_found(client):
    refused(client.get(f"/{SECRET}"), 404)
    refused(client.post(f"/predict/{SECRET}", json={"text": SECRET}), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict", "POST"),
        ("PUT", "/predict/batch", "POST"),
        ("DELETE", "/predict", "POST"),
        ("POST", "/ready", "GET"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_another_method_is_not_allowed(client, method, path, allowed):
    response = client.request(method, path, content=json.dumps({"text": SECRET}), headers=JSON)
    refused(response, 405)
    assert allowed in response.headers["allow"]


def test_more_rows_than_the_queue_can_ever_hold_are_too_many(client):
    message = refused(client.post("/predict/batch", json={"texts": [SECRET] * (MAX_QUEUE_ROWS + 1)}), 429)
    assert str(MAX_QUEUE_ROWS) in message


def test_a_body_of_exactly_the_limit_is_read(client):
    body = json.dumps({"text": POSITIVE}).encode().ljust(MAX_BODY_BYTES)
    assert client.post("/predict", content=body, headers=JSON).status_code == 200
    refused(client.post("/predict", content=body + b" ", headers=JSON), 413)


def test_a_body_declared_too_large_is_refused_before_it_is_sent(server):
    with Wire(server) as wire:
        wire.send("/predict", "content-length: 1000000000000")
        response = wire.answer_until_closed()
    refused(response, 413)
    assert response.headers["connection"] == "close"


def test_a_body_that_grows_too_large_is_refused_before_it_ends(server):
    with Wire(server) as wire:
        wire.send("/predict", "transfer-encoding: chunked")
        chunk = SECRET.encode() * 100
        for _ in range(MAX_BODY_BYTES // len(chunk) + 1):
            wire.more(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        # No last chunk: the answer comes while the body is still under way.
        response = wire.answer_until_closed()
    refused(response, 413)
    assert response.headers["connection"] == "close"


def test_a_protocol_body_too_large_is_refused_too(server):
    with Wire(server) as wire:
        wire.send(f"/v2/models/{NAME}/infer", f"content-length: {MAX_BODY_BYTES + 1}")
        refused(wire.answer_until_closed(), 413)


@pytest.mark.parametrize("path", ["/predict", "/predict/batch", f"/v2/models/{NAME}/infer"])
def test_a_body_that_does_not_arrive_in_time_is_given_up(impatient, path):
    with Wire(impatient) as wire:
        wire.send(path, "content-length: 1000", body=b'{"text": "%s' % SECRET.encode())
        response = wire.answer_until_closed()
    refused(response, 408)
    assert response.headers["connection"] == "close"


def test_a_body_that_trickles_in_is_given_up_all_the_same(impatient):
    with Wire(impatient) as wire:
        wire.send("/predict", "transfer-encoding: chunked", body=b"1\r\n{\r\n1\r\n \r\n")
        refused(wire.answer_until_closed(), 408)


def test_a_refused_request_leaves_the_connection_usable(server):
    with httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=1), timeout=LONG_SECONDS) as client:
        addresses = set()
        for path, body, status in [
            ("/predict", b"{", 400),
            ("/predict", b"{}", 422),
            ("/predict/batch", json.dumps({"texts": ["a"] * (MAX_QUEUE_ROWS + 1)}).encode(), 429),
            ("/nowhere", b"{}", 404),
            ("/ready", b"{}", 405),
            ("/predict", json.dumps({"text": POSITIVE}).encode(), 200),
        ]:
            with client.stream("POST", path, content=body, headers=JSON) as response:
                response.read()
                addresses.add(response.extensions["network_stream"].get_extra_info("client_addr"))
                assert response.status_code == status
        assert len(addresses) == 1


def test_bytes_that_are_no_http_do_not_harm_the_server(server, client):
    for junk in (
        b"\0\1\2\3\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
    ):
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=LONG_SECONDS)) as connection:
            connection.sendall(junk)
            while connection.recv(65536):
                pass
    assert client.get("/live").status_code == 200


# Too much at once: 503 and 504, with a model that takes as long as it is told.


@pytest.fixture(scope="module")
def slow_folder(package: Callable[..., Path]) -> Path:
    return package(slow, "slow")


@pytest.fixture
async def busy(slow_folder: Path) -> AsyncIterator[tuple[ServerProcess, Callable[..., Any]]]:
    """A server whose only runner is in an endless run and whose queue has two places, and a way to infer there."""
    endless = json.dumps({"inputs": [turns_input(FOREVER)]}).encode()
    with ServerProcess(slow_folder, runners=1, max_queue_rows=2, **PATIENT) as process:
        async with requester(process.ready()) as infer:
            with Wire(process) as wire:
                wire.send("/v2/models/slow/infer", f"content-length: {len(endless)}", body=endless)
                # It came in one piece, so what is in flight is in the queue; and then the runner has it.
                await until(lambda: process.metric("inference_requests_in_flight") == 1)
                await until(lambda: process.metric("inference_queue_rows") == 0)
                yield process, infer


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    async with asyncio.timeout(LONG_SECONDS):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


@asynccontextmanager
async def requester(process: ServerProcess) -> AsyncIterator[Callable[..., Any]]:
    """`await infer(turns, timeout_us=…)` against the slow model."""
    async with httpx.AsyncClient(base_url=process.url, timeout=LONG_SECONDS) as client:

        async def infer(*turns: int, timeout_us: int | None = None) -> httpx.Response:
            parameters = {} if timeout_us is None else {"timeout": timeout_us}
            body = {"inputs": [turns_input(*turns)], "parameters": parameters}
            return await client.post("/v2/models/slow/infer", json=body)

        yield infer


async def test_a_run_that_outlasts_the_deadline_is_answered_504(slow_folder):
    with ServerProcess(slow_folder, runners=1, request_timeout_ms=1000) as process:
        async with requester(process.ready()) as infer:
            refused(await infer(FOREVER), 504)


async def test_a_row_that_waits_beyond_its_own_deadline_is_answered_504(busy):
    _, infer = busy
    refused(await infer(1, timeout_us=100_000), 504)


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(busy):
    process, infer = busy
    waiting = [asyncio.create_task(infer(1)) for _ in range(2)]
    await until(lambda: process.metric("inference_queue_rows") == 2)
    response = await infer(1)
    refused(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    assert process.metric("inference_rejected_total", reason="queue_full") == 1
    # The request itself was fine, and those that wait still do.
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_a_client_that_leaves_frees_its_place_in_the_queue(busy):
    process, infer = busy
    waiting = [asyncio.create_task(infer(1)) for _ in range(2)]
    await until(lambda: process.metric("inference_queue_rows") == 2)
    await_beats(process.port)
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await until(lambda: process.metric("inference_requests_in_flight") == 1)
    # Not 503 for a full queue: it is let in, and then waits too long.
    refused(await infer(1, timeout_us=100_000), 504)


async def test_a_request_that_could_not_be_answered_in_time_is_refused_at_the_door(busy):
    process, infer = busy
    waiting = asyncio.create_task(infer(1))
    await until(lambda: process.metric("inference_queue_rows") == 1)
    response = await infer(1, timeout_us=1)
    refused(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    assert process.metric("inference_rejected_total", reason="late") == 1
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_more_rows_than_the_queue_can_ever_hold_are_too_many_even_when_it_is_empty(busy):
    _, infer = busy
    refused(await infer(1, 1, 1), 429)


# Nothing of what clients send is repeated.


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_answer_and_nothing_the_server_writes_contains_a_word_of_the_input(package, log_format):
    words = {place: f"zyx{place}qvw" for place in "abcdefghijklmnopq"}
    text = f"{words['a']} {words['b']}"
    model = f"/v2/models/{NAME}"
    spec = {"name": words["c"], "datatype": words["d"], "shape": [1], "data": [words["e"]]}
    text_spec = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    attempts: list[tuple[str, bytes | dict, dict[str, str]]] = [
        ("/predict", {"text": text}, JSON),
        ("/predict", {"text": text * 500}, JSON),
        ("/predict", {words["f"]: text}, JSON),
        ("/predict", {"text": {words["f"]: text}}, JSON),
        ("/predict", {"text": [text]}, JSON),
        ("/predict", text.encode(), JSON),
        ("/predict", f'{{"text": "{text}'.encode(), JSON),
        ("/predict", f'{{"text": "{text} \\ud800"}}'.encode(), JSON),
        ("/predict", text.encode() + b"\xff", JSON),
        ("/predict", {"text": text}, {"content-type": f"text/{words['g']}"}),
        ("/predict", {"text": text}, {**JSON, "content-encoding": words["g"]}),
        ("/predict", {"text": text}, {**JSON, "x-request-id": f"{words['h']} and more"}),
        (f"/predict?{words['i']}={words['i']}", {"text": text}, JSON),
        ("/predict/batch", {"texts": [text, 1]}, JSON),
        ("/predict/batch", {"texts": [text, ""]}, JSON),
        ("/predict/batch", {"texts": [text] * 10_000}, JSON),
        ("/predict/batch", {"texts": [text] * 1000}, JSON),
        (f"/{words['j']}", {"text": text}, JSON),
        (f"/v2/models/{words['j']}/infer", {"inputs": [text_spec]}, {}),
        (f"{model}/versions/{words['j']}/infer", {"inputs": [text_spec]}, {}),
        (f"{model}/infer", {"inputs": [text_spec], "id": words["k"], "parameters": {words["l"]: words["l"]}}, {}),
        (f"{model}/infer", {"inputs": [spec]}, {}),
        (f"{model}/infer", {"inputs": [{**spec, "datatype": "BYTES"}]}, {}),
        (f"{model}/infer", {"inputs": [{**spec, "datatype": "INT64"}]}, {}),
        (f"{model}/infer", {"inputs": [{**text_spec, "shape": [words["m"]]}]}, {}),
        (f"{model}/infer", {"inputs": [{**text_spec, "shape": [2]}]}, {}),
        (f"{model}/infer", {"inputs": [{**text_spec, "parameters": {"binary_data_size": words["m"]}}]}, {}),
        (f"{model}/infer", {"inputs": [text_spec], "outputs": [{"name": words["n"]}]}, {}),
        (f"{model}/infer", {"inputs": [text_spec], "parameters": {"timeout": words["n"]}}, {}),
        (f"{model}/infer", {"inputs": [text_spec], "parameters": words["n"]}, {}),
        (f"{model}/infer", {"inputs": [text_spec]}, {"inference-header-content-length": words["o"]}),
        (f"{model}/infer", {"inputs": [text_spec]}, {"inference-header-content-length": "12"}),
        (f"{model}/infer?{words['p']}", text.encode(), {}),
    ]
    statuses = set()
    said = ""
    port = free_port()
    settings = {"log_format": log_format, "log_level": "debug", "max_body_bytes": 100_000, "port": port, **PATIENT}
    with ServerProcess(**settings) as process:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=LONG_SECONDS) as client:
            wait_until_ready(client)
            for path, body, headers in attempts:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                response = client.post(path, content=content, headers=headers)
                statuses.add(response.status_code)
                # An answer may echo the request's own id, an error nothing.
                said += str(response.headers) + ("" if response.status_code == 200 else response.text)
        with closing(socket.create_connection(("127.0.0.1", port), timeout=LONG_SECONDS)) as connection:
            connection.sendall(f"{words['q']} /{words['q']} HTTP/1.1\r\n{words['q']}\r\n\r\n".encode())
            while chunk := connection.recv(65536):
                said += chunk.decode()
        process.terminate()
        process.wait(LONG_SECONDS)
        written = process.output() + process.errors()
    assert statuses == {200, 400, 404, 413, 415, 422, 429}
    assert written.count("/predict/batch") == 4
    assert [word for word in words.values() if word in said.lower()] == []
    assert [word for word in words.values() if word in written.lower()] == []


def test_a_run_that_fails_repeats_no_number_of_its_input(package):
    with ServerProcess(package(onnx_models.lookup, "lookup"), **PATIENT) as process:
        spec = {"name": "index", "datatype": "INT64", "shape": [1], "data": [7_340_339_127]}
        url = f"{process.ready().url}/v2/models/lookup/infer"
        response = httpx.post(url, json={"inputs": [spec]}, timeout=LONG_SECONDS)
        process.terminate()
        process.wait(LONG_SECONDS)
        written = process.output() + process.errors()
    assert "7340339" not in refused(response, 500)
    assert "7340339" not in written
    assert '"status":500' in written


def wait_until_ready(client: httpx.Client) -> None:
    while True:
        with suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.02)
