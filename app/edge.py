"""The edge of the service, as pure ASGI: request ids, in-flight count, metrics, one log line per inference request.

Also reads request bodies within their limits and notices clients that leave. Never looks into a body.
"""

import asyncio
import re
import time
import uuid
from types import TracebackType
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTimeout, BodyTooLarge, ClientClosed, RequestError, Unavailable
from app.logs import logger, stack_of
from app.metrics import Metrics
from app.predictor import Predictor, Usage
from app.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
INFER_PATH = re.compile(r"/v2/models/[^/]+(/versions/[^/]+)?/infer")
# Bodies being received at once, in units of the largest one allowed: bounds memory whatever clients send.
MAX_BODIES = 32


class Exchange:
    """One request as the edge sees it; endpoints find it in `request.scope["exchange"]`."""

    __slots__ = ("body_bytes", "deadline", "error", "id", "route", "started", "status", "usage")

    def __init__(self, request_id: str, route: str | None, timeout_ms: float) -> None:
        self.id = request_id
        self.route = route
        self.started = time.monotonic()
        self.deadline = self.started + timeout_ms / 1000
        self.status = 0
        self.error: str | None = None
        self.body_bytes = 0
        self.usage = Usage()


class Traffic:
    """Inference requests that are not answered yet, and a way to wait until there are none."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._idle: asyncio.Future[None] | None = None

    def enter(self) -> None:
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
        if not self.in_flight and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is in flight; False if that took longer than `timeout_seconds`."""
        if not self.in_flight:
            return True
        self._idle = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._idle], timeout=timeout_seconds)
        return bool(done)


def route_of(method: str, path: str) -> str | None:
    """The metrics label of an inference request; None for everything else."""
    if method != "POST":
        return None
    if path in ("/predict", "/predict/batch"):
        return path
    return "/v2/models/infer" if INFER_PATH.fullmatch(path) else None


class Edge:
    """The outermost middleware."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, predictor: Predictor, traffic: Traffic
    ) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.predictor = predictor
        self.traffic = traffic
        self.log = logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        exchange = Exchange(request_id, route_of(scope["method"], scope["path"]), self.settings.request_timeout_ms)
        scope["exchange"] = exchange

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self.predictor.stage == "draining":
                    headers["connection"] = "close"
            await send(message)

        if exchange.route is not None:
            self.traffic.enter()
            self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, send_with_headers)
        # The last line of defence: a bug ends one request, with its place in the log and nothing else.
        except Exception as error:
            self.log.error("unhandled", request_id=request_id, error_type=type(error).__name__, stack=stack_of(error))
            exchange.error = "internal error"
            if not exchange.status:
                await json_response({"error": "internal error"}, 500)(scope, receive, send_with_headers)
        finally:
            if exchange.route is not None:
                self.traffic.leave()
                self.metrics.in_flight.dec()
                self._record(exchange, exchange.route)

    def _record(self, exchange: Exchange, route: str) -> None:
        seconds = time.monotonic() - exchange.started
        # No status was sent: the client left, or the server was told to stop at once.
        status = exchange.status or ClientClosed.status
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.duration.labels(route).observe(seconds)
        usage, model = exchange.usage, self.predictor.model
        self.log.info(
            "request",
            request_id=exchange.id,
            route=route,
            status=status,
            error=exchange.error,
            duration_ms=round(seconds * 1000, 3),
            body_bytes=exchange.body_bytes,
            rows=usage.rows,
            tokens=usage.tokens,
            queue_ms=round(usage.queue_seconds * 1000, 3),
            inference_ms=round(usage.inference_seconds * 1000, 3),
            model=model.artifact.manifest.name if model else None,
            model_version=model.artifact.manifest.version if model else None,
        )


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content` as JSON: anything that msgspec encodes."""
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(request: Request, error: RequestError, metrics: Metrics) -> Response:
    """The one shape of every error, `{"error": …}`, with the headers that its status asks for."""
    exchange: Exchange = request.scope["exchange"]
    exchange.error = type(error).__name__
    if error.reason is not None and exchange.route is not None:
        metrics.rejected.labels(error.reason).inc()
    headers = {}
    if error.retry_after_seconds is not None:
        headers["retry-after"] = str(error.retry_after_seconds)
    if error.close:
        headers["connection"] = "close"
    return json_response({"error": str(error)}, error.status, headers)


class BodyReader:
    """Reads bodies within a size limit each, a total for all, and the request's deadline."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._limit = settings.max_body_bytes
        self._total = settings.max_body_bytes * MAX_BODIES
        self._held = 0
        self._metrics = metrics

    async def read(self, request: Request) -> bytes:
        """The whole body. Raises BodyTooLarge before it is in memory, BodyTimeout at the deadline, ClientClosed,
        Unavailable when too many bodies are arriving at once."""
        exchange: Exchange = request.scope["exchange"]
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > self._limit:
            raise BodyTooLarge(f"body: expected at most {self._limit} bytes, declared {int(declared)}")
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(exchange.deadline - time.monotonic()):
                while True:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientClosed("the client left before its body was read")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    self._held += len(chunk)
                    if size > self._limit:
                        raise BodyTooLarge(f"body: expected at most {self._limit} bytes, received more")
                    if self._held > self._total:
                        raise Unavailable("too many bodies at once", "memory", close=True)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise BodyTimeout("body: not received before the deadline") from None
        finally:
            self._held -= size
            exchange.body_bytes = size
        self._metrics.request_bytes.observe(size)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class CancelOnDisconnect:
    """`async with CancelOnDisconnect(request):` cancels its body when the client leaves, and raises ClientClosed."""

    def __init__(self, request: Request) -> None:
        self._receive = request.receive
        self._gone = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        self._gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError and not self._task.uncancel():
            raise ClientClosed("the client left before it was answered") from None
