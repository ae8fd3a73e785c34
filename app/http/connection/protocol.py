"""HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what it waits for and takes in.

Relies on names of uvicorn's that are its own affair, so its version is pinned and a test names them.
"""

import asyncio
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.http.connection.cycle import OneWriteCycle
from app.http.connection.limits import BEATS, ConnectionLimits
from app.http.connection.timers import Backoff, Wait
from app.http.request import CONNECTION

# For a whole request line and headers, from the connection's start or the answer before.
HEAD_SECONDS = 65
# Of what is no body: request line, headers, trailers, chunk sizes; each time between two pieces of a body.
MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
# Requests that wait behind one that is being answered.
MAX_PIPELINED = 16
# For a client to take an answer from the buffers that it waits in.
WRITE_SECONDS = 30
# What an answer may leave in this process before its client counts as one that does not read.
WRITE_BUFFER_BYTES = 16 * 1024


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for a request line and headers without end, and take them at any size."""

    _in_head = False
    _hosts = _bodyless_bytes = _waiting_bytes = _held_bytes = _beats = 0
    _bad_request: str | None = None
    _data = b""
    _running: RequestResponseCycle | None = None
    on_lost: Callable[[], None] | None = None
    """Called when the client leaves."""

    def __init__(self, limits: ConnectionLimits, **uvicorns: Any) -> None:
        """limits: shared by all connections."""
        super().__init__(**uvicorns)
        self._limits = limits
        self._head, self._reader = Wait(self.loop), Wait(self.loop)
        self.backoff = Backoff(limits.deadlines)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; the first head is waited for as long as one that follows."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        self._old_at = self._limits.old_at(self.loop.time())
        self._limits.opened(self)
        self._await_head()

    def _await_head(self) -> None:
        if not self.transport.is_closing():
            # Not `close`, which would wait for what the client has not read.
            self._head.begin(HEAD_SECONDS, self.transport.abort)
            self._limits.idle(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's; then tells whoever asked."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which uvicorn does not where the client resets it
        self._head.end()
        self._reader.end()
        self._limits.lost(self, self._held_bytes)
        self.backoff.end()
        if self._running is not None:
            # uvicorn tells the newest request alone; the one being answered may have others behind it.
            self._running.disconnected = True
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; ends a connection that sends more than MAX_HEAD_BYTES without a piece of a body among them."""
        if self._bad_request is not None:
            return
        self._data = data
        self._bodyless_bytes += len(data)
        super().data_received(data)
        self._data = b""
        if self._bodyless_bytes > MAX_HEAD_BYTES:
            self.send_400_response("Request line, headers or trailers too large.")
        if self.pipeline or self.backoff.holding:
            self._waiting_bytes += len(data)
        if self._held_bytes != self._bodyless_bytes + self._waiting_bytes:
            self._hold()
        # uvicorn ends its own wait for the next request at any byte, also one that begins none.
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def _hold(self) -> None:
        more = self._bodyless_bytes + self._waiting_bytes - self._held_bytes
        self._held_bytes += more
        self._limits.hold(self, more)

    def since_request(self) -> int:
        """Beats of the event loop since the last whole request."""
        return self._limits.beats - self._beats

    def eof_received(self) -> bool:  # type: ignore[override]
        """Called by the transport when the client will send no more; True if it is still to be answered. One that says
        so right behind its request reads on. One that says so later has left: the same bytes tell both."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or self.since_request() >= BEATS:
            return False
        cycle.keep_alive = False
        return True

    def old(self) -> bool:
        """Whether an answer should be its last: its client then connects anew, perhaps to a replica that was added."""
        return self.loop.time() >= self._old_at and not self.pipeline  # or what waits there would get no answer

    def _over(self) -> bool:
        """Whether nothing more is taken in."""
        return self._bad_request is not None or self.transport.is_closing()

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        self._bodyless_bytes = 0
        if not self._over():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        if not self._over():
            super().on_message_complete()
            self._beats = self._limits.watch(self.loop)

    def on_response_complete(self) -> None:
        """Called by uvicorn when an answer is on its way."""
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._await_reader()
        if not self.pipeline and self._waiting_bytes:
            self._waiting_bytes = 0
            self._hold()
        if self._running is None or not self._running.response_complete:  # the next one has begun
            self._beats = self._limits.watch(self.loop)  # until now nothing was read
        elif self._bad_request is not None:
            self._end_with_400(self._bad_request)
        else:
            self._limits.idle(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for trailers too, which nothing here reads."""
        if not self._in_head:
            return
        self._hosts += name.lower() == b"host"
        if len(self.headers) >= MAX_HEADERS:
            self.send_400_response(f"More than {MAX_HEADERS} headers.")
        else:
            super().on_header(name, value)

    def pause_writing(self) -> None:
        """Called by the transport when the client does not take what is sent."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """Called by the transport when it does again."""
        super().resume_writing()
        self._limits.sent(self)
        self._reader.end()

    def _await_reader(self) -> None:
        self._reader.begin(WRITE_SECONDS, partial(self._limits.end, self, "unread"))
        self._limits.unsent(self)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request when its turn has come."""
        self._running = cycle
        cycle.__class__ = OneWriteCycle  # uvicorn has no place to name another class
        answer = None if self.flow.write_paused else self._limits.refusal(cycle.scope, self.backoff.early)
        if answer is None:
            super()._start_asgi_task(cycle, app)
        elif not self.backoff.hold(self.loop, partial(self._answer, cycle, answer)):
            self._answer(cycle, answer)

    def _answer(self, cycle: Any, answer: Any) -> None:
        cycle.write(answer.status, answer.all_headers(), answer.body)
        self.backoff.answered(answer.retry_after_seconds)

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
        """As uvicorn's, in the one shape of every error, and behind the answers to earlier requests."""
        if self._over():
            return
        self._bad_request = msg
        if self.pipeline and self.cycle.more_body:
            self.pipeline.popleft()  # the one that is refused
        running = self._running
        if running is None or running.response_complete or running.more_body:
            self._end_with_400(msg)

    def _end_with_400(self, msg: str) -> None:
        if self.transport.is_closing():
            return
        body = b'{"error":"%s"}' % msg.encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._await_reader()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head = True
        self._hosts = 0
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head = False
        self._bodyless_bytes = 0
        self._head.end()
        self._limits.busy(self)
        if self._over():
            return
        if self._hosts != 1 and (self._hosts or self.parser.get_http_version() != "1.0"):
            self.send_400_response("Host: expected one.")
        elif len(self.pipeline) >= MAX_PIPELINED:
            self.send_400_response(f"More than {MAX_PIPELINED} requests that wait for an answer.")
        else:
            super().on_headers_complete()
