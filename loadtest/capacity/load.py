"""The client: a number of requests in flight (closed loop) or arrivals at a rate (open loop), over HTTP/1.1.

A protocol on httptools, so that any server will do: chunked bodies, closed connections, TLS. Knows no statistics.
"""

import asyncio
import math
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from loadtest.shapes import Shape

# A client that is refused waits, or it would count refusals instead of measuring the server.
BACK_OFF_SECONDS = 0.05
MAX_OPEN_CONNECTIONS = 4096


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
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TargetError(f"--url {url!r}: must be http://HOST[:PORT]/PATH or https://…")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        return Target(url, parts.hostname, parts.port or (443 if tls else 80), tls)

    @property
    def local(self) -> bool:
        return self.host in ("localhost", "127.0.0.1", "::1")

    def post(self, body: bytes) -> bytes:
        """The bytes of one JSON POST."""
        parts = urlsplit(self.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(slots=True)
class Samples:
    """Answers in the order they came: when, after how long, status (0: the connection broke)."""

    finished: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    def add(self, finished: float, seconds: float, status: int) -> None:
        self.finished.append(finished)
        self.seconds.append(seconds)
        self.statuses.append(status)


class Connection(asyncio.Protocol):
    """One connection with at most one request on it; `done(connection, status)` when it is answered or broken."""

    def __init__(self, done: Callable[["Connection", int], None]) -> None:
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._framed = False
        self._head = False
        self.due = 0.0
        self.busy = False
        self.transport: asyncio.Transport | None = None

    @property
    def usable(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, request: bytes, due: float) -> None:
        assert self.transport is not None
        self.due, self.busy = due, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def on_header(self, name: bytes, _: bytes) -> None:
        """Called by the parser."""
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._head = True

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.close()
        self._finish(status)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        if self.busy:
            # A body without a length ends with the connection, as HTTP/1.0 servers do.
            self._finish(self._parser.get_status_code() if self._head and not self._framed else 0)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _finish(self, status: int) -> None:
        if self.busy:
            self.busy = self._framed = self._head = False
            self._parser = httptools.HttpResponseParser(self)
            self._done(self, status)


class Client:
    """Sends prepared requests to one target, and puts what came back into `samples`."""

    def __init__(self, target: Target, requests: Sequence[bytes]) -> None:
        self._target = target
        self._requests = requests
        self._sent = 0
        self._level = 0
        self._active = 0
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.samples = Samples()

    @property
    def idle(self) -> bool:
        """Whether everything sent has been answered."""
        return self._active == 0 and not any(connection.busy for connection in self._all)

    def next_request(self) -> bytes:
        self._sent += 1
        return self._requests[self._sent % len(self._requests)]

    async def connect(self, done: Callable[[Connection, int], None]) -> Connection:
        """A new connection. Raises OSError."""
        loop = asyncio.get_running_loop()
        connection = Connection(done)
        await loop.create_connection(lambda: connection, self._target.host, self._target.port, ssl=self._target.tls)
        self._all.add(connection)
        return connection

    def hold(self, in_flight: int) -> None:
        """Keeps this many requests in flight from now on; takes effect as requests end."""
        self._level = in_flight
        while self._active < self._level:
            self._active += 1
            self._spawn(self._lane())

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lane(self) -> None:
        """One closed-loop client: connects, and from then on is driven by answers."""
        started = time.perf_counter()
        try:
            connection = self._idle.pop() if self._idle else await self.connect(self._answered)
            if not connection.usable:
                connection = await self.connect(self._answered)
        except OSError:
            self.samples.add(time.perf_counter(), time.perf_counter() - started, 0)
            await asyncio.sleep(BACK_OFF_SECONDS)
            self._active -= 1
            self.hold(self._level)
            return
        connection.send(self.next_request(), time.perf_counter())

    def _answered(self, connection: Connection, status: int) -> None:
        now = time.perf_counter()
        self.samples.add(now, now - connection.due, status)
        if not connection.usable:
            self._all.discard(connection)
        if status == 200 and connection.usable and self._active <= self._level:
            connection.send(self.next_request(), now)
            return
        if connection.usable:
            self._idle.append(connection)
        if self._active > self._level:
            self._active -= 1
            return
        self._spawn(self._again(0.0 if status == 200 else BACK_OFF_SECONDS))

    async def _again(self, pause_seconds: float) -> None:
        await asyncio.sleep(pause_seconds)
        self._active -= 1
        self.hold(self._level)

    async def arrive(self, traffic: Shape, seed: int = 0, most: float = math.inf) -> int:
        """Poisson arrivals, whatever the server does; returns how many. A latency counts from when the request was due,
        so that a slow server cannot hide behind a client that waits. Ends when more than `most` are unanswered."""
        rng = random.Random(seed)
        # An answer that comes when others arrive already belongs to those it was sent with.
        samples = self.samples
        waiting: deque[float] = deque()
        opening = 0
        count = 0

        def answered(connection: Connection, status: int) -> None:
            now = time.perf_counter()
            samples.add(now, now - connection.due, status)
            if not connection.usable:
                self._all.discard(connection)
                if waiting:
                    self._spawn(open_one())
            elif waiting:
                connection.send(self.next_request(), waiting.popleft())
            else:
                idle.append(connection)

        async def open_one() -> None:
            nonlocal opening
            opening += 1
            try:
                connection = await self.connect(answered)
            except OSError:
                if waiting:
                    now = time.perf_counter()
                    samples.add(now, now - waiting.popleft(), 0)
                return
            finally:
                opening -= 1
            if waiting:
                connection.send(self.next_request(), waiting.popleft())
            else:
                idle.append(connection)

        idle: deque[Connection] = deque()
        start, at = time.perf_counter(), 0.0
        while (at := traffic.next_arrival(at, rng)) < traffic.seconds and count - len(samples.finished) <= most:
            due = start + at
            pause = due - time.perf_counter()
            if pause > 0 or count % 16 == 0:
                await asyncio.sleep(max(0.0, pause))
            count += 1
            while idle and not idle[-1].usable:
                idle.pop()
            if idle:
                idle.pop().send(self.next_request(), due)
            else:
                waiting.append(due)
                if opening + len(self._all) < MAX_OPEN_CONNECTIONS:
                    self._spawn(open_one())
        if at >= traffic.seconds:
            await asyncio.sleep(max(0.0, start + traffic.seconds - time.perf_counter()))
        return count

    async def close(self) -> None:
        """Ends all connections; unanswered requests are not counted."""
        self._level = 0
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._all:
            connection.busy = False
            connection.close()
        await asyncio.sleep(0)
