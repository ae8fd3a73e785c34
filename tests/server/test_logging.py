"""Logs: one line per inference request with all that an operator needs, and never a word of what a client sent.

Whoever reads them, or does not, changes nothing for clients.
"""

import asyncio
import fcntl
import io
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from app.batching.admission import Limits
from app.main import create_app
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.runtime.tasks import Encoded
from app.runtime.tasks.text_classification import TextClassification
from app.settings import Settings
from tests.process import ServerProcess, free_port
from tests.text_model import NAME, VERSION, text_model
from tests.unit.http.asgi import serve

INFER = f"/v2/models/{NAME}/infer"
FIELDS = {
    *("request_id", "route", "status", "duration_ms", "body_bytes", "rows", "tokens", "queue_ms", "inference_ms"),
    *("model", "model_version", "event", "level", "timestamp"),
}
# Words that are in no log line for any other reason.
SECRETS = ("zyzzyva", "quokka", "ptarmigan", "axolotl")
SECRET_TEXT = "The Zyzzyva told the quokka, “ptarmigan!” 🐧 axolotl"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def reviews() -> Model:
    return load_model(text_model())


def assert_no_secret(text: str) -> None:
    found = [word for word in SECRETS if word in text.lower()]
    assert not found, f"{found} in {text}"


def requests_in(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "request"]


def binary_infer(payload: bytes, **tensor: Any) -> tuple[bytes, dict[str, str]]:
    """A body with one BYTES tensor after its JSON header."""
    spec = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(payload)}}
    header = json.dumps({"inputs": [spec | tensor]}).encode()
    return header + payload, {"inference-header-content-length": str(len(header))}


# --- one line per request ---------------------------------------------------------------------------------------------


def test_each_inference_request_is_one_line_of_json_with_all_its_fields(server: ServerProcess) -> None:
    tokenizer = Tokenizer.from_file(str(text_model() / "tokenizer.json"))
    texts = ["a plain day", "rather a good one, as days go"]
    tokens = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    tensor = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": texts}]}
    sent = [
        ("/predict", "/predict", {"text": texts[0]}, 1, tokens[0]),
        ("/predict/batch", "/predict/batch", {"texts": texts}, 2, sum(tokens)),
        (INFER, "/v2/models/infer", tensor, 2, sum(tokens)),
    ]
    for number, (path, route, content, rows, count) in enumerate(sent):
        response = httpx.post(f"{server.url}{path}", json=content, headers={"x-request-id": f"each-{number}"})
        assert response.status_code == 200
        line = server.request_log(f"each-{number}")
        assert set(line) >= FIELDS
        assert (line["event"], line["level"], line["route"], line["status"]) == ("request", "info", route, 200)
        assert (line["rows"], line["tokens"], line["body_bytes"]) == (rows, count, len(response.request.content))
        assert (line["model"], line["model_version"]) == (NAME, VERSION)
        assert 0 <= line["queue_ms"] + line["inference_ms"] <= line["duration_ms"]
        assert line["inference_ms"] > 0
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)
        timing = dict(re.findall(r"(\w+);dur=([0-9.]+)", response.headers["server-timing"]))
        assert {name: float(value) for name, value in timing.items()} == {
            "queue": line["queue_ms"],
            "inference": line["inference_ms"],
        }


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[]", JSON, 422),
        (b'{"text": ""}', JSON, 422),
        (b'{"text": "x"}', {"content-type": "text/plain"}, 415),
        (b"x" * 5_000_000, JSON, 413),
    ],
)
def test_a_refused_request_is_logged_with_its_status_and_the_kind_of_error(
    server: ServerProcess, content: bytes, headers: dict[str, str], status: int
) -> None:
    name = f"refused-{status}-{len(content)}"
    response = httpx.post(f"{server.url}/predict", content=content, headers=headers | {"x-request-id": name})
    assert response.status_code == status
    line = server.request_log(name)
    assert line["status"] == status
    assert re.fullmatch("[A-Za-z]+", line["error"])


def test_a_generated_request_id_is_in_the_log_and_in_the_response(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/predict", json={"text": "which one was it?"})
    line = server.request_log(response.headers["x-request-id"])
    assert line["event"] == "request"


def test_everything_on_standard_output_is_a_json_object_per_line(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"NOT HTTP AT ALL\r\n\r\n")
        assert client.recv(1000)
    for line in server.output().splitlines():
        assert {"event", "level", "timestamp"} <= set(json.loads(line))
    assert server.errors() == ""


def test_probes_scrapes_and_other_pages_are_not_logged(server: ServerProcess) -> None:
    before = len(server.output())
    with httpx.Client(base_url=server.url) as http:
        for path in ("/live", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2", "/docs", "/nowhere"):
            for _ in range(3):
                http.get(path, headers={"x-request-id": "probe"})
    assert len(server.output()) == before


def test_startup_says_where_it_listens_and_what_it_serves(server: ServerProcess) -> None:
    lines = {line["event"]: line for line in server.logs()}
    assert lines["listening"]["port"] == server.port
    ready = lines["ready"]
    assert (ready["model"], ready["model_version"], ready["provider"]) == (
        NAME,
        VERSION,
        "cpu",
    )
    assert len(ready["digest"]) == 64


# --- never a word of the input ----------------------------------------------------------------------------------------


def everything_a_client_may_send() -> list[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body, headers; the secret words are everywhere that an error or a log line could take them from."""
    text, word = SECRET_TEXT, SECRETS[0]
    utf8, latin = text.encode(), b"axolotl \xff\xfe quokka"
    infers: list[Any] = [
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], "id": word},
        {"inputs": [{"name": word, "shape": [1], "datatype": "BYTES", "data": [text]}]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": word, "data": [text]}]},
        {"inputs": [{"name": "text", "shape": [text], "datatype": "BYTES", "data": [text]}]},
        {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": [text]}]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "FP32", "data": [text]}]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [[text]]}]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text], "parameters": {word: text}}]},
        {"inputs": text},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], "outputs": [{"name": word}]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], "outputs": [text]},
        {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}], "parameters": text},
        {
            "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}],
            "parameters": {"timeout": text},
        },
    ]
    length = len(utf8).to_bytes(4, "little")
    binaries = [
        binary_infer(length + utf8),
        binary_infer(utf8),
        binary_infer(length + utf8, shape=[2]),
        binary_infer(b"\x04\x00\x00\x00" + latin[:4] + latin),
        binary_infer(len(latin).to_bytes(4, "little") + latin),
        binary_infer(length + utf8, datatype="INT64"),
        binary_infer(length + utf8, parameters={"binary_data_size": word}),
        (utf8, {"inference-header-content-length": word}),
        (utf8, {"inference-header-content-length": "7"}),
    ]
    bodies: list[Any] = [
        {"text": text},
        {"text": [text]},
        {"text": {"text": text}},
        {"texts": text},
        {"texts": [text, 1]},
        {"texts": [text, " "]},
        {"texts": [text] * 600},
        {"texts": [[text]]},
        {word: text},
        {"text": text, word: text},
        {"text": text * 2000},
        {"text": text + "\ud800"},
        text,
        [text],
    ]
    raw = [
        *(json.dumps(body).encode() for body in bodies),
        utf8,
        b'{"text": "' + utf8,
        b'{"text": "' + utf8 + b'"} axolotl',
        b'{"text": "' + latin + b'"}',
        b'{"text": axolotl}',
        b'{axolotl: "quokka"}',
        b"[" * 5000 + utf8,
        utf8 * 100_000,
    ]
    return [
        *(("POST", path, body, JSON) for path in ("/predict", "/predict/batch") for body in raw),
        *(("POST", INFER, json.dumps(body).encode(), JSON) for body in infers),
        *(("POST", INFER, body, headers) for body, headers in binaries),
        *(("POST", INFER, body, JSON) for body in raw[-8:]),
        ("POST", "/predict", raw[0], {"content-type": f"{word}/json"}),
        ("POST", "/predict", raw[0], {"content-type": "application/json", "content-encoding": word}),
        ("POST", "/predict", raw[0], {"content-type": "application/json", "x-request-id": f"{word} and quokka"}),
        ("POST", f"/predict?text={word}", raw[0], JSON),
        ("POST", f"/v2/models/{word}/infer", raw[0], JSON),
        ("POST", f"/v2/models/{NAME}/versions/{word}/infer", raw[0], JSON),
        ("GET", f"/v2/models/{word}", b"", {}),
        ("GET", f"/{word}?{word}={word}", b"", {}),
        ("PUT", f"/predict?{word}", raw[0], JSON),
    ]


def test_no_log_line_and_no_error_holds_a_word_of_any_request(server: ServerProcess) -> None:
    statuses = set()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for method, path, body, headers in everything_a_client_may_send():
            response = http.request(method, path, content=body, headers=headers)
            statuses.add(response.status_code)
            # The protocol echoes a request's own id in its answer; errors repeat nothing.
            if response.status_code != 200:
                assert_no_secret(response.text)
                assert_no_secret(str(response.headers))
                assert response.status_code < 500
    assert statuses >= {200, 400, 404, 405, 413, 415, 422, 429}
    for garbage in (SECRET_TEXT.encode(), b"GET /zyzzyva quokka\r\n\r\n", b"POST /predict HTTP/1.1\r\nzyzzyva\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(garbage + b"\r\n\r\n")
            assert_no_secret(client.recv(10_000).decode())
    assert_no_secret(server.output())
    assert_no_secret(server.errors())


class QuotingModel(Model):
    """Fails, and quotes its input, as ONNX Runtime and libraries do."""

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        raise ValueError(SECRET_TEXT)


class QuotingTask(TextClassification):
    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        try:
            raise KeyError(texts[0])
        except KeyError as error:
            raise RuntimeError(f"cannot digest {texts}") from error


def quoting_model(model: Model) -> Model:
    return QuotingModel(**{item.name: getattr(model, item.name) for item in fields(Model)})


@pytest.mark.parametrize("log_format", ["json", "text"])
@pytest.mark.parametrize("broken", ["model", "task"])
async def test_a_failure_is_logged_by_its_kind_and_place_and_never_by_its_words(
    reviews: Model, capfd: pytest.CaptureFixture[str], broken: str, log_format: str
) -> None:
    app = create_app(Settings(provider="cpu", log_level="debug", log_format=log_format))
    model = (
        quoting_model(reviews)
        if broken == "model"
        else replace(reviews, task=QuotingTask(reviews.artifact, reviews.batch_rows))
    )
    serve(app, model, Limits(1, 4, 512, 16))
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            for path, body in (("/predict", {"text": SECRET_TEXT}), ("/predict/batch", {"texts": [SECRET_TEXT] * 3})):
                response = await http.post(path, json=body)
                assert response.status_code == 500
                assert_no_secret(response.text)
                assert "Traceback" not in response.text
                assert list(response.json()) == ["error"]
    finally:
        app.state.lifecycle.close()
    await asyncio.sleep(0)  # a turn of the loop, at whose end lines are written
    out, err = capfd.readouterr()
    assert out.count("500") >= 2
    assert_no_secret(out + err)
    if broken == "task":
        assert "RuntimeError" in out
        assert "test_logging.py" in out, "where it happened"


# --- formats and levels -----------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture(scope="module")
def text_server() -> Iterator[ServerProcess]:
    with ServerProcess(log_format="text", port=free_port()) as process:
        yield process.ready()


def test_text_format_is_one_line_per_request_for_people(text_server: ServerProcess) -> None:
    response = httpx.post(f"{text_server.url}/predict", json={"text": SECRET_TEXT}, headers={"x-request-id": "people"})
    assert response.status_code == 200
    assert text_server.logs() == [], "no JSON"
    # Written after the answer.
    while "people" not in (written := plain(text_server.output())) or not written.endswith("\n"):
        assert text_server.process.poll() is None, text_server.errors()
    (line,) = [line for line in written.splitlines() if "people" in line]
    for word in ("request", "route=/predict", "status=200", "rows=1", f"model={NAME}"):
        assert word in line
    assert_no_secret(text_server.output())


def test_text_that_goes_to_a_file_has_no_colours(text_server: ServerProcess) -> None:
    assert "\x1b" not in text_server.output()


# --- who reads --------------------------------------------------------------------------------------------------------


@contextmanager
def written_to_a_pipe(**settings: object) -> Iterator[tuple[ServerProcess, io.FileIO]]:
    """A server whose output is a small pipe, and its other end."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    with (
        os.fdopen(reads, "rb", 0) as reader,
        ServerProcess(output=writes, port=free_port(), **settings) as process,
    ):
        os.close(writes)
        yield process.ready(), reader


def answers_to_many(server: ServerProcess, count: int) -> int:
    """Sends so many requests that are refused, one behind the other on one connection; how many were answered 400."""
    request = b"POST /predict HTTP/1.1\r\nhost: x\r\nx-request-id: %s\r\ncontent-type: application/json\r\n" % (
        b"i" * 128
    )
    request += b"content-length: 1\r\n\r\n{"
    answered = 0
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        for _ in range(0, count, 10):
            client.sendall(request * 10)
            received = b""
            while received.count(b'{"error":') < 10:
                part = client.recv(65536)
                assert part, received[-1000:]
                received += part
            answered += received.count(b"HTTP/1.1 400 ")
    return answered


@pytest.mark.parametrize("http_processes", [1, 2])
@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_who_does_not_read_the_log_holds_up_neither_requests_nor_the_end(reader: str, http_processes: int) -> None:
    with written_to_a_pipe(http_processes=http_processes, request_timeout_ms=60_000) as (server, pipe):
        if reader == "gone":
            pipe.close()
        assert_served_though_lines_are_dropped(server)


@pytest.mark.parametrize("http_processes", [1, 2])
def test_a_server_without_an_output_serves_all_the_same(http_processes: int) -> None:
    settings = {"http_processes": http_processes, "request_timeout_ms": 60_000, "port": free_port()}
    with ServerProcess(output="closed", **settings) as server:
        assert answers_to_many(server.ready(), 500) == 500
        assert_ends_well(server)


def assert_served_though_lines_are_dropped(server: ServerProcess) -> None:
    """Asks until the first line is lost, and some more; then ends the server."""
    sent = 0
    while not server.metric("log_lines_dropped_total"):
        assert answers_to_many(server, 500) == 500
        sent += 500
        assert server.get("/live").status_code == 200
        assert sent < 50_000, "no line was dropped"
    assert server.metric("log_lines_dropped_total") <= sent + 50
    assert_ends_well(server)


def assert_ends_well(server: ServerProcess) -> None:
    assert httpx.post(f"{server.url}/predict", json={"text": "still here"}).status_code == 200
    assert server.get("/ready").status_code == 200
    server.terminate()
    assert server.wait() == 0
    assert server.errors() == ""


def test_a_reader_who_wakes_up_gets_every_line_that_was_not_dropped_whole_and_in_order() -> None:
    with written_to_a_pipe(request_timeout_ms=60_000) as (server, pipe):
        assert answers_to_many(server, 200) == 200
        assert server.metric("log_lines_dropped_total") == 0
        received = b""
        while received.count(b'"event":"request"') < 200:
            received += pipe.read(65536)
        lines = [json.loads(line) for line in received.splitlines()]
        assert [line["status"] for line in requests_in(lines)] == [400] * 200
        times = [line["timestamp"] for line in lines]
        assert times == sorted(times)
