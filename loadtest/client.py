"""The load generator: prepared requests to one target, in a closed loop (a number of requests in flight) or an open
loop (arrivals that wait for nothing). Knows no statistics.
"""

import asyncio
import itertools
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from loadtest.connection import Answers, Connection, Target
from loadtest.shapes import Shape

# A client that is refused waits, or it would count refusals instead of measuring the server.
BACK_OFF_SECONDS = 0.05
MAX_CONNECTIONS = 4096
# Arrivals closer than this leave together: waking up for each would cost the client more than sending it. At high
# rates, where a server needs the CPU that the client takes, and its answers take long anyway, ticks are longer.
TICK_SECONDS = 0.0002
BUSY_TICK_SECONDS = 0.001
BUSY_RATE = 2000


class Client:
    """Sends the requests in turn to one target. A closed loop's answers are in `answers`, which may be replaced."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[bytes],
        max_connections: int = MAX_CONNECTIONS,
        back_off_seconds: float = BACK_OFF_SECONDS,
    ) -> None:
        self._target, self._turn = target, itertools.cycle(requests)
        self._max_connections, self._back_off_seconds = max_connections, back_off_seconds
        self._level = self._clients = self._opening = 0
        self._idle: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._waiting: deque[tuple[float, Answers | None]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers = Answers()
        # Sent, or waiting for a connection, and not answered.
        self.in_flight = 0

    def hold(self, in_flight: int) -> None:
        """Keeps this many requests in flight from now on; takes effect as requests end."""
        self._level = in_flight
        while self._clients < self._level:
            self._clients += 1
            self._send(time.perf_counter(), None)

    async def arrive(self, traffic: Shape, answers: Answers, seed: int = 0, most: float = math.inf) -> int:
        """Poisson arrivals, whatever the server does; returns how many. A latency counts from when the request was due,
        so that a slow server cannot hide behind a client that waits. Ends when more than `most` are in flight."""
        loop, end = asyncio.get_running_loop(), time.perf_counter() + traffic.seconds
        over = threading.Event()
        sent = 0

        def fire(dues: list[float]) -> None:
            nonlocal sent
            if self.in_flight > most:
                over.set()
            if not over.is_set():
                sent += len(dues)
                for due in dues:
                    self._send(due, answers)

        try:
            await asyncio.to_thread(
                _keep_time, lambda dues: loop.call_soon_threadsafe(fire, dues), over, traffic, random.Random(seed)
            )
            await asyncio.sleep(0 if over.is_set() else max(0.0, end - time.perf_counter()))
        finally:
            over.set()
        return sent

    async def connect(self, connections: int) -> None:
        """Opens so many connections before they are needed."""
        self._opening += connections
        await asyncio.gather(*(self._open() for _ in range(connections)))

    async def drain(self, seconds: float) -> None:
        """Waits until everything sent has been answered, but no longer than this."""
        limit = time.perf_counter() + seconds
        while self.in_flight and time.perf_counter() < limit:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Ends all connections; what is not answered is not counted."""
        self._level = 0
        self._waiting.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._all:
            connection.busy = False
            connection.close()
        await asyncio.sleep(0)

    def _send(self, due: float, answers: Answers | None) -> None:
        """On an idle connection, else on the next that is free or open."""
        self.in_flight += 1
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                connection.send(next(self._turn), due, answers)
                return
            self._all.discard(connection)
        self._waiting.append((due, answers))
        self._open_more()

    def _free(self, connection: Connection) -> None:
        """A connection without a request takes one that waits."""
        if not connection.usable:
            self._all.discard(connection)
            self._open_more()
        elif self._waiting:
            connection.send(next(self._turn), *self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _open_more(self) -> None:
        if self._opening < len(self._waiting) and self._opening + len(self._all) < self._max_connections:
            self._opening += 1
            task = asyncio.get_running_loop().create_task(self._open())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _open(self) -> None:
        loop, target, connection = asyncio.get_running_loop(), self._target, Connection(self._answered)
        try:
            await loop.create_connection(lambda: connection, target.host, target.port, ssl=target.tls)
        except OSError:
            if self._waiting:
                self._record(*self._waiting.popleft(), 0)
            return
        finally:
            self._opening -= 1
        self._all.add(connection)
        self._free(connection)

    def _answered(self, connection: Connection, status: int) -> None:
        due, answers = connection.due, connection.answers
        self._free(connection)
        self._record(due, answers, status)

    def _record(self, due: float, open_loop: Answers | None, status: int) -> None:
        now = time.perf_counter()
        answers = self.answers if open_loop is None else open_loop
        answers.finished.append(now)
        answers.latencies.append(now - due)
        answers.statuses.append(status)
        self.in_flight -= 1
        if open_loop is None:
            if status == 200 or not self._back_off_seconds:
                self._again()
            else:
                asyncio.get_running_loop().call_later(self._back_off_seconds, self._again)

    def _again(self) -> None:
        """A client of the closed loop sends its next request, if it is still wanted."""
        self._clients -= 1
        self.hold(self._level)


def _keep_time(
    fire: Callable[[list[float]], object], over: threading.Event, traffic: Shape, rng: random.Random
) -> None:
    """Calls `fire` with the moments that are due. In a thread: an event loop's timers are a millisecond apart, which is
    as long as many an answer takes."""
    tick = TICK_SECONDS if traffic.highest < BUSY_RATE else BUSY_TICK_SECONDS
    now = start = time.perf_counter()
    due = start + traffic.next_arrival(0.0, rng)
    while due < start + traffic.seconds and not over.is_set():
        time.sleep(max(tick, due - now))
        now = time.perf_counter()
        dues = []
        while due <= now and due < start + traffic.seconds:
            dues.append(due)
            due = start + traffic.next_arrival(due - start, rng)
        if dues:
            fire(dues)
