"""One connection, in this process: what a real process's life would take too long to show."""

import asyncio
import inspect
import math
import re
import socket
import struct
import tomllib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from packaging.requirements import Requirement
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.errors import SHED_REASONS
from app.http.connection import limits, protocol
from app.http.connection import timers as timers_module
from app.http.connection.limits import ConnectionLimits
from app.http.connection.protocol import HttpProtocol
from app.http.request import CONNECTION
from app.http.response import Response
from app.http.server import listen, uvicorn_config
from tests.process import ROOT

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def answer(scope, receive, send) -> None:
    """ASGI: 204 to everything."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def whole_answer(body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> Any:
    """ASGI: the same to everything, in one piece."""

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def leave(writer: asyncio.StreamWriter) -> None:
    """Resets the connection, which is no client's way to say that it has sent all."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Shed:
    """Counts connections that were ended, by reason."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(SHED_REASONS, 0)
        self._asked = ""

    def __getitem__(self, reason: str) -> "Shed":
        self._asked = reason
        return self

    def inc(self) -> None:
        self.counts[self._asked] += 1


@asynccontextmanager
async def listening(
    app=answer,
    max_connections: int = 1000,
    refusal: Callable[[Any, bool], Response | None] = lambda scope, early: None,
    max_connection_seconds: float = 0,
) -> AsyncIterator[tuple[tuple[str, int], Shed]]:
    """The address of a server of this protocol, and what it shed."""
    sock, shed = listen("127.0.0.1", 0), Shed()
    config = uvicorn_config(app, ConnectionLimits(max_connections, shed, refusal, max_connection_seconds))
    config.lifespan = "off"
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve(sockets=[sock]))
    try:
        async with asyncio.timeout(30):
            yield sock.getsockname(), shed
    finally:
        running.should_exit = True
        await task


@asynccontextmanager
async def connected(app=answer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with listening(app) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        try:
            yield reader, writer
        finally:
            writer.close()


# --- waiting for a head -----------------------------------------------------------------------------------------------


class HeadTimers:
    """The loop's timers for heads, and for answers to be read. They never go off by themselves: a test says when that
    time has passed."""

    def __init__(self, call_later: Callable[..., asyncio.TimerHandle]) -> None:
        self._call_later = call_later
        self._handles: list[tuple[asyncio.TimerHandle, Callable[[], object]]] = []

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        handle = self._call_later(delay, callback, *args, **kwargs)
        if delay in (protocol.HEAD_SECONDS, protocol.WRITE_SECONDS):
            self._handles.append((handle, partial(callback, *args)))
        return handle

    @property
    def running(self) -> int:
        return sum(not handle.cancelled() for handle, _ in self._handles)

    def elapse(self) -> None:
        for handle, callback in self._handles:
            if not handle.cancelled():
                handle.cancel()
                callback()


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> HeadTimers:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 86_400.25)
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 86_400.5)
    loop = asyncio.get_running_loop()
    timers = HeadTimers(loop.call_later)
    monkeypatch.setattr(loop, "call_later", timers.call_later)
    return timers


async def turns_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("part", [b"", b"G", HEAD])
async def test_a_head_that_does_not_come_to_its_end_ends_the_connection(timers: HeadTimers, part: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(part)
        await turns_until(lambda: timers.running == 1)
        timers.elapse()
        assert await reader.read() == b""


async def test_a_head_behind_an_answered_request_is_not_waited_for_longer(timers: HeadTimers) -> None:
    async with connected() as (reader, writer):
        writer.write(HEAD + b"\r\n" + HEAD)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        assert timers.running == 1
        timers.elapse()
        assert await reader.read() == b""


async def test_a_connection_with_whole_heads_stays_open(timers: HeadTimers) -> None:
    async with connected() as (reader, writer):
        for _ in range(3):
            writer.write(HEAD)
            await turns_until(lambda: timers.running == 1)
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
            assert timers.running == 0
            timers.elapse()


@pytest.mark.parametrize(("more", "stray"), [(b"", b"\r\n"), (b"content-length: 10\r\n", b"x")])
async def test_a_byte_that_begins_no_request_does_not_keep_a_connection(
    timers: HeadTimers, more: bytes, stray: bytes
) -> None:
    async with connected() as (reader, writer):
        writer.write(HEAD + more + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
        writer.write(stray)
        await turns_until(lambda: timers.running == 1)
        timers.elapse()
        assert await reader.read() == b""


async def test_an_answer_that_is_not_read_in_time_ends_the_connection(timers: HeadTimers) -> None:
    async with connected(whole_answer(bytes(64 << 20))) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        await turns_until(lambda: timers.running == 1)
        timers.elapse()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(64 << 20)


async def test_an_answer_that_is_read_in_time_arrives(timers: HeadTimers) -> None:
    async with connected(whole_answer(bytes(8 << 20))) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(8 << 20) == bytes(8 << 20)
        await turns_until(lambda: timers.running == 0)


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_an_answer_in_parts_and_one_without_a_body_arrive() -> None:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async with connected(app) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        assert (await reader.readuntil(b"onetwo")).startswith(b"HTTP/1.1 200")
        writer.write(HEAD.replace(b"GET", b"HEAD") + b"connection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\n")


async def test_an_answer_of_unknown_length_comes_as_it_is_made() -> None:
    go_on = asyncio.Event()

    async def stream(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"second", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with connected(stream) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        assert b"transfer-encoding: chunked\r\n" in await reader.readuntil(b"\r\n\r\n")
        assert await reader.readuntil(b"first\r\n") == b"5\r\nfirst\r\n"
        go_on.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"6\r\nsecond\r\n0\r\n\r\n"


class Recorded:
    """A transport that remembers each write as the system would see it."""

    def __init__(self, transport: Any, writes: list[bytes]) -> None:
        self._transport, self._writes = transport, writes

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_a_whole_answer_leaves_in_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    made = HttpProtocol.connection_made
    monkeypatch.setattr(
        HttpProtocol, "connection_made", lambda self, transport: made(self, Recorded(transport, writes))
    )
    async with connected(whole_answer(b"all of it", (b"content-length", b"9"))) as (reader, writer):
        for _ in range(2):
            writer.write(HEAD + b"\r\n")
            await reader.readuntil(b"all of it")
    assert [write.count(b"HTTP/1.1 200 OK\r\n") for write in writes] == [1, 1]


async def echo_path(scope, receive, send) -> None:
    """Answers with the path, and ends the connection if there is a query."""
    end = [(b"connection", b"close")] if scope["query_string"] else []
    headers = [(b"content-length", b"%d" % len(scope["path"])), *end]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def test_whole_answers_come_in_the_order_of_pipelined_requests() -> None:
    async with connected(echo_path) as (reader, writer):
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(5)))
        for number in range(5):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\ndate: " in head
            assert b"connection:" not in head
            assert await reader.readexactly(2) == b"/%d" % number


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /bye HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET /bye HTTP/1.0\r\n\r\n",
        b"GET /bye?end HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /bye?end HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)
async def test_the_last_answer_on_a_connection_says_so_once(request_head: bytes) -> None:
    async with connected(echo_path) as (reader, writer):
        writer.write(request_head)
        answered = await reader.read()
        assert answered.count(b"connection: close\r\n") == 1
        assert answered.endswith(b"\r\n\r\n/bye")


async def test_a_whole_answer_without_a_length_gets_its_own() -> None:
    async with connected(whole_answer(b"seven")) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        assert b"\r\ncontent-length: 5\r\n" in await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_has_no_length(status: int) -> None:
    async with connected(whole_answer(b"", status=status)) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        assert b"content-length" not in await reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize(
    "header",
    [
        (b"x-name", b"one\r\nset-cookie: two"),
        (b"x-name", b"one\ntwo"),
        (b"x-name", b"one\rtwo"),
        (b"x-name\r\nset-cookie", b"one"),
        (b"content-length", b"1"),
        (b"content-length", b"100"),
    ],
    ids=repr,
)
async def test_an_answer_whose_headers_are_not_what_they_seem_is_refused(
    header: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(whole_answer(b"the body", header)) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        answered = await reader.read()
    assert answered.startswith(b"HTTP/1.1 500 ")
    assert answered.count(b"HTTP/1.1") == 1
    assert b"set-cookie" not in answered
    assert b"the body" not in answered
    assert "Exception in ASGI application" in caplog.text


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_client_that_does_not_read_is_waited_for_until_it_leaves(leaves: bool) -> None:
    size, started, ended = 8 * 2**20, [], []

    async def large(scope, receive, send) -> None:
        started.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})
        ended.append(scope["path"])

    async with connected(large) as (reader, writer):
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(2)))
        await turns_until(lambda: len(started) == 2)
        for _ in range(100):
            await asyncio.sleep(0)
        # The first fills every buffer on the way.
        assert ended == ["/0"]
        if leaves:
            writer.transport.abort()
        else:
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(size)
        await turns_until(lambda: len(ended) == 2)


async def test_who_asks_is_told_when_the_client_leaves() -> None:
    asked, lost = asyncio.Event(), asyncio.Event()

    async def watching(scope, receive, send) -> None:
        scope["extensions"][CONNECTION].on_lost = lost.set
        asked.set()
        await lost.wait()

    async with connected(watching) as (_, writer):
        writer.write(HEAD + b"\r\n")
        await asked.wait()
        assert not lost.is_set()
        leave(writer)
        await lost.wait()


# --- half-closed, pipelined, host ------------------------------------------------------------------------------------


async def held_answer(scope, receive, send) -> None:
    """ASGI: 200 with the path, once its gate is open."""
    await GATES[scope["path"]].wait()
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


GATES: dict[str, asyncio.Event] = defaultdict(asyncio.Event)


@pytest.fixture(autouse=True)
def gates() -> Iterator[dict[str, asyncio.Event]]:
    GATES.clear()
    yield GATES
    GATES.clear()


def get(path: str, more: str = "host: x\r\n", version: str = "1.1") -> bytes:
    return f"GET {path} HTTP/{version}\r\n{more}\r\n".encode()


@pytest.mark.parametrize("paths", [("/a",), ("/a", "/b"), ("/a", "/b", "/c")])
async def test_a_client_that_has_sent_all_and_says_so_gets_its_answers(
    paths: tuple[str, ...], gates: dict[str, asyncio.Event]
) -> None:
    async with connected(held_answer) as (reader, writer):
        writer.write(b"".join(map(get, paths)))
        writer.write_eof()
        for path in paths:
            await turns_until(partial(gates.__contains__, path))
            await asyncio.sleep(3 * limits.BEAT_SECONDS)
            gates[path].set()
        answers = await reader.read()
    assert answers.count(b"HTTP/1.1 200 OK") == len(paths)
    assert answers.endswith(paths[-1].encode())
    assert answers.count(b"connection: close") == 1


async def test_a_client_that_closes_its_side_later_has_left(gates: dict[str, asyncio.Event]) -> None:
    lost, asked = asyncio.Event(), []

    async def watching(scope, receive, send) -> None:
        scope["extensions"][CONNECTION].on_lost = lost.set
        asked.append(scope["extensions"][CONNECTION])
        await lost.wait()

    async with connected(watching) as (reader, writer):
        writer.write(get("/"))
        await turns_until(lambda: bool(asked) and asked[0].since_request() >= limits.BEATS)
        writer.write_eof()
        await lost.wait()
        assert await reader.read() == b""


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"content-length: 2\r\n\r\n1"])
async def test_a_client_that_closes_its_side_before_a_whole_request_is_not_waited_for(sent: bytes) -> None:
    async with connected(held_answer) as (reader, writer):
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == b""


@pytest.mark.parametrize(
    "bad", [b"\0\0\0\r\n\r\n", get("/c", more=""), b"GET /c HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 101,
            b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"],
    ids=["no HTTP", "no host", "many headers", "a broken body"],
)  # fmt: skip
async def test_the_error_of_a_bad_request_comes_behind_the_answers_to_those_before(
    bad: bytes, gates: dict[str, asyncio.Event]
) -> None:
    async with connected(held_answer) as (reader, writer):
        writer.write(get("/a") + get("/b") + bad + get("/d"))
        await turns_until(lambda: "/a" in gates)
        gates["/b"].set()
        gates["/a"].set()
        answers = await reader.read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", b"400"]
    assert answers.index(b"/a") < answers.index(b"/b") < answers.index(b'{"error":')
    assert "/d" not in gates


async def test_requests_that_wait_behind_one_are_counted(gates: dict[str, asyncio.Event]) -> None:
    async with connected(held_answer) as (reader, writer):
        writer.write(b"".join(get(f"/{number}") for number in range(100)))
        await turns_until(lambda: "/0" in gates)
        for number in range(100):
            gates[f"/{number}"].set()
        answers = await reader.read()
    assert answers.count(b"HTTP/1.1 200 OK") == 1 + protocol.MAX_PIPELINED
    assert answers.count(b"HTTP/1.1 400 Bad Request") == 1


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (get("/"), b"204"),
        (get("/", "Host: x\r\n"), b"204"),
        (get("/", ""), b"400"),
        (get("/", "host: x\r\nhost: x\r\n"), b"400"),
        (get("/", "", "1.0"), b"204"),
        (get("/", "host: x\r\nhost: y\r\n", "1.0"), b"400"),
    ],
)
async def test_a_request_names_its_host_once(head: bytes, status: bytes) -> None:
    async with connected() as (reader, writer):
        writer.write(head)
        assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status


# --- limits that connections share ------------------------------------------------------------------------------------

Client = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    """Opens connections, which end with the test."""
    writers = []

    async def connect(*args: Any, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*args, **kwargs)
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)


async def test_too_many_connections_cost_the_one_that_has_been_idle_for_longest(
    gates: dict[str, asyncio.Event],
    client: Client,
) -> None:
    async with listening(held_answer, max_connections=3) as (address, shed):
        opened = []
        for path in ("/busy", "/answered", "/fresh"):
            reader, writer = await client(*address)
            opened.append((reader, writer))
            writer.write(get(path))
            await turns_until(partial(gates.__contains__, path))
            if path != "/busy":
                gates[path].set()
                assert (await reader.readuntil(path.encode())).startswith(b"HTTP/1.1 200")
        reader, writer = await client(*address)
        assert await opened[1][0].read() == b""
        assert shed.counts == {"count": 1, "memory": 0, "unread": 0}
        gates["/busy"].set()
        await opened[0][0].readuntil(b"/busy")
        gates["/last"].set()
        for reading, writing in [opened[0], opened[2], (reader, writer)]:
            writing.write(get("/last"))
            await reading.readuntil(b"/last")


async def test_where_all_connections_are_busy_the_newest_gives_way(
    gates: dict[str, asyncio.Event], client: Client
) -> None:
    async with listening(held_answer, max_connections=2) as (address, shed):
        busy = [await client(*address) for _ in range(2)]
        for number, (_, writer) in enumerate(busy):
            writer.write(get(f"/{number}"))
            await turns_until(partial(gates.__contains__, f"/{number}"))
        reader, _ = await client(*address)
        assert await reader.read() == b""
        assert shed.counts["count"] == 1
        for number, (reader, _) in enumerate(busy):
            gates[f"/{number}"].set()
            await reader.readuntil(f"/{number}".encode())


async def test_what_all_connections_hold_unread_has_a_bound(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 100_000)
    async with listening() as (address, shed):
        opened = []
        while not shed.counts["memory"]:
            reader, writer = await client(*address)
            writer.write(HEAD + b"a: " + b"b" * 30_000)
            opened.append((reader, writer))
            for _ in range(10):
                await asyncio.sleep(0.001)
        assert len(opened) >= 4
        for _, writer in opened:
            writer.close()
        await asyncio.sleep(0)
        # What they held is free again.
        reader, writer = await client(*address)
        for _ in range(20):
            writer.write(HEAD + b"a: " + b"b" * 50_000 + b"\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")


async def test_what_all_clients_leave_unread_has_a_bound(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    size = 16 << 20
    monkeypatch.setattr(limits, "MAX_UNSENT_BYTES", 40 << 20)
    async with listening(whole_answer(bytes(size))) as (address, shed):
        opened = []
        while not shed.counts["unread"]:
            reader, writer = await client(*address, limit=1024)
            writer.write(get("/"))
            await reader.readuntil(b"\r\n\r\n")
            opened.append((reader, writer))
        # Each kernel takes a part of what it holds for a client.
        assert 3 <= len(opened) <= 10
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await opened[0][0].readexactly(size)
        assert len(await opened[-1][0].readexactly(size)) == size


FULL = Response(503, b"full", [(b"retry-after", b"60")], retry_after_seconds=60)


def refusing() -> tuple[list[HttpProtocol], Callable[[Any, bool], Response]]:
    """The connections that asked, and what refuses them all."""
    seen: list[HttpProtocol] = []

    def refusal(scope, early) -> Response:
        seen.append(scope["extensions"][CONNECTION])
        return FULL

    return seen, refusal


async def test_a_request_that_would_only_be_refused_is_not_asked_of_the_application() -> None:
    asked = []

    async def noting(scope, receive, send) -> None:
        asked.append(scope["path"])
        await answer(scope, receive, send)

    def refusal(scope, early) -> Response | None:
        return FULL if scope["path"] == "/full" else None

    async with listening(noting, refusal=refusal) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        for path, status in (("/full", b"503"), ("/", b"204"), ("/full", b"503")):
            writer.write(get(path))
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status
            if status == b"503":
                assert await reader.readexactly(4) == b"full"
        writer.write(get("/full", "host: x\r\nconnection: close\r\n"))
        assert b"connection: close" in await reader.read()
        writer.close()
    assert asked == ["/"]


async def test_a_refusal_to_who_comes_back_too_early_is_held_back_and_then_sent() -> None:
    seen, refusal = refusing()
    async with listening(refusal=refusal) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        for asked in range(1, 4):
            writer.write(get("/") * 2 if asked == 3 else get("/"))
            if asked > 1:
                await turns_until(lambda: seen[0].backoff.holding)
            assert (await reader.readuntil(b"full")).startswith(b"HTTP/1.1 503")
        assert (await reader.readuntil(b"full")).startswith(b"HTTP/1.1 503")
        writer.close()
    assert len(seen) == 4


async def test_one_that_leaves_while_its_refusal_is_held_back_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timers_module, "FIRST_SECONDS", 3600)
    monkeypatch.setattr(timers_module, "MAX_SECONDS", 3600)
    seen, refusal = refusing()
    async with listening(refusal=refusal) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(get("/"))
        await reader.readuntil(b"full")
        writer.write(get("/"))
        await turns_until(lambda: seen[0].backoff.holding)
        shared = seen[0]._limits
        leave(writer)
        await turns_until(lambda: shared.open == 0)
        assert shared.deadlines._slots == {}


# --- connections that are old -----------------------------------------------------------------------------------------

# What is as old as that when it begins.
AT_ONCE_SECONDS = 1e-9


async def in_parts(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    await send({"type": "http.response.body", "body": b"two"})


@pytest.mark.parametrize(
    ("app", "refusal", "asked", "end"),
    [
        (echo_path, lambda scope, early: None, get("/whole"), b"/whole"),
        (in_parts, lambda scope, early: None, get("/"), b"onetwo"),
        (answer, lambda scope, early: None, get("/").replace(b"GET", b"HEAD"), b""),
        (answer, lambda scope, early: FULL, get("/"), b"full"),
    ],
    ids=["whole", "in parts", "without a body", "refused"],
)
async def test_the_next_answer_on_an_old_connection_is_whole_and_says_that_it_is_the_last(
    app: Any, refusal: Any, asked: bytes, end: bytes
) -> None:
    async with listening(app, refusal=refusal, max_connection_seconds=AT_ONCE_SECONDS) as (address, shed):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(asked)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.count(b"connection: close") == 1
        assert body == end
        writer.close()
    assert sum(shed.counts.values()) == 0


async def test_a_connection_gets_old_between_two_requests_and_neither_is_lost() -> None:
    async with listening(echo_path, max_connection_seconds=0.05) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        last = False
        while not last:
            writer.write(get("/path"))
            last = b"connection: close" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"/path"
        assert await reader.read() == b""
        writer.close()


async def test_what_waits_behind_a_request_on_an_old_connection_is_answered_too(
    gates: dict[str, asyncio.Event],
) -> None:
    asked = []

    async def noting(scope, receive, send) -> None:
        asked.append(scope["extensions"][CONNECTION])
        await held_answer(scope, receive, send)

    async with listening(noting, max_connection_seconds=AT_ONCE_SECONDS) as (address, _):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(get("/a") + get("/b") + get("/c"))
        await turns_until(lambda: bool(asked) and len(asked[0].pipeline) == 2)
        for path in ("/c", "/b", "/a"):
            gates[path].set()
        answers = await reader.read()
        writer.close()
    assert re.findall(rb"\r\n\r\n/(.)", answers) == [b"a", b"b", b"c"]
    assert answers.count(b"connection: close") == 1
    assert answers.index(b"connection: close") > answers.index(b"/b")


def test_connections_that_began_together_get_old_at_different_times_within_a_tenth() -> None:
    shared = ConnectionLimits(10, Shed(), max_connection_seconds=60)
    times = {shared.old_at(1000) for _ in range(1000)}
    assert len(times) > 900
    assert 1054 <= min(times) < 1057
    assert 1063 < max(times) <= 1066


def test_without_an_age_none_ever_gets_old() -> None:
    assert ConnectionLimits(10, Shed()).old_at(1000) == math.inf


# --- what is uvicorn's own affair -------------------------------------------------------------------------------------


def test_the_names_of_uvicorns_that_the_connection_relies_on_are_there() -> None:
    for name in (
        *("connection_made", "connection_lost", "data_received", "on_message_begin", "on_headers_complete"),
        *("_start_asgi_task", "_should_upgrade", "handle_websocket_upgrade", "send_400_response"),
    ):
        ours, theirs = getattr(HttpProtocol, name), getattr(HttpToolsProtocol, name)
        assert ours is not theirs
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    parameters = inspect.signature(RequestResponseCycle.send).parameters
    assert list(parameters) == ["self", "message"]
    assert httptools_impl.STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"
    assert callable(FlowControl.drain)
    assert callable(HttpToolsProtocol._unset_keepalive_if_required)
    assert callable(HttpRequestParser.set_dangerous_leniencies)
    assert issubclass(HttpParserUpgrade, Exception)


async def test_a_request_has_the_attributes_that_the_connection_relies_on() -> None:
    found: dict[str, Any] = {}

    async def look(scope, receive, send) -> None:
        connection = scope["extensions"][CONNECTION]
        cycle = connection.cycle
        found.update(
            parser=connection.parser,
            loop=connection.loop,
            transport=connection.transport,
            url=connection.url,
            headers=connection.headers,
            scope=connection.scope,
            write_paused=cycle.flow.write_paused,
            cycle={name: getattr(cycle, name) for name in CYCLE_ATTRIBUTES},
            state=connection.server_state,
        )
        await answer(scope, receive, send)

    async with connected(look) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\n")
    assert isinstance(found["parser"], HttpRequestParser)
    assert isinstance(found["state"], ServerState)
    assert found["state"].tasks is not None
    assert (found["url"], found["headers"], found["write_paused"]) == (b"/", [(b"host", b"x")], False)
    assert found["loop"] is asyncio.get_running_loop()
    cycle = found["cycle"]
    assert (cycle["keep_alive"], cycle["disconnected"], cycle["response_started"]) == (True, False, False)
    assert cycle["scope"]["method"] == "GET"


CYCLE_ATTRIBUTES = (
    *("scope", "transport", "flow", "default_headers", "message_event", "on_response", "disconnected", "keep_alive"),
    *("waiting_for_100_continue", "response_started", "response_complete"),
)


def test_the_minor_version_of_uvicorn_is_pinned_to_the_one_that_is_tested() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = [each for each in map(Requirement, dependencies) if each.name == "uvicorn"]
    major, minor, _ = map(int, version("uvicorn").split("."))
    accepted = [number for number in range(1000) if f"{major}.{number}.999" in pinned.specifier]
    assert accepted == [minor]
    assert version("uvicorn") in pinned.specifier
