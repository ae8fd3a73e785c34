"""The web application put together: edge, routes and error answers around one predictor."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app import __version__
from app.errors import RequestError
from app.http.middleware import InferenceMiddleware, InFlightRequests
from app.http.oip.handlers import infer_handler, protocol_router
from app.http.predict import service_handlers, service_router
from app.http.request import error_answer
from app.multiprocess.totals import MetricsSource
from app.predictor import Predictor
from app.settings import Settings

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def assemble(settings: Settings, metrics_source: MetricsSource, lifespan: Lifespan) -> "Service":
    """The application that answers from `totals.predictor`."""
    predictor, metrics = metrics_source.predictor, metrics_source.metrics
    in_flight = InFlightRequests()
    handlers = {**service_handlers(predictor), "/v2/models/infer": infer_handler(predictor)}
    app = Service(title="sentiment-inference", version=__version__, lifespan=lifespan)
    app.include_router(service_router(predictor, metrics_source, handlers))
    app.include_router(protocol_router(predictor, metrics_source, handlers["/v2/models/infer"]))
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.predictor, app.in_flight = predictor, in_flight
    app.edge = InferenceMiddleware(super(Service, app).__call__, handlers, settings, metrics, predictor, in_flight)
    return app


class Service(FastAPI):
    """FastAPI behind the edge, which answers inference requests before FastAPI sees them."""

    edge: InferenceMiddleware
    predictor: Predictor
    in_flight: InFlightRequests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        await self.edge(scope, receive, send)


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    answer = error_answer(error)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, answer.status, headers, "application/json")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _on_validation_error(_: Request, __: Exception) -> Response:
    # FastAPI's own answer would echo the input.
    return JSONResponse({"error": "invalid request"}, 422)
