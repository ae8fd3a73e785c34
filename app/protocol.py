"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what it waits for and takes in, and fewer writes."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any, cast

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.exchange import CONNECTION

# For a whole request line and headers, from the first byte or from the connection's start.
HEAD_SECONDS = 65
MAX_HEAD_BYTES = 64 * 1024


class JoinedWrites:
    """A transport that sends a response's head together with the body that follows in the same turn of the event loop:
    uvloop makes a system call, and a packet, of each write."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held = b""
        self.is_closing = transport.is_closing  # asked for with each request

    def write(self, data: bytes) -> None:
        """As a transport's, at the end of this turn at the latest."""
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        elif data.startswith(b"HTTP/1.1 "):
            self._held = data
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """As a transport's, after what is held."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data, self._held = self._held, b""
            self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for a request line and headers without end, and take them at any size."""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _data = b""
    _running: RequestResponseCycle | None = None
    on_lost: Callable[[], None] | None = None
    """Called when the client leaves."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; the first head is waited for as long as one that follows."""
        super().connection_made(cast("asyncio.Transport", JoinedWrites(transport, self.loop)))
        self._await_head()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's; then tells whoever asked."""
        super().connection_lost(exc)
        self._end_wait()
        if self._running is not None:
            # uvicorn tells the newest request alone; the one being answered may have others behind it.
            self._running.disconnected = True
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; ends a connection whose head still goes on beyond MAX_HEAD_BYTES or HEAD_SECONDS."""
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._in_head:
            if self._head_timer is None:
                self._await_head()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("Request line and headers too large.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request when its turn has come."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade(self) -> bool:
        """Asked by uvicorn where the parser stops behind a head. A tunnel is refused like any other method."""
        return self.parser.get_method() != b"CONNECT"

    def handle_websocket_upgrade(self) -> None:
        """Called by uvicorn for a head that asks for another protocol, as Java's client does for HTTP/2. A server may
        stay with this one: the head goes to the parser again, without the wish, and then what came behind it."""
        stop, data = sys.exc_info()[1], self._data  # uvicorn is handling it
        if not isinstance(stop, HttpParserUpgrade) or not data:  # one after the other: nobody means that
            self.send_400_response("Invalid HTTP request received.")
            return
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._data = b""
        # Another parser: the old one may take this connection's requests for ended.
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        super().data_received(b"\r\n".join([*head, b"", data[stop.args[0] :]]))

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in the one shape of every error."""
        body = b'{"error":"%s"}' % msg.encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head = False
        self._end_wait()
        super().on_headers_complete()
