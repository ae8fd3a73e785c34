"""One HTTP exchange of the inference path: its headers, its body within limits, its deadline, a client that leaves.

Speaks ASGI directly. Never looks into a body.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope

from app.batching.deadlines import Deadlines
from app.errors import BodyTimeout, BodyTooLarge, ClientClosed, RequestError, Unavailable
from app.predictor import Usage

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Bodies being received at once, in units of the largest one allowed: bounds memory whatever clients send.
MAX_BODIES = 32
# The key in a scope's extensions of a `Connection`. Our own server gives it (see `app.http.connection`); under another
# one ASGI's messages do the same, which costs more.
CONNECTION = "sentiment_inference.connection"
T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()


class Connection(Protocol):
    """A client's connection; calls its `on_lost` when the client leaves."""

    on_lost: Callable[[], None] | None

    async def answer(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Sends a whole response."""


@dataclass(slots=True)
class Answer:
    """A response: status, body, and headers as ASGI wants them (names in lower case)."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content_type: bytes = b"application/json"


def json_answer(content: Any, headers: list[tuple[bytes, bytes]] | None = None) -> Answer:
    """`content` as JSON: anything that msgspec encodes."""
    return Answer(200, _ENCODER.encode(content), headers or [])


def error_answer(error: RequestError) -> Answer:
    """The one shape of every error, `{"error": …}`, with the headers that its status asks for."""
    headers = []
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_seconds))
    if error.close:
        headers.append((b"connection", b"close"))
    return Answer(error.status, _ENCODER.encode({"error": str(error)}), headers)


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The client's `X-Request-ID` if it is short and plain, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    # Not a secret: a pseudo-random number names a request as well, without a system call.
    return given if given and REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class RequestLimits:
    """What all exchanges have together: limits, bytes of bodies held at once, deadlines, the event loop."""

    def __init__(self, max_body_bytes: int, timeout_seconds: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.max_total_bytes = max_body_bytes * MAX_BODIES
        self.held_bytes = 0
        self.timeout_seconds = timeout_seconds
        self.deadlines = Deadlines()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Looked up once: before Python 3.12 each look-up is a system call."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop


class InferenceRequest:
    """One inference request. `deadline` is on the clock of `time.monotonic()`, seconds."""

    __slots__ = (
        "_common",
        "_expired",
        "_gone",
        "_receive",
        "_task",
        "body_bytes",
        "connection",
        "deadline",
        "error",
        "headers",
        "id",
        "path_params",
        "route",
        "slot",
        "started",
        "status",
        "usage",
    )

    def __init__(
        self, scope: Scope, receive: Receive, route: str, path_params: dict[str, str | None], common: RequestLimits
    ) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + common.timeout_seconds
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = request_id_of(self.headers)
        self.route = route
        self.path_params = path_params
        self.status = 0
        self.error: str | None = None
        self.body_bytes = 0
        self.usage = Usage()
        self.slot = 0
        self.connection: Connection | None = scope.get("extensions", {}).get(CONNECTION)
        self._receive = receive
        self._common = common
        task = asyncio.current_task(common.loop)
        assert task is not None
        self._task = task
        self._gone = False
        self._expired = False

    def header(self, name: bytes) -> str | None:
        """A header's value; the last one if it came twice."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body. Raises BodyTooLarge before it is in memory, BodyTimeout at the deadline, ClientClosed,
        Unavailable when too many bodies are arriving at once."""
        common = self._common
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > common.max_body_bytes:
            raise BodyTooLarge(f"body: expected at most {common.max_body_bytes} bytes, declared {int(declared)}")
        common.deadlines.add(common.loop, self, self.deadline)
        chunks: list[bytes] = []
        try:
            more = True
            while more:
                chunk, more = self._accept(await self._receive())
                chunks.append(chunk)
        except asyncio.CancelledError:
            if self._expired and not self._task.uncancel():
                raise BodyTimeout("body: not received before the deadline") from None
            raise
        finally:
            common.deadlines.discard(self)
            common.held_bytes -= self.body_bytes
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def expire(self) -> None:
        """The body has not come in time."""
        self._expired = True
        self._task.cancel()

    def _accept(self, message: Any) -> tuple[bytes, bool]:
        if message["type"] == "http.disconnect":
            raise ClientClosed("the client left before its body was read")
        chunk: bytes = message.get("body", b"")
        common = self._common
        self.body_bytes += len(chunk)
        common.held_bytes += len(chunk)
        if self.body_bytes > common.max_body_bytes:
            raise BodyTooLarge(f"body: expected at most {common.max_body_bytes} bytes, received more")
        if common.held_bytes > common.max_total_bytes:
            raise Unavailable("too many bodies at once", "memory", close=True)
        return chunk, message.get("more_body", False)

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`; cancels it and raises ClientClosed when the client leaves first."""
        watcher = None
        if self.connection is not None:
            self.connection.on_lost = self._leave
        else:
            watcher = self._common.loop.create_task(self._watch())
        try:
            return await work
        except asyncio.CancelledError:
            if self._gone and not self._task.uncancel():
                raise ClientClosed("the client left before it was answered") from None
            raise
        finally:
            if watcher is not None:
                watcher.cancel()
            elif self.connection is not None:
                self.connection.on_lost = None

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._task.cancel()
