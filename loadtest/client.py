"""A small HTTP/1.1 load generator: closed loop (connections that wait) and open loop (arrivals that do not).

Raw asyncio protocols and ready-made request bytes, so that the client costs little beside the server it measures.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

# Arrivals closer than this leave together: waking up for each would cost the client more than sending it. At high
# rates, where a server needs the CPU that the client takes, and its answers take long anyway, ticks are longer.
TICK_SECONDS = 0.0002
BUSY_TICK_SECONDS = 0.001
BUSY_RATE = 2000


@dataclass(slots=True)
class Outcome:
    """What came back. Latencies in seconds, from when a request was due; `status` 0 is a broken connection."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    unanswered: int = 0

    def of(self, good: bool) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        return np.array([t for t, s in zip(self.latencies, self.statuses, strict=True) if (s == 200) == good])

    def summary(self) -> dict[str, float]:
        """Rates per second, latencies in milliseconds."""
        good, bad = self.of(good=True), self.of(good=False)

        def at(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", percent: float) -> float:
            return round(float(np.percentile(values, percent)) * 1e3, 3) if len(values) else float("nan")

        result = {
            "requests_per_second": len(good) / self.seconds,
            "refused_per_second": len(bad) / self.seconds,
            "p50_ms": at(good, 50),
            "p99_ms": at(good, 99),
            "refusal_p99_ms": at(bad, 99),
            "goodput_100ms_per_second": float((good <= 0.1).sum()) / self.seconds,
            "goodput_250ms_per_second": float((good <= 0.25).sum()) / self.seconds,
            "unanswered": self.unanswered,
        }
        return {name: round(value, 3) for name, value in result.items()}


def post(url: str, body: bytes) -> bytes:
    """The bytes of one JSON POST."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it."""

    def __init__(self, done: Callable[["_Connection", float, int], None]) -> None:
        self._done = done
        self._buffer = b""
        self._due = 0.0
        self.busy = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, request: bytes, due: float) -> None:
        assert self.transport is not None
        self._due, self.busy = due, True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        headers = self._buffer[:head].lower()
        start = headers.find(b"content-length:") + 15
        end = headers.find(b"\r\n", start)
        length = int(headers[start : end if end >= 0 else None])
        if len(self._buffer) < head + 4 + length:
            return
        status = int(self._buffer[9:12])
        self._buffer = b""
        self._finish(status)

    def connection_lost(self, _: Exception | None) -> None:
        self.transport = None
        if self.busy:
            self._finish(0)

    def _finish(self, status: int) -> None:
        self.busy = False
        self._done(self, time.perf_counter() - self._due, status)


async def closed_loop(host: str, port: int, requests: list[bytes], connections: int, seconds: float) -> Outcome:
    """`connections` clients that each send their next request when the last is answered, for `seconds`; the first
    fifth of the time warms up and is not counted."""
    loop = asyncio.get_running_loop()
    start = time.perf_counter()
    begin, stop = start + seconds / 5, start + seconds
    outcome = Outcome(stop - begin)
    counter = iter(range(10**12))

    def next_on(connection: _Connection) -> None:
        connection.send(requests[next(counter) % len(requests)], time.perf_counter())

    def done(connection: _Connection, latency: float, status: int) -> None:
        now = time.perf_counter()
        if begin <= now < stop:
            outcome.latencies.append(latency)
            outcome.statuses.append(status)
        if now < stop and connection.transport is not None:
            next_on(connection)

    pool = [(await loop.create_connection(lambda: _Connection(done), host, port))[1] for _ in range(connections)]
    for connection in pool:
        next_on(connection)
    await asyncio.sleep(seconds)
    await _close(pool)
    return outcome


async def open_loop(
    host: str,
    port: int,
    requests: list[bytes],
    rate: float,
    seconds: float,
    grace_seconds: float = 2.0,
    max_connections: int = 4000,
) -> Outcome:
    """Arrivals at `rate` per second, exponentially spaced, whatever the server does. A latency counts from when the
    request was due, so that a slow server cannot hide behind a client that waits."""
    loop = asyncio.get_running_loop()
    rng = random.Random(0)
    outcome = Outcome(seconds)
    idle: deque[_Connection] = deque()
    pool: list[_Connection] = []
    waiting: deque[tuple[bytes, float]] = deque()
    opening = 0

    def done(connection: _Connection, latency: float, status: int) -> None:
        outcome.latencies.append(latency)
        outcome.statuses.append(status)
        if connection.transport is None or connection.transport.is_closing():
            return
        if waiting:
            connection.send(*waiting.popleft())
        else:
            idle.append(connection)

    async def connect() -> None:
        nonlocal opening
        opening += 1
        try:
            connection = (await loop.create_connection(lambda: _Connection(done), host, port))[1]
        except OSError:
            return
        finally:
            opening -= 1
        pool.append(connection)
        if waiting:
            connection.send(*waiting.popleft())
        else:
            idle.append(connection)

    for _ in range(64):
        await connect()
    tasks: set[asyncio.Task[None]] = set()
    sent = 0

    def fire(dues: list[float]) -> None:
        nonlocal sent
        for due in dues:
            request = requests[sent % len(requests)]
            sent += 1
            while idle and (idle[-1].transport is None or idle[-1].transport.is_closing()):
                idle.pop()
            if idle:
                idle.pop().send(request, due)
                continue
            waiting.append((request, due))
            if opening + len(pool) < max_connections:
                task = loop.create_task(connect())
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    await asyncio.to_thread(_keep_time, lambda dues: loop.call_soon_threadsafe(fire, dues), rate, seconds, rng)
    await asyncio.sleep(0)
    limit = time.perf_counter() + grace_seconds
    while len(outcome.statuses) < sent and time.perf_counter() < limit:
        await asyncio.sleep(0.01)
    outcome.unanswered = sent - len(outcome.statuses)
    await _close(pool)
    return outcome


def _keep_time(fire: Callable[[list[float]], object], rate: float, seconds: float, rng: random.Random) -> None:
    """Calls `fire` with the moments that are due. In a thread: an event loop's timers are a millisecond apart, which is
    as long as many an answer takes."""
    tick = TICK_SECONDS if rate < BUSY_RATE else BUSY_TICK_SECONDS
    now = start = time.perf_counter()
    due = start + rng.expovariate(rate)
    while due < start + seconds:
        time.sleep(max(tick, due - now))
        now = time.perf_counter()
        dues = []
        while due <= now and due < start + seconds:
            dues.append(due)
            due += rng.expovariate(rate)
        if dues:
            fire(dues)


async def _close(pool: list[_Connection]) -> None:
    for connection in pool:
        connection.busy = False
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.sleep(0)
