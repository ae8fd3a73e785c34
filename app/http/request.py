"""One inference request over ASGI: its headers, its body within limits, its deadline, a client that leaves.

Never looks into a body.
"""

import asyncio
import time
import zlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from starlette.types import Receive, Scope

from app.batching.deadlines import Deadlines
from app.errors import (
    BadRequest,
    BodyTimeout,
    BodyTooLarge,
    ClientClosed,
    Invalid,
    Unavailable,
    UnsupportedMedia,
)
from app.oip.outputs import MAX_ANSWER
from app.oip.tensors import MAX_STRINGS
from app.predictor import Predictor, Usage
from app.request_log import request_id

if TYPE_CHECKING:
    from app.jobs.queue import JobQueue

# Bodies being received at once, in units of the largest one allowed: bounds memory whatever clients send.
MAX_BODIES = 32
# Where in a scope's extensions our own server puts the connection, whose `on_lost` is called when the client leaves.
# Under another server ASGI's messages say so, which costs more.
CONNECTION = "app.connection"
# zlib's window: none, gzip, and what HTTP calls deflate (with zlib's header).
ENCODINGS = {"identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}
T = TypeVar("T")


def decode_json(body: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """Raises BadRequest for what is not JSON, Invalid for JSON of another shape or with more strings than MAX_STRINGS.
    Neither message quotes the body."""
    # Where a string begins, no backslash is before its quote.
    if len(body) > MAX_STRINGS and body.count(b'"') - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise Invalid(f"body: expected at most about {MAX_STRINGS} strings in JSON")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        detail = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8"
        raise BadRequest(f"body: {detail}") from None
    except RecursionError:
        raise BadRequest("body: nested too deeply") from None


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The client's `X-Request-ID` if it is short and plain, else a new one."""
    return request_id(headers.get(b"x-request-id", b"").decode("latin-1"))


class RequestLimits:
    """What all requests share: limits, bytes of bodies held at once, deadlines."""

    def __init__(self, max_body_bytes: int, timeout_seconds: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.max_total_bytes = max_body_bytes * MAX_BODIES
        self.held_bytes = 0
        self.timeout_seconds = timeout_seconds
        self.deadlines = Deadlines()
        self.loop: asyncio.AbstractEventLoop | None = None


class InferenceRequest:
    """`deadline` is on the clock of `time.monotonic()`, seconds. `usage` is the middleware's to set. From when the
    request is admitted, `predictor`, or `jobs` where the route takes a queue."""

    __slots__ = (
        "_client_left", "_expired", "_limits", "_loop", "_receive", "_task", "body_bytes", "connection", "deadline",
        "error", "headers", "id", "jobs", "path_params", "predictor", "route", "slot", "started", "status", "usage",
    )  # fmt: skip

    usage: Usage
    predictor: Predictor
    jobs: "JobQueue"

    def __init__(
        self, scope: Scope, receive: Receive, route: str, path_params: dict[str, str], limits: RequestLimits
    ) -> None:
        """route: its metric label."""
        self.started = time.monotonic()
        self.deadline = self.started + limits.timeout_seconds
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.id = request_id_of(self.headers)
        self.route = route
        self.path_params = path_params
        self.status = 0
        self.error: str | None = None
        self.body_bytes = 0
        self.slot = 0
        self.connection: Any = scope.get("extensions", {}).get(CONNECTION)
        self._receive = receive
        self._limits = limits
        if limits.loop is None:  # looked up once: before Python 3.12 each look-up is a system call
            limits.loop = asyncio.get_running_loop()
        self._loop = limits.loop
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._task = task
        self._client_left = False
        self._expired = False

    def header(self, name: bytes) -> str | None:
        """A header's value; the last one if it came twice."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def require_type(self, *types: str) -> None:
        """Raises UnsupportedMedia unless the content type is one of these."""
        if (self.header(b"content-type") or "").partition(";")[0].strip().lower() not in types:
            raise UnsupportedMedia(f"content-type: expected {' or '.join(types)}")

    def require_json(self) -> None:
        """Raises UnsupportedMedia unless the content type is JSON."""
        self.require_type("application/json")

    @property
    def most_answer_bytes(self) -> int:
        """How large an answer may be."""
        return self._limits.max_body_bytes * MAX_ANSWER

    def model_headers(self) -> list[tuple[bytes, bytes]]:
        """`X-Model` and `Server-Timing` of an answer."""
        usage, manifest = self.usage, self.predictor.model.artifact.manifest
        timing = b"queue;dur=%.3f, inference;dur=%.3f" % (usage.queue_seconds * 1e3, usage.inference_seconds * 1e3)
        return [(b"x-model", f"{manifest.name}/{manifest.version}".encode()), (b"server-timing", timing)]

    async def body(self) -> bytes:
        """The whole body, unpacked if it came packed. Raises BodyTooLarge before it is in memory, BodyTimeout at the
        deadline, ClientClosed, UnsupportedMedia for an encoding that is not known, BadRequest for one that is broken,
        Unavailable when too many bodies are arriving at once."""
        limits = self._limits
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limits.max_body_bytes:
            raise BodyTooLarge(f"body: expected at most {limits.max_body_bytes} bytes, declared {int(declared)}")
        window = ENCODINGS.get((self.header(b"content-encoding") or "identity").lower())
        if window is None:
            raise UnsupportedMedia(f"content-encoding: expected one of {', '.join(ENCODINGS)}")
        unpack = _Unpacked(window, limits.max_body_bytes) if window else None
        limits.deadlines.add(self._loop, self, self.deadline)
        chunks: list[bytes] = []
        held_bytes = 0
        try:
            more = True
            while more:
                chunk, more = self._accept(await self._receive())
                if unpack is not None:
                    chunk = unpack(chunk, more)
                held_bytes += len(chunk)
                limits.held_bytes += len(chunk)
                if limits.held_bytes > limits.max_total_bytes:
                    raise Unavailable("too many bodies at once", "memory", close=True)
                chunks.append(chunk)
        except asyncio.CancelledError:
            if self._expired and not self._task.uncancel():
                raise BodyTimeout("body: not received before the deadline") from None
            raise
        finally:
            limits.deadlines.discard(self)
            limits.held_bytes -= held_bytes
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def expire(self) -> None:
        """The body has not come in time."""
        self._expired = True
        self._task.cancel()

    def _accept(self, message: Any) -> tuple[bytes, bool]:
        if message["type"] == "http.disconnect":
            raise ClientClosed("the client left before its body was read")
        chunk: bytes = message.get("body", b"")
        self.body_bytes += len(chunk)
        if self.body_bytes > self._limits.max_body_bytes:
            raise BodyTooLarge(f"body: expected at most {self._limits.max_body_bytes} bytes, received more")
        return chunk, message.get("more_body", False)

    async def unless_client_leaves(self, work: Awaitable[T]) -> T:
        """The result of `work`; cancels it and raises ClientClosed when the client leaves first."""
        watcher = None
        if self.connection is not None:
            self.connection.on_lost = self._on_client_left
        else:
            watcher = self._loop.create_task(self._watch())
        try:
            return await work
        except asyncio.CancelledError:
            if self._client_left and not self._task.uncancel():
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
        self._on_client_left()

    def _on_client_left(self) -> None:
        self._client_left = True
        self._task.cancel()


class _Unpacked:
    """A packed body, chunk by chunk; never more than `max_bytes` in memory, however small it came."""

    def __init__(self, window: int, max_bytes: int) -> None:
        self._stream = zlib.decompressobj(window)
        self._max_bytes = max_bytes
        self._left = max_bytes

    def __call__(self, chunk: bytes, more: bool) -> bytes:
        stream = self._stream
        try:
            data = stream.decompress(chunk, self._left + 1)
        except zlib.error:
            raise BadRequest("body: not packed as content-encoding says") from None
        self._left -= len(data)
        if self._left < 0:
            raise BodyTooLarge(f"body: expected at most {self._max_bytes} bytes, unpacked to more")
        if stream.unused_data or (not more and not stream.eof):
            raise BadRequest("body: not packed as content-encoding says")
        return data
