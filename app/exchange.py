"""One HTTP exchange of the inference path: its headers, its body within limits, its deadline, a client that leaves.

Speaks ASGI directly. Never looks into a body.
"""

import asyncio
import random
import re
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from app.errors import BodyTimeout, BodyTooLarge, ClientClosed, RequestError, Unavailable
from app.predictor import Usage

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Bodies being received at once, in units of the largest one allowed: bounds memory whatever clients send.
MAX_BODIES = 32
T = TypeVar("T")
_ENCODER = msgspec.json.Encoder()


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


class Buffers:
    """Bytes of request bodies held at once, all exchanges together."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self.max_total_bytes = max_body_bytes * MAX_BODIES
        self.held_bytes = 0


class Exchange:
    """One inference request. `deadline` is on the clock of `time.monotonic()`, seconds."""

    __slots__ = (
        "_buffers",
        "_expired",
        "_gone",
        "_receive",
        "body_bytes",
        "deadline",
        "error",
        "headers",
        "id",
        "path_params",
        "route",
        "started",
        "status",
        "usage",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        route: str,
        path_params: dict[str, str | None],
        timeout_seconds: float,
        buffers: Buffers,
    ) -> None:
        self.started = time.monotonic()
        self.deadline = self.started + timeout_seconds
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = request_id_of(self.headers)
        self.route = route
        self.path_params = path_params
        self.status = 0
        self.error: str | None = None
        self.body_bytes = 0
        self.usage = Usage()
        self._receive = receive
        self._buffers = buffers
        self._gone = False
        self._expired = False

    def header(self, name: bytes) -> str | None:
        """A header's value; the last one if it came twice."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body. Raises BodyTooLarge before it is in memory, BodyTimeout at the deadline, ClientClosed,
        Unavailable when too many bodies are arriving at once."""
        limit = self._buffers.max_body_bytes
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLarge(f"body: expected at most {limit} bytes, declared {int(declared)}")
        task = asyncio.current_task()
        assert task is not None
        timer = task.get_loop().call_later(self.deadline - time.monotonic(), self._expire, task)
        chunks: list[bytes] = []
        try:
            more = True
            while more:
                chunk, more = self._accept(await self._receive())
                chunks.append(chunk)
        except asyncio.CancelledError:
            if self._expired and not task.uncancel():
                raise BodyTimeout("body: not received before the deadline") from None
            raise
        finally:
            timer.cancel()
            self._buffers.held_bytes -= self.body_bytes
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _expire(self, task: "asyncio.Task[Any]") -> None:
        self._expired = True
        task.cancel()

    def _accept(self, message: Any) -> tuple[bytes, bool]:
        if message["type"] == "http.disconnect":
            raise ClientClosed("the client left before its body was read")
        chunk: bytes = message.get("body", b"")
        buffers = self._buffers
        self.body_bytes += len(chunk)
        buffers.held_bytes += len(chunk)
        if self.body_bytes > buffers.max_body_bytes:
            raise BodyTooLarge(f"body: expected at most {buffers.max_body_bytes} bytes, received more")
        if buffers.held_bytes > buffers.max_total_bytes:
            raise Unavailable("too many bodies at once", "memory", close=True)
        return chunk, message.get("more_body", False)

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """The result of `work`; cancels it and raises ClientClosed when the client leaves first."""
        task = asyncio.current_task()
        assert task is not None
        watcher = asyncio.create_task(self._watch(task))
        try:
            return await work
        except asyncio.CancelledError:
            if self._gone and not task.uncancel():
                raise ClientClosed("the client left before it was answered") from None
            raise
        finally:
            watcher.cancel()

    async def _watch(self, task: "asyncio.Task[Any]") -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._gone = True
        task.cancel()
