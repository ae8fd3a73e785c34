"""One connection, in this process: what a real process's life would take too long to show."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app.http import connection as protocol
from app.http.request import CONNECTION
from app.http.server import listen, uvicorn_config

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def answer(scope, receive, send) -> None:
    """ASGI: 204 to everything."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected(app=answer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    (sock,) = listen("127.0.0.1", 0)
    config = uvicorn_config(app)
    config.lifespan = "off"
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve(sockets=[sock]))
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        running.should_exit = True
        await task


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    return 10.0


@pytest.mark.parametrize("part", [b"", b"G", HEAD])
async def test_a_head_that_does_not_come_to_its_end_ends_the_connection(patience: float, part: bytes) -> None:
    async with connected() as (reader, writer), asyncio.timeout(patience):
        writer.write(part)
        assert await reader.read() == b""


async def test_a_head_behind_an_answered_request_is_not_waited_for_longer(patience: float) -> None:
    async with connected() as (reader, writer), asyncio.timeout(patience):
        writer.write(HEAD + b"\r\n" + HEAD)
        assert (await reader.read()).startswith(b"HTTP/1.1 204")


async def test_a_connection_with_whole_heads_stays_open(patience: float) -> None:
    async with connected() as (reader, writer), asyncio.timeout(patience):
        for _ in range(3):
            writer.write(HEAD)
            await writer.drain()
            await asyncio.sleep(0.12)
            writer.write(b"\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
            await asyncio.sleep(0.12)


async def test_an_answer_in_parts_and_one_without_a_body_arrive() -> None:
    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async with connected(app) as (reader, writer), asyncio.timeout(10):
        writer.write(HEAD + b"\r\n")
        assert (await reader.readuntil(b"onetwo")).startswith(b"HTTP/1.1 200")
        writer.write(HEAD.replace(b"GET", b"HEAD") + b"connection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"\r\n\r\n")


async def whole(scope, receive, send) -> None:
    """Answers through the connection, and ends it if the query says so."""
    end = [(b"connection", b"close")] if scope["query_string"] else []
    headers = [(b"content-length", b"%d" % len(scope["path"])), *end]
    await scope["extensions"][CONNECTION].answer(200, headers, scope["path"].encode())


async def test_whole_answers_come_in_the_order_of_pipelined_requests() -> None:
    async with connected(whole) as (reader, writer), asyncio.timeout(10):
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
    async with connected(whole) as (reader, writer), asyncio.timeout(10):
        writer.write(request_head)
        answered = await reader.read()
        assert answered.count(b"connection: close\r\n") == 1
        assert answered.endswith(b"\r\n\r\n/bye")


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_client_that_does_not_read_is_waited_for_until_it_leaves(leaves: bool) -> None:
    size, started, ended = 8 * 2**20, [], []

    async def large(scope, receive, send) -> None:
        started.append(scope["path"])
        await scope["extensions"][CONNECTION].answer(200, [(b"content-length", b"%d" % size)], bytes(size))
        ended.append(scope["path"])

    async with connected(large) as (reader, writer), asyncio.timeout(10):
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(2)))
        while len(started) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        # The first fills every buffer on the way.
        assert ended == ["/0"]
        if leaves:
            writer.transport.abort()
        else:
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(size)
        while len(ended) < 2:
            await asyncio.sleep(0.01)
