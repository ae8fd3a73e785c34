"""The edge of the service, as pure ASGI: inference requests go straight to their handlers, all else to FastAPI.

One place counts, times and logs each inference request, and turns what it raises into its one answer. FastAPI's
routing, validation and middleware would cost such a request more than all else that the web side does to it.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import REJECT_REASONS, STATUSES, RequestError, Unavailable
from app.http.request import Answer, InferenceRequest, RequestLimits, error_answer, request_id_of
from app.predictor import Predictor
from app.settings import Settings
from app.telemetry.logging import logger, stack_of
from app.telemetry.metrics import ROUTES, Metrics

Handler = Callable[[InferenceRequest], Awaitable[Answer]]
INFER_PATH = re.compile(r"/v2/models/(?P<model_name>[^/]+)(?:/versions/(?P<model_version>[^/]+))?/infer")
INTERNAL_ERROR = b'{"error":"internal error"}'


class InFlightRequests:
    """Inference requests that are not answered yet, and a way to wait until there are none."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._idle: asyncio.Future[None] | None = None

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


class InferenceMiddleware:
    """An ASGI application around `app`. `handlers`: by route label, see `app.telemetry.metrics.ROUTES`."""

    def __init__(
        self,
        app: ASGIApp,
        handlers: dict[str, Handler],
        settings: Settings,
        metrics: Metrics,
        predictor: Predictor,
        in_flight: InFlightRequests,
    ) -> None:
        self.app = app
        self.handlers = handlers
        self.metrics = metrics
        self.predictor = predictor
        self.in_flight = in_flight
        self.limits = RequestLimits(settings.max_body_bytes, settings.request_timeout_ms / 1000)
        # Bound now: the lazy logger would bind anew for every line.
        self.log = logger().bind()
        metrics.in_flight.set_function(lambda: in_flight.in_flight)
        # Looking a child up by its labels costs more than counting on it.
        self.requests = {(r, status): metrics.requests.labels(r, str(status)) for r in ROUTES for status in STATUSES}
        self.rejected = {reason: metrics.rejected.labels(reason) for reason in REJECT_REASONS}
        self.durations = {route: metrics.duration.labels(route) for route in ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["method"] == "POST":
                path = scope["path"]
                if path in self.handlers:
                    await self.infer(InferenceRequest(scope, receive, path, {}, self.limits), send)
                    return
                if match := INFER_PATH.fullmatch(path):
                    parts = match.groupdict()
                    await self.infer(InferenceRequest(scope, receive, "/v2/models/infer", parts, self.limits), send)
                    return
            send = self._with_request_id(scope, send)
        await self.app(scope, receive, send)

    async def infer(self, request: InferenceRequest, send: Send) -> None:
        """Answers one inference request, whatever happens to it."""
        self.in_flight.in_flight += 1
        try:
            try:
                self.predictor.admit()
                answer = await self.handlers[request.route](request)
            except RequestError as error:
                answer = error_answer(error)
                request.error = type(error).__name__
                if error.reason is not None:
                    self.rejected[error.reason].inc()
            except asyncio.CancelledError:
                if not self.predictor.draining:
                    raise
                answer = error_answer(Unavailable("not answered before the server stopped", "draining", close=True))
            # The last line of defence: a bug ends one request, with its place in the log and nothing of its content.
            except Exception as error:
                answer = Answer(500, INTERNAL_ERROR)
                request.error = type(error).__name__
                self.log.error("unhandled", request_id=request.id, error_type=request.error, stack=stack_of(error))
            request.status = answer.status
            headers = [
                (b"content-type", answer.content_type),
                (b"content-length", b"%d" % len(answer.body)),
                (b"x-request-id", request.id.encode()),
                *answer.headers,
            ]
            if self.predictor.leaving:
                headers.append((b"connection", b"close"))
            if request.connection is not None:
                await request.connection.answer(answer.status, headers, answer.body)
            else:
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                await send({"type": "http.response.body", "body": answer.body})
        finally:
            self.in_flight.leave()
            self._record(request)

    def _record(self, request: InferenceRequest) -> None:
        seconds = time.monotonic() - request.started
        # No status: the server was told to stop at once.
        status = request.status or Unavailable.status
        self.requests[request.route, status].inc()
        self.durations[request.route].observe(seconds)
        # A request refused before its body was read says nothing of sizes.
        if request.body_bytes:
            self.metrics.request_bytes.observe(request.body_bytes)
        usage, model = request.usage, self.predictor.model
        self.log.info(
            "request",
            request_id=request.id,
            route=request.route,
            status=status,
            error=request.error,
            duration_ms=round(seconds * 1000, 3),
            body_bytes=request.body_bytes,
            rows=usage.rows,
            tokens=usage.tokens,
            queue_ms=round(usage.queue_seconds * 1000, 3),
            inference_ms=round(usage.inference_seconds * 1000, 3),
            model=model.artifact.manifest.name if model else None,
            model_version=model.artifact.manifest.version if model else None,
        )

    def _with_request_id(self, scope: Scope, send: Send) -> Send:
        """`send` with the headers that every response carries."""
        request_id = request_id_of(dict(scope["headers"])).encode()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                if self.predictor.leaving:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        return send_with_headers
