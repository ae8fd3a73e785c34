"""One HTTP/1.1 connection of the load generator, and the address it goes to. A raw asyncio protocol with a parser in C,
so that a request costs little beside the server that is measured. Any server will do: chunked bodies, closed
connections, TLS. Knows nothing of when requests are sent.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from loadtest.payloads import JSON


class TargetError(Exception):
    """The URL cannot be used or does not answer; the message is one line for people."""


@dataclass(frozen=True)
class Target:
    """Where requests go."""

    url: str
    host: str
    port: int
    tls: ssl.SSLContext | None

    @staticmethod
    def of(url: str) -> "Target":
        """Raises TargetError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError(f"--url {url!r}: must be http://HOST[:PORT]/PATH or https://…")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Target(url, parts.hostname, parts.port or (443 if tls else 80), tls)

    @property
    def local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    @property
    def root(self) -> str:
        """The URL without its path."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def path(self) -> str:
        """With the query; empty if the URL has none."""
        parts = urlsplit(self.url)
        return parts.path.removesuffix("/") and parts.path + (f"?{parts.query}" if parts.query else "")

    def post(self, body: bytes, headers: Mapping[str, str] = JSON) -> bytes:
        """The bytes of one POST."""
        given = {"Host": urlsplit(self.url).netloc, **headers, "Content-Length": str(len(body))}
        head = [f"POST {self.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items())]
        return "\r\n".join([*head, "", ""]).encode() + body


@dataclass(slots=True)
class Answers:
    """In the order they came: when, seconds since the request was due, status (0: the connection broke)."""

    finished: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One connection with at most one request on it; `done(connection, status)` when it is answered or broken."""

    def __init__(self, done: Callable[["Connection", int], None]) -> None:
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._data, self._until_closed = b"", False
        self.due, self.busy, self.usable = 0.0, False, False
        # Where an open loop's answer is recorded; None: a closed loop's.
        self.answers: Answers | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.usable = True

    def send(self, request: bytes, due: float, answers: Answers | None) -> None:
        assert self.transport is not None
        self.due, self.answers, self.busy = due, answers, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._data = data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    # The parser calls the next two. None for each header: that would double the cost of an answer.

    def on_headers_complete(self) -> None:
        if not self._parser.should_keep_alive():
            # A body without a length ends with the connection, as HTTP/1.0 servers do.
            self._until_closed = b"content-length" not in self._data.lower()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._finish(status)

    def eof_received(self) -> None:
        self.usable = False

    def connection_lost(self, _: Exception | None) -> None:
        self.transport, self.usable = None, False
        self._finish(self._parser.get_status_code() if self._until_closed else 0)

    def close(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    def _finish(self, status: int) -> None:
        if self.busy:
            self.busy = False
            self._done(self, status)
