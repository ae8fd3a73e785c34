"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what it waits for and takes in, and fewer writes.

Relies on names of uvicorn's that are its own affair, so its version is pinned and a test names them.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.http.request import CONNECTION

# For a whole request line and headers, from the connection's start or the answer before.
HEAD_SECONDS = 65
# Of what is no body: request line, headers, trailers, chunk sizes; each time between two pieces of a body.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# For a client to take an answer from the buffers that it waits in.
WRITE_SECONDS = 30


class OneWriteCycle(RequestResponseCycle):
    """uvicorn's request and response. A response whose body comes whole leaves in one write, which is one system call
    and one packet; any other goes uvicorn's way."""

    _start: Any = None

    async def send(self, message: Any) -> None:
        """As ASGI says. Raises RuntimeError for headers that cannot be sent."""
        if self.response_started:
            await super().send(message)
        elif message["type"] == "http.response.start":
            self._start = message  # the last counts: uvicorn answers 500 where an application fails before its body
        elif self._start is None or message.get("more_body") or self.scope["method"] == "HEAD":
            if self._start is not None:
                await super().send(self._start)
            await super().send(message)
        else:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            if not self.disconnected:
                self._write_whole(message.get("body", b""))

    def _write_whole(self, body: bytes) -> None:
        lines, length = [STATUS_LINE[self._start["status"]]], None
        for given, value in (*self.default_headers, *self._start.get("headers", ())):
            name = given.lower()
            if name == b"connection":  # it only ever says "close"
                self.keep_alive = False
            elif name != b"transfer-encoding":  # the body is whole
                length = int(value) if name == b"content-length" else length
                lines.append(b"%b: %b\r\n" % (name, value))
        if length is None and self._start["status"] not in (204, 304):
            lines.append(b"content-length: %d\r\n" % len(body))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        head = b"".join(lines)
        # Each must be one line, whatever a middleware put into it.
        if length not in (None, len(body)) or not head.count(b"\n") == head.count(b"\r") == len(lines):
            raise RuntimeError("a response whose headers cannot be sent")
        self.transport.write(b"".join((head, b"\r\n", body)))
        self.waiting_for_100_continue = False
        self.response_started = self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for a request line and headers without end, and take them at any size."""

    _in_head = False
    _bodyless_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _data = b""
    _running: RequestResponseCycle | None = None
    on_lost: Callable[[], None] | None = None
    """Called when the client leaves."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; the first head is waited for as long as one that follows."""
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        if self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's; then tells whoever asked."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which uvicorn does not where the client resets it
        self._end_wait()
        self._end_write_wait()
        if self._running is not None:
            # uvicorn tells the newest request alone; the one being answered may have others behind it.
            self._running.disconnected = True
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; ends a connection that sends more than MAX_HEAD_BYTES without a piece of a body among them."""
        self._data = data
        self._bodyless_bytes += len(data)
        super().data_received(data)
        self._data = b""
        if self._bodyless_bytes > MAX_HEAD_BYTES:
            self.send_400_response("Request line, headers or trailers too large.")
        # uvicorn ends its own wait for the next request at any byte, also one that begins none.
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._bodyless_bytes = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for trailers too, which nothing here reads."""
        if not self._in_head:
            return
        if len(self.headers) >= MAX_HEADERS:
            self.send_400_response(f"More than {MAX_HEADERS} headers.")
        else:
            super().on_header(name, value)

    def pause_writing(self) -> None:
        """Called by the transport when the client does not take what is sent."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Called by the transport when it does again."""
        super().resume_writing()
        self._end_write_wait()

    def _end_write_wait(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request when its turn has come."""
        self._running = cycle
        cycle.__class__ = OneWriteCycle  # uvicorn has no place to name another class
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
        if self.transport.is_closing():
            return
        body = b'{"error":"%s"}' % msg.encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head = True
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head = False
        self._bodyless_bytes = 0
        self._end_wait()
        if not self.transport.is_closing():
            super().on_headers_complete()
