"""Every route: one row each. Dispatch, OpenAPI, the labels of metrics, 404 and 405 all come from this table."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from msgspec import Struct
from starlette.requests import HTTPConnection

from app.http import health, predict
from app.http.oip import answer, codec, handlers

# Called before each request but those of rows that are `exempt`. Raises a RequestError (Unauthorized, Forbidden) or
# FastAPI's HTTPException to refuse it. README says how.
Hook = Callable[[HTTPConnection], Awaitable[None]]
HOOKS: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """A row with a `label` is an inference route: its handler takes an InferenceRequest, is admitted, timed, counted
    under that label and logged. Any other is an ordinary FastAPI endpoint.

    request, response: for the OpenAPI document. exempt: from `HOOKS`.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    request: type[Struct] | None = None
    response: type[Struct] | None = None
    label: str = ""
    exempt: bool = False
    in_document: bool = True


REPOSITORY = "/v2/repository"
MODEL, VERSION = "/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"
ROUTES = (
    Route("POST", "/predict", predict.predict, predict.PredictRequest, predict.PredictResponse, "/predict"),
    Route("POST", "/predict/batch", predict.predict_batch, predict.BatchRequest, predict.BatchResponse,
          "/predict/batch"),
    Route("GET", "/live", health.live, exempt=True),
    Route("GET", "/ready", health.ready, exempt=True),
    Route("GET", "/metrics", health.metrics, exempt=True),
    Route("GET", "/v2", handlers.server),
    Route("GET", "/v2/health/live", handlers.live, exempt=True),
    Route("GET", "/v2/health/ready", handlers.ready, exempt=True),
    # Before the routes with a name in them, which it would match as well.
    Route("GET", "/v2/models/stats", handlers.statistics),
    Route("POST", REPOSITORY + "/index", handlers.repository_index),
    Route("POST", REPOSITORY + "/models/{model_name}/load", handlers.repository_change, in_document=False),
    Route("POST", REPOSITORY + "/models/{model_name}/unload", handlers.repository_change, in_document=False),
    Route("GET", MODEL, handlers.metadata),
    Route("GET", MODEL + "/ready", handlers.model_ready),
    Route("GET", MODEL + "/config", handlers.config),
    Route("GET", MODEL + "/stats", handlers.statistics),
    Route("POST", MODEL + "/infer", handlers.infer, codec.InferRequest, answer.InferResponse, "/v2/models/infer"),
    Route("GET", VERSION, handlers.metadata, in_document=False),
    Route("GET", VERSION + "/ready", handlers.model_ready, in_document=False),
    Route("GET", VERSION + "/config", handlers.config, in_document=False),
    Route("GET", VERSION + "/stats", handlers.statistics, in_document=False),
    Route("POST", VERSION + "/infer", handlers.infer, codec.InferRequest, answer.InferResponse, "/v2/models/infer",
          in_document=False),
)  # fmt: skip
INFERENCE_ROUTES = tuple(route for route in ROUTES if route.label)
ENDPOINTS = tuple(route for route in ROUTES if not route.label)
LABELS = tuple(dict.fromkeys(route.label for route in INFERENCE_ROUTES))
EXEMPT_PATHS = frozenset(route.path for route in ROUTES if route.exempt)

_PLAIN = {route.path: route for route in INFERENCE_ROUTES if "{" not in route.path}
_PATTERNS = [
    (re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", route.path)), route)
    for route in INFERENCE_ROUTES
    if "{" in route.path
]


def find_inference_route(path: str) -> tuple[Route, dict[str, str]] | None:
    """The inference route of a path, and the parts of the path that vary; None if it has none."""
    if (route := _PLAIN.get(path)) is not None:
        return route, {}
    for pattern, route in _PATTERNS:
        if (match := pattern.fullmatch(path)) is not None:
            return route, match.groupdict()
    return None
