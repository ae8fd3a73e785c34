"""The service's own HTTP routes: predictions, health, metrics. Decoding and encoding only."""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from msgspec import Struct
from starlette.responses import Response

from app.edge import BodyReader, CancelOnDisconnect, Exchange, json_response
from app.errors import BadRequest, Invalid, UnsupportedMedia
from app.metrics import Metrics
from app.predictor import Prediction, Predictor, Usage

T = TypeVar("T")


class PredictRequest(Struct):
    text: str


class BatchRequest(Struct):
    texts: list[str]


class PredictResponse(Struct, omit_defaults=True):
    """`truncated` is there, and true, when the text was longer than the model's window."""

    label: str
    score: float
    truncated: bool = False


class BatchResponse(Struct):
    predictions: list[PredictResponse]


class ErrorResponse(Struct):
    error: str


class DirectRoute(APIRoute):
    """A documented route whose endpoint takes the request and returns the response itself: FastAPI's parsing would
    read the body without a limit, and echo it in its validation errors."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        return self.endpoint


def documented(request: type[Struct] | None, response: type[Struct] | None, *errors: int) -> dict[str, Any]:
    """Keyword arguments that describe a DirectRoute in the OpenAPI document."""
    answers: dict[int | str, dict[str, Any]] = {}
    if response is not None:
        answers[200] = {"content": {"application/json": {"schema": inline_schema(response)}}}
    for status in errors:
        answers[status] = {
            "description": "Error",
            "content": {"application/json": {"schema": inline_schema(ErrorResponse)}},
        }
    extra = {}
    if request is not None:
        body = {"application/json": {"schema": inline_schema(request)}}
        extra["requestBody"] = {"required": True, "content": body}
    return {"responses": answers, "openapi_extra": extra, "response_model": None}


def inline_schema(kind: type[Struct]) -> dict[str, Any]:
    """JSON schema of a struct, its references replaced by what they name."""
    (schema,), components = msgspec.json.schema_components([kind])

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(components[node["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def decode_json(body: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """Raises BadRequest for what is not JSON, Invalid for JSON of another shape. Neither message quotes the body."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        detail = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8"
        raise BadRequest(f"body: {detail}") from None
    except RecursionError:
        raise BadRequest("body: nested too deeply") from None


def require_json(request: Request) -> None:
    """Raises UnsupportedMedia unless the content type is JSON and the body not compressed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMedia("content-type: expected application/json")
    refuse_compressed(request)


def refuse_compressed(request: Request) -> None:
    """Raises UnsupportedMedia: a small compressed body can become any size in memory."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("content-encoding: expected none")


def timing_headers(request: Request, predictor: Predictor) -> dict[str, str]:
    """`X-Model` and `Server-Timing` of an answered inference request."""
    usage: Usage = request.scope["exchange"].usage
    queue_ms, inference_ms = usage.queue_seconds * 1e3, usage.inference_seconds * 1e3
    manifest = predictor.loaded().artifact.manifest
    return {
        "x-model": f"{manifest.name}/{manifest.version}",
        "server-timing": f"queue;dur={queue_ms:.3f}, inference;dur={inference_ms:.3f}",
    }


def as_response(prediction: Prediction) -> PredictResponse:
    return PredictResponse(prediction.label, prediction.score, prediction.truncated)


def service_router(predictor: Predictor, metrics: Metrics, bodies: BodyReader) -> APIRouter:
    """Routes that answer from `predictor`."""
    router = APIRouter(route_class=DirectRoute)
    one, many = msgspec.json.Decoder(PredictRequest), msgspec.json.Decoder(BatchRequest)
    failures = (400, 408, 413, 415, 422, 429, 500, 503, 504)

    async def classify(request: Request, texts: list[str]) -> list[Prediction]:
        exchange: Exchange = request.scope["exchange"]
        async with CancelOnDisconnect(request):
            return await predictor.classify(texts, exchange.deadline, exchange.usage)

    @router.post("/predict", **documented(PredictRequest, PredictResponse, *failures))
    async def predict(request: Request) -> Response:
        """Classify one text."""
        predictor.require_ready()
        require_json(request)
        body = decode_json(await bodies.read(request), one)
        (prediction,) = await classify(request, [body.text])
        return json_response(as_response(prediction), headers=timing_headers(request, predictor))

    @router.post("/predict/batch", **documented(BatchRequest, BatchResponse, *failures))
    async def predict_batch(request: Request) -> Response:
        """Classify several texts: all of them, in the same order, or one error."""
        predictor.require_ready()
        require_json(request)
        body = decode_json(await bodies.read(request), many)
        if not body.texts:
            raise Invalid("texts: expected at least one")
        predictions = await classify(request, body.texts)
        content = BatchResponse([as_response(prediction) for prediction in predictions])
        return json_response(content, headers=timing_headers(request, predictor))

    @router.get("/live", **documented(None, None, 503))
    async def live(_: Request) -> Response:
        """200 while the process can make progress; 503 when a runner is stuck."""
        stuck = predictor.stuck()
        return json_response({"error": stuck}, 503) if stuck else json_response({"status": "live"})

    @router.get("/ready", **documented(None, None, 503))
    async def ready(_: Request) -> Response:
        """200 once the model has passed every check; 503 with the stage before, and while draining."""
        if predictor.ready:
            return json_response({"status": "ready"})
        return json_response({"error": "not ready", "stage": predictor.stage}, 503, {"retry-after": "1"})

    @router.get("/metrics", response_model=None)
    async def scrape(_: Request) -> Response:
        """Prometheus text."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
