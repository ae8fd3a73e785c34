"""One request and its response on a connection: uvicorn's, with fewer writes."""

from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from app.http.request import CONNECTION


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
                self._close_if_old()
                await super().send(self._start)
            await super().send(message)
        else:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            if not self.disconnected:
                self.write(self._start["status"], self._start.get("headers", ()), message.get("body", b""))

    def write(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """The whole response at once. Raises RuntimeError for headers that cannot be sent."""
        self._close_if_old()
        lines, length = [STATUS_LINE[status]], None
        for given, value in (*self.default_headers, *headers):
            name = given.lower()
            if name == b"connection":  # it only ever says "close"
                self.keep_alive = False
            elif name != b"transfer-encoding":  # the body is whole
                length = int(value) if name == b"content-length" else length
                lines.append(b"%b: %b\r\n" % (name, value))
        if length is None and status not in (204, 304):
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

    def _close_if_old(self) -> None:
        connection: Any = self.scope["extensions"][CONNECTION]
        if connection.old():
            self.keep_alive = False
