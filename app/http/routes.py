"""Every route: one row each, or one for each task. Dispatch, OpenAPI, metric labels, 404 and 405 all come from here."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import HTTPConnection

from app.errors import NotFound
from app.http import embeddings, health, image, jobs, predict, rerank
from app.http.oip import answer, codec, handlers
from app.http.page import files, state
from app.http.predict import BatchRequest, BatchResponse, PredictRequest
from app.http.request import InferenceRequest
from app.runtime.tasks.answers import Entities, Label, Labels, Value
from app.settings import Settings

# Called before each request but those of rows that are `exempt`. Raises a RequestError (Unauthorized, Forbidden) or
# FastAPI's HTTPException to refuse it. README says how.
Hook = Callable[[HTTPConnection], Awaitable[None]]
HOOKS: tuple[Hook, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """A row with a `label` is an inference route: its handler takes an InferenceRequest, is admitted, timed, counted
    under that label and logged. Any other is an ordinary FastAPI endpoint.

    request, response: for the OpenAPI document; a dict has a response for each `problem_type`. media: content types of
    requests that are no JSON. tasks: those that the row serves; none: all. exempt: from `HOOKS` and keys. queued: it
    takes a queue of jobs, and no model. admin: on `APP_ADMIN_PORT` alone, where there is one.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    request: Any = None
    response: Any = None
    label: str = ""
    tasks: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    exempt: bool = False
    in_document: bool = True
    queued: bool = False
    admin: bool = False


CLASSIFIED = {"single_label": Label, "multi_label": Labels}
CLASSIFIED_BATCH = {"single_label": BatchResponse[Label], "multi_label": BatchResponse[Labels]}
REPOSITORY = "/v2/repository"
MODEL, VERSION = "/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"
# Addresses in these files are relative, so that they hold under a sub-path as well. APP_PAGE=false leaves PAGE out.
PAGE = (
    Route("GET", "/", files.file("index.html"), in_document=False, admin=True),
    Route("GET", "/state", state.state, in_document=False, admin=True),
    *(Route("GET", f"/page/{name}", files.file(name), in_document=False, admin=True) for name in files.PAGE),
)
DOCS = (
    Route("GET", "/docs", files.file("docs.html"), in_document=False, admin=True),
    *(
        Route("GET", f"/docs/{name}", files.file(name), in_document=False, admin=True)
        for name in (*files.DOCS, *files.SWAGGER)
    ),
)
ROUTES = (
    Route("POST", "/predict", predict.predict, PredictRequest, CLASSIFIED, "/predict", ("text-classification",)),
    Route("POST", "/predict", predict.predict, PredictRequest, Value, "/predict", ("text-regression",)),
    Route("POST", "/predict", predict.predict, PredictRequest, Entities, "/predict", ("token-classification",)),
    Route("POST", "/predict", image.predict, None, CLASSIFIED, "/predict", ("image-classification",),
          image.IMAGE_TYPES),
    Route("POST", "/predict/batch", predict.predict_batch, BatchRequest, CLASSIFIED_BATCH, "/predict/batch",
          ("text-classification",)),
    Route("POST", "/predict/batch", predict.predict_batch, BatchRequest, BatchResponse[Value], "/predict/batch",
          ("text-regression",)),
    Route("POST", "/predict/batch", predict.predict_batch, BatchRequest, BatchResponse[Entities], "/predict/batch",
          ("token-classification",)),
    Route("POST", "/embed", embeddings.embed, embeddings.EmbedRequest, list[list[float]], "/embed",
          ("text-embedding",)),
    Route("POST", "/v1/embeddings", embeddings.embeddings, embeddings.EmbeddingsRequest,
          embeddings.EmbeddingsResponse, "/v1/embeddings", ("text-embedding",)),
    Route("POST", "/rerank", rerank.rerank, rerank.RerankRequest, list[rerank.Rank], "/rerank", ("text-pair",)),
    Route("POST", "/jobs", jobs.submit, BatchRequest, jobs.Accepted, "/jobs", queued=True),
    Route("GET", "/jobs/{job_id}", jobs.status, response=jobs.JobAnswer, queued=True),
    Route("GET", "/live", health.live, exempt=True),
    Route("GET", "/ready", health.ready, exempt=True),
    Route("GET", "/metrics", health.metrics, exempt=True, admin=True),
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
    *PAGE,
    *DOCS,
)  # fmt: skip
INFERENCE_ROUTES = tuple(route for route in ROUTES if route.label)
ENDPOINTS = tuple(route for route in ROUTES if not route.label)
LABELS = tuple(dict.fromkeys(route.label for route in INFERENCE_ROUTES))
# Probes and metrics: all that a worker serves.
OPERATIONAL = tuple(route for route in ROUTES if route.exempt)
EXEMPT_PATHS = frozenset(route.path for route in ROUTES if route.exempt)
# For people and Prometheus: without a key, and on APP_ADMIN_PORT alone where there is one. FastAPI makes the last one.
ADMIN_PATHS = frozenset(route.path for route in ROUTES if route.admin) | {"/openapi.json"}


def rows_of(settings: Settings) -> tuple[Route, ...]:
    """Those that a server with these settings serves."""
    if settings.role == "gateway":
        return tuple(route for route in ROUTES if route.queued or route.exempt or route in DOCS)
    rows = ROUTES if settings.page else tuple(route for route in ROUTES if route not in PAGE)
    return tuple(route for route in rows if settings.takes_jobs or not route.queued)


def _dispatched(path: str) -> Route:
    """One row for those of one path: its handler is the one for the model's task."""
    rows = [route for route in INFERENCE_ROUTES if route.path == path]
    handlers = {task: route.handler for route in rows for task in route.tasks}
    if not handlers:
        return rows[0]

    def handler(request: InferenceRequest) -> Awaitable[Any]:
        manifest = request.predictor.model.artifact.manifest
        found = handlers.get(manifest.task)
        if found is None:
            instead = ", ".join(paths_of(manifest.task, manifest.name))
            raise NotFound(f"this model's task is {manifest.task}: use {instead}")
        return found(request)

    return replace(rows[0], handler=handler)


def serves(route: Route, task: str) -> bool:
    """Whether a row answers for models of this task."""
    return not route.tasks or task in route.tasks


def paths_of(task: str, name: str) -> list[str]:
    """The inference routes that answer for a model of this task and name."""
    rows = [route for route in INFERENCE_ROUTES if route.in_document and serves(route, task) and not route.queued]
    return [f"{row.method} {row.path.format(model_name=name)}" for row in rows]


_BY_PATH = [_dispatched(path) for path in dict.fromkeys(route.path for route in INFERENCE_ROUTES)]
_PLAIN = {route.path: route for route in _BY_PATH if "{" not in route.path}
_PATTERNS = [
    (re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", route.path)), route) for route in _BY_PATH if "{" in route.path
]


def find_inference_route(path: str) -> tuple[Route, dict[str, str]] | None:
    """The inference route of a path, and the parts of the path that vary; None if it has none."""
    if (route := _PLAIN.get(path)) is not None:
        return route, {}
    for pattern, route in _PATTERNS:
        if (match := pattern.fullmatch(path)) is not None:
            return route, match.groupdict()
    return None
