"""The name, the one line, the counts and the span of each inference request, whatever it came over. Never sees its
content.
"""

import random
import re
from collections.abc import Mapping

from app.errors import Unavailable
from app.lifecycle import Lifecycle
from app.predictor import Usage
from app.telemetry.logging import Sampler, logger
from app.telemetry.metrics import ClientMetrics, Metrics
from app.telemetry.tracing import Trace

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
REFUSALS_LOGGED_PER_SECOND = 100
TRACE_CONTEXT = (b"traceparent", b"tracestate")


def request_id(given: str) -> str:
    """What the client calls its request, if that is short and plain, else a new name."""
    # Not a secret: a pseudo-random number names a request as well, without a system call.
    return given if given and REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class RequestLog:
    """Of one application."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, clients: ClientMetrics | None = None) -> None:
        self._clients = clients
        self._lifecycle = lifecycle
        self._metrics = metrics
        # Bound now: the lazy logger would bind anew for every line.
        self._log = logger().bind()
        self._refusals = Sampler("more requests refused", REFUSALS_LOGGED_PER_SECOND)

    def begin(self, method: str, route: str, headers: Mapping[bytes, bytes], started: float) -> Usage:
        """What a request will have cost; where traces go, with its span in the trace that its headers name."""
        tracing = self._lifecycle.tracing
        if tracing is None:
            return Usage()
        carrier = {name.decode(): headers[name].decode("latin-1") for name in TRACE_CONTEXT if name in headers}
        trace = tracing.begin(f"{method} {route}", carrier, started)
        if trace.recorded:
            trace.span.set_attributes({"http.request.method": method, "http.route": route})
        return Usage(trace)

    def record(
        self, request_id: str, route: str, status: int, error: str | None, seconds: float, body_bytes: int, usage: Usage
    ) -> None:
        """error: the type that `status` comes from. seconds: from its first byte to its answer."""
        trace = usage.trace
        if self._clients is not None and usage.client is not None:
            self._clients.answered[usage.client, status].inc()
        self._metrics.answered[route, status].inc()
        self._metrics.durations[route].observe(seconds, trace.exemplar if trace is not None else None)
        # A request refused before its body was read says nothing of sizes.
        if body_bytes:
            self._metrics.request_bytes.observe(body_bytes)
        if trace is not None:
            self._end(trace, request_id, status, error, body_bytes, usage)
        # In overload they are thousands a second, and cost what answers need.
        if status == Unavailable.status and not self._refusals.lets():
            return
        name, version = self._model()
        self._log.info(
            "request",
            request_id=request_id,
            route=route,
            status=status,
            error=error,
            duration_ms=round(seconds * 1000, 3),
            body_bytes=body_bytes,
            rows=usage.rows,
            tokens=usage.tokens,
            queue_ms=round(usage.queue_seconds * 1000, 3),
            inference_ms=round(usage.inference_seconds * 1000, 3),
            model=name,
            model_version=version,
            **({"client": usage.client} if usage.client is not None else {}),
            **usage.trace_ids,
        )

    def _model(self) -> tuple[str | None, str | None]:
        predictor = self._lifecycle.predictor
        if predictor is None:
            return None, None
        manifest = predictor.model.artifact.manifest
        return manifest.name, manifest.version

    def _end(
        self, trace: Trace, request_id: str, status: int, error: str | None, body_bytes: int, usage: Usage
    ) -> None:
        if not trace.recorded:
            return
        name, version = self._model()
        attributes: dict[str, str | int] = {
            "http.response.status_code": status,
            "http.request.body.size": body_bytes,
            "request.id": request_id,
            "rows": usage.rows,
            "tokens": usage.tokens,
        }
        if name is not None and version is not None:
            attributes |= {"model.name": name, "model.version": version}
        if error is not None:
            attributes["error.type"] = error
        # What the client did wrong is no error of this service.
        trace.end(attributes, usage.parts, error if status >= 500 else None)
