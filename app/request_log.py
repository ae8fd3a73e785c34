"""The name, the one line and the counts of each inference request, whatever it came over. Never sees its content."""

import random
import re

from app.errors import Unavailable
from app.lifecycle import Lifecycle
from app.predictor import Usage
from app.telemetry.logging import Sampler, logger
from app.telemetry.metrics import Metrics

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
REFUSALS_LOGGED_PER_SECOND = 100


def request_id(given: str) -> str:
    """What the client calls its request, if that is short and plain, else a new name."""
    # Not a secret: a pseudo-random number names a request as well, without a system call.
    return given if given and REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class RequestLog:
    """Of one application."""

    def __init__(self, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._lifecycle = lifecycle
        self._metrics = metrics
        # Bound now: the lazy logger would bind anew for every line.
        self._log = logger().bind()
        self._refusals = Sampler("more requests refused", REFUSALS_LOGGED_PER_SECOND)

    def record(
        self, request_id: str, route: str, status: int, error: str | None, seconds: float, body_bytes: int, usage: Usage
    ) -> None:
        """error: the type that `status` comes from. seconds: from its first byte to its answer."""
        self._metrics.answered[route, status].inc()
        self._metrics.durations[route].observe(seconds)
        # A request refused before its body was read says nothing of sizes.
        if body_bytes:
            self._metrics.request_bytes.observe(body_bytes)
        # In overload they are thousands a second, and cost what answers need.
        if status == Unavailable.status and not self._refusals.lets():
            return
        predictor = self._lifecycle.predictor
        manifest = predictor.model.artifact.manifest if predictor is not None else None
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
            model=manifest.name if manifest else None,
            model_version=manifest.version if manifest else None,
        )
