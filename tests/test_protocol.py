"""One connection, in this process: what a real process's life would take too long to show."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app import protocol
from app.server import listen, uvicorn_config

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


class Written:
    """A transport that remembers what was written to it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


OK = b"HTTP/1.1 200 OK\r\n\r\n"


async def test_head_and_body_of_an_answer_travel_together() -> None:
    transport = Written()
    joined = protocol.JoinedWrites(transport, asyncio.get_running_loop())
    for part in (OK, b"one", b"two", OK, b"three"):
        joined.write(part)
    await asyncio.sleep(0)
    assert transport.writes == [OK + b"one", b"two", OK + b"three"]


async def test_a_head_whose_body_comes_later_or_never_is_not_held_back() -> None:
    transport = Written()
    joined = protocol.JoinedWrites(transport, asyncio.get_running_loop())
    joined.write(OK)
    await asyncio.sleep(0)
    assert transport.writes == [OK]
    joined.write(OK)
    joined.close()
    assert (transport.writes, transport.closed, joined.is_closing()) == ([OK, OK], True, True)
    await asyncio.sleep(0)


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
