"""uvicorn as this service runs it, in this process: what a real process's life would take too long to show."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from app import server
from app.server import listen, uvicorn_config

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


async def answer(scope, receive, send) -> None:
    """ASGI: 204 to everything."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    (sock,) = listen("127.0.0.1", 0)
    config = uvicorn_config(answer)
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
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
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


def test_sockets_on_one_address_share_its_port_and_nobody_else_may() -> None:
    sockets = listen("127.0.0.1", 0, 3)
    try:
        (address,) = {sock.getsockname() for sock in sockets}
        with pytest.raises(server.ConfigError, match=str(address[1])):
            listen(*address, 2)
        with socket.create_connection(address):
            pass
    finally:
        for sock in sockets:
            sock.close()
