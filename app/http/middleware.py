"""Inference requests go straight to their handlers, all else to the application around it. Pure ASGI.

One place admits, counts, times and logs each inference request, and turns what it raises into its one answer. FastAPI's
routing and validation would cost such a request more than all else that the web side does to it. It is the innermost
middleware, so that any that is added to the application is around inference as well.
"""

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access import ApiKeys
from app.errors import RequestError, Unavailable
from app.http.request import InferenceRequest, RequestLimits, request_id_of
from app.http.response import Response, error_response
from app.http.routes import ADMIN_PATHS, EXEMPT_PATHS, HOOKS, Route, find_inference_route
from app.lifecycle import Lifecycle
from app.request_log import RequestLog
from app.settings import Settings
from app.telemetry.logging import logger, stack_of
from app.telemetry.metrics import Metrics

INTERNAL_ERROR = b'{"error":"internal error"}'


class InferenceMiddleware:
    """An ASGI application around `app`; the table in `app.http.routes` says which paths are inference."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
        log: RequestLog,
        paths: set[str],
        keys: ApiKeys | None = None,
    ) -> None:
        """paths: those of the table that are served. keys: one of which a request needs."""
        self.keys = keys
        self.admin_port = settings.admin_port
        self.app = app
        self.paths = paths
        self.limits = RequestLimits(settings.max_body_bytes, settings.request_timeout_ms / 1000)
        self.lifecycle = lifecycle
        self.metrics = metrics
        self.log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.admin_port and scope["path"] in ADMIN_PATHS and scope["server"][1] != self.admin_port:
            await _send(self._with_headers(scope, send), error_response(HTTPException(404)))
            return
        found = find_inference_route(scope["path"])
        if found is None or found[0].path not in self.paths:
            # HEAD is GET without a body, which the server leaves out.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._pass_on(asked, receive, self._with_headers(scope, send))
        elif found[0].method != scope["method"]:
            wrong = HTTPException(405, headers={"allow": found[0].method})
            await _send(self._with_headers(scope, send), error_response(wrong))
        else:
            route, path_params = found
            request = InferenceRequest(scope, receive, route.label, path_params, self.limits)
            request.usage = self.log.begin(route.method, route.label, request.headers, request.started)
            await self._infer(request, route, scope, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To the application, if hooks and keys let it."""
        path = scope["path"]
        if (HOOKS or self.keys is not None) and path not in EXEMPT_PATHS:
            try:
                if self.keys is not None and path not in ADMIN_PATHS:
                    self.keys.name_of(HTTPConnection(scope).headers.get("authorization"))
                await _call_hooks(scope)
            except (RequestError, HTTPException) as error:
                await _send(send, error_response(error))
                return
        await self.app(scope, receive, send)

    async def _infer(self, request: InferenceRequest, route: Route, scope: Scope, send: Send) -> None:
        """Answers one inference request, whatever happens to it."""
        self.lifecycle.in_flight += 1
        try:
            response = await self._response(request, route, scope)
            request.status = response.status
            response.headers.append((b"x-request-id", request.id.encode()))
            if self.lifecycle.draining:
                response.headers.append((b"connection", b"close"))
            await _send(send, response)
        finally:
            self.lifecycle.request_ended()
            self._record(request)

    async def _response(self, request: InferenceRequest, route: Route, scope: Scope) -> Response:
        lifecycle = self.lifecycle
        try:
            if self.keys is not None:
                request.usage.client = self.keys.name_of(request.header(b"authorization"))
            if HOOKS:
                await _call_hooks(scope)
            if lifecycle.refusing:
                raise lifecycle.unavailable()
            if route.queued:
                request.jobs = lifecycle.jobs
            else:
                request.predictor = lifecycle.loaded()
                # Here, because reading what will be refused is work.
                request.predictor.batcher.admission.admit()
            response: Response = await route.handler(request)
            if request.connection is not None:
                request.connection.backoff.answered(None)
            return response
        except (RequestError, HTTPException) as error:
            request.error = type(error).__name__
            if isinstance(error, RequestError):
                if error.reason is not None:
                    self.metrics.rejections[error.reason].inc()
                if request.connection is not None:
                    request.connection.backoff.answered(error.retry_after_seconds)
            return error_response(error)
        except asyncio.CancelledError:
            if not lifecycle.refusing:
                raise
            return error_response(Unavailable("not answered before the server stopped", "draining", close=True))
        # The last line of defence: a bug ends one request, with its place in the log and nothing of its content.
        except Exception as error:
            request.error = type(error).__name__
            ids = request.usage.trace_ids
            logger().error("unhandled", request_id=request.id, **ids, error_type=request.error, stack=stack_of(error))
            return Response(500, INTERNAL_ERROR)

    def _record(self, request: InferenceRequest) -> None:
        seconds = time.monotonic() - request.started
        # No status: the server was told to stop at once.
        status = request.status or Unavailable.status
        self.log.record(request.id, request.route, status, request.error, seconds, request.body_bytes, request.usage)

    def _with_headers(self, scope: Scope, send: Send) -> Send:
        """`send` with the headers that every response carries."""
        request_id = request_id_of(dict(scope["headers"])).encode()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                if self.lifecycle.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        return send_with_headers


async def _call_hooks(scope: Scope) -> None:
    for hook in HOOKS:
        await hook(HTTPConnection(scope))


async def _send(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status, "headers": response.all_headers()})
    await send({"type": "http.response.body", "body": response.body})
