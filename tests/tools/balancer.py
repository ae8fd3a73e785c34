"""A small HTTP balancer over real replica processes, whose number a HPA sets while it runs."""

import asyncio
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable

from tests.process import ROOT
from tests.tools.standin import read_request

UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"


class Backend:
    """One replica process: when it was ready, what it has in flight, idle connections to it."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.port = 0
        self.ready_at: float | None = None
        self.gone = False
        self.in_flight = 0
        self.samples: deque[float] = deque(maxlen=16)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def start(self, command: list[str], pending_seconds: float) -> None:
        """Waits as a Pod waits for its node and image, then starts the process and waits until it listens."""
        await asyncio.sleep(pending_seconds)
        if self.gone:
            return
        self.process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if self.gone:  # stopped while it started
            await self.stop()
            return
        self.port = int(line)
        self.ready_at = time.perf_counter()

    async def forward(self, request: bytes) -> bytes:
        """The answer of this replica."""
        self.in_flight += 1
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request)
            answer = await read_request(reader)
            self._idle.append((reader, writer))
            return answer
        finally:
            self.in_flight -= 1

    async def stop(self) -> None:
        """Lets it finish, then ends it."""
        self.gone = True
        while self.in_flight:
            await asyncio.sleep(0.02)
        for _, writer in self._idle:
            writer.close()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


class Balancer:
    """Spreads requests over ready replicas in turn; `resize` starts and stops processes."""

    def __init__(self, command: list[str], pending_seconds: float) -> None:
        self._command = command
        self._pending = pending_seconds
        self._turn = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.backends: list[Backend] = []

    @property
    def ready(self) -> list[Backend]:
        return [backend for backend in self.backends if backend.ready_at is not None]

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> "Balancer":
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0, backlog=1024)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*(backend.stop() for backend in self.backends))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def resize(self, wanted: int) -> None:
        """Starts replicas, or stops the youngest."""
        while len(self.backends) < wanted:
            backend = Backend()
            self.backends.append(backend)
            self._spawn(backend.start(self._command, self._pending))
        while len(self.backends) > wanted:
            backend = self.backends.pop()
            backend.gone = True
            self._spawn(backend.stop())

    async def until_ready(self, count: int) -> None:
        """Waits for that many ready replicas."""
        while len(self.ready) < count:
            await asyncio.sleep(0.02)

    def scrape(self, value: Callable[[Backend], float] = lambda backend: backend.in_flight) -> None:
        """Takes a sample of every ready replica's in-flight."""
        for backend in self.ready:
            backend.samples.append(value(backend))

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                request = await read_request(reader)
                ready = self.ready
                writer.write(await ready[next(self._turn) % len(ready)].forward(request) if ready else UNAVAILABLE)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()


def standin(servers: int, seconds: float) -> list[str]:
    """The command of a replica that sleeps."""
    return [sys.executable, "-m", "tests.tools.standin", "--servers", str(servers), "--seconds", str(seconds)]
