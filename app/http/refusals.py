"""Refusals at the door: what admission would refuse is answered on its connection, at a third of what the way through
the application costs. The rest of a refusal, and all of them under another server, is the middleware's.
"""

import asyncio
import time
from typing import Any

from app.access import ApiKeys
from app.errors import Unauthorized, Unavailable
from app.http.request import request_id_of
from app.http.response import Response, error_response
from app.http.routes import HOOKS, find_inference_route
from app.lifecycle import Lifecycle
from app.request_log import RequestLog
from app.telemetry.metrics import Metrics


class Refusals:
    """Of one application."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics, log: RequestLog, keys: ApiKeys | None = None) -> None:
        self._keys = keys
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._log = log
        # Let in during this turn of the event loop, which reads all that has come before anyone is asked again.
        self._coming = 0

    def at_the_door(self, scope: Any, early: bool) -> Response | None:
        """The answer to an inference request that would be refused now; None for any other request. With hooks, whoever
        may not ask is told so first. early: whether its client was told to come back later."""
        predictor = self._lifecycle.predictor
        if predictor is None or HOOKS or self._lifecycle.draining:
            return None
        refusal = predictor.batcher.admission.refusal(early=early, coming=self._coming)
        found = find_inference_route(scope["path"])
        if found is None or found[0].queued or found[0].method != scope["method"]:
            return None
        if refusal is not None:
            return self._answer(refusal, found[0].label, scope)
        if not self._coming:
            asyncio.get_running_loop().call_soon(self._arrived)
        self._coming += 1
        return None

    def _arrived(self) -> None:
        self._coming = 0

    def _answer(self, refusal: Unavailable, route: str, scope: Any) -> Response | None:
        headers, client = dict(scope["headers"]), None
        if self._keys is not None:
            try:
                client = self._keys.name_of(headers.get(b"authorization", b"").decode("latin-1"))
            except Unauthorized:  # who may not ask is told so first
                return None
        usage = self._log.begin(scope["method"], route, headers, time.monotonic())
        usage.client = client
        request_id = request_id_of(headers)
        self._metrics.rejections[refusal.reason].inc()
        self._log.record(request_id, route, refusal.status, type(refusal).__name__, 0.0, 0, usage)
        response = error_response(refusal)
        response.headers.append((b"x-request-id", request_id.encode()))
        return response
