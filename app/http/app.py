"""The web application put together: FastAPI, with the inference middleware innermost and the table's endpoints."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from app import NAME, __version__
from app.access import ApiKeys
from app.errors import ConfigError, RequestError
from app.http.middleware import InferenceMiddleware
from app.http.openapi import document, path_parameters
from app.http.refusals import Refusals
from app.http.response import error_response
from app.http.routes import Route, rows_of
from app.lifecycle import Lifecycle, exit_process, or_exit
from app.request_log import RequestLog
from app.settings import Settings
from app.telemetry.metrics import ClientMetrics, MetricsSource

# FastAPI's own costs each request a look-up, and where it is set up it records what exceptions say.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(
    settings: Settings,
    lifecycle: Lifecycle,
    metrics_source: MetricsSource,
    lifespan: Lifespan,
    rows: Sequence[Route] | None = None,
) -> FastAPI:
    """The application. What `add_middleware` adds to it is around every route, inference included.

    rows: of the table of routes; if None, those that the settings ask for.
    """
    rows = rows_of(settings) if rows is None else rows

    @asynccontextmanager
    async def checked_lifespan(app: FastAPI) -> AsyncIterator[None]:
        refuse_what_would_be_bypassed(app)
        async with lifespan(app):
            yield

    metrics = metrics_source.metrics
    keys, clients = None, None
    if settings.api_keys_file is not None:
        keys = or_exit(ApiKeys, settings.api_keys_file)
        clients = ClientMetrics(metrics.registry, sorted(keys.names))
    log = RequestLog(lifecycle, metrics, clients)
    paths = {route.path for route in rows if route.label}
    inference = Middleware(InferenceMiddleware, settings, lifecycle, metrics, log, paths, keys)
    app = FastAPI(
        title=NAME,
        version=__version__,
        lifespan=checked_lifespan,
        middleware=[inference],
        telemetry=NO_TELEMETRY,
        # FastAPI's pages load from another host. Ours are rows of the table.
        docs_url=None,
        redoc_url=None,
    )
    app.router.redirect_slashes = False
    if settings.cors_origins:
        allow_origins(app, settings.cors_origins)
    app.state.lifecycle, app.state.metrics_source = lifecycle, metrics_source
    app.state.rows = rows
    app.state.request_log, app.state.keys = log, keys
    app.state.refusals = Refusals(lifecycle, metrics, log, keys)
    for route in rows:
        if route.label:
            continue
        statuses = (404, 503) if "{" in route.path else (503,)
        app.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            summary=(route.handler.__doc__ or "").partition("\n")[0],
            responses={status: {"description": "Error"} for status in statuses},
            include_in_schema=route.in_document,
            response_model=None,
            operation_id=f"{route.method} {route.path}",
            openapi_extra={"parameters": path_parameters(route.path)},
        )
    app.openapi = partial(document, app)  # type: ignore[method-assign]
    app.add_exception_handler(RequestError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


def allow_origins(app: FastAPI, origins: str) -> None:
    """Lets pages of these origins (with commas; `*`: all) ask, and read the answers' headers. Not with cookies."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[origin.strip() for origin in origins.split(",")],
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["location", "retry-after", "server-timing", "x-model", "x-request-id"],
        max_age=3600,
    )


def refuse_what_would_be_bypassed(app: FastAPI) -> None:
    """Ends the process if the application has dependencies: inference routes would answer without them."""
    instead = "use app.add_middleware, or HOOKS in app/http/routes.py"
    if app.router.dependencies:
        exit_process(ConfigError(f"FastAPI(dependencies=…) does not hold for inference routes: {instead}"))


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError | HTTPException)
    response = error_response(error)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
    return Response(response.body, response.status, headers, "application/json")


async def _on_validation_error(_: Request, __: Exception) -> Response:
    # FastAPI's own answer would echo the input.
    return JSONResponse({"error": "invalid request"}, 422)


async def _on_bug(_: Request, __: Exception) -> Response:
    return JSONResponse({"error": "internal error"}, 500)
