"""The service's own HTTP routes: predictions, health, metrics. Decoding and encoding only."""

import re
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from msgspec import Struct
from starlette.responses import Response

from app.errors import STATUSES, BadRequest, Invalid, UnsupportedMedia
from app.http.middleware import Handler
from app.http.request import Answer, InferenceRequest, json_answer
from app.multiprocess.totals import MetricsSource
from app.predictor import Prediction, Predictor

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


async def answered_at_the_edge(_: Request) -> Response:
    """Stands for an inference route in FastAPI, for its OpenAPI document and its 405. Requests come this far only on a
    path that is almost the route's (a line break behind it)."""
    raise HTTPException(404)


def path_parameters(path: str) -> dict[str, Any]:
    """What OpenAPI wants said of the parts of a path that vary."""
    names = re.findall(r"{(\w+)}", path)
    return {
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    }


def describe(
    router: APIRouter, path: str, handler: Handler, request: type[Struct], response: type[Struct] | None, **more: Any
) -> None:
    """Documents an inference route that the edge answers; its words are the handler's docstring."""
    error = {"description": "Error", "content": {"application/json": {"schema": inline_schema(ErrorResponse)}}}
    answers: dict[int | str, dict[str, Any]] = {status: error for status in STATUSES if status not in (200, 499)}
    if response is not None:
        answers[200] = {"content": {"application/json": {"schema": inline_schema(response)}}}
    body = {"required": True, "content": {"application/json": {"schema": inline_schema(request)}}}
    router.add_api_route(
        path,
        answered_at_the_edge,
        methods=["POST"],
        summary=(handler.__doc__ or "").splitlines()[0],
        description=handler.__doc__,
        responses=answers,
        openapi_extra={"requestBody": body, **path_parameters(router.prefix + path)},
        response_model=None,
        operation_id=path,
        **more,
    )


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


def require_json(request: InferenceRequest) -> None:
    """Raises UnsupportedMedia unless the content type is JSON and the body not compressed."""
    kind = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMedia("content-type: expected application/json")
    refuse_compressed(request)


def refuse_compressed(request: InferenceRequest) -> None:
    """Raises UnsupportedMedia: a small compressed body can become any size in memory."""
    if (request.header(b"content-encoding") or "identity").lower() != "identity":
        raise UnsupportedMedia("content-encoding: expected none")


def timing_headers(request: InferenceRequest, predictor: Predictor) -> list[tuple[bytes, bytes]]:
    """`X-Model` and `Server-Timing` of an answered inference request."""
    usage, manifest = request.usage, predictor.loaded().artifact.manifest
    timing = b"queue;dur=%.3f, inference;dur=%.3f" % (usage.queue_seconds * 1e3, usage.inference_seconds * 1e3)
    return [(b"x-model", f"{manifest.name}/{manifest.version}".encode()), (b"server-timing", timing)]


def as_response(prediction: Prediction) -> PredictResponse:
    return PredictResponse(prediction.label, prediction.score, prediction.truncated)


def service_handlers(predictor: Predictor) -> dict[str, Handler]:
    """Handlers of /predict and /predict/batch, by route label."""
    one, many = msgspec.json.Decoder(PredictRequest), msgspec.json.Decoder(BatchRequest)

    async def classify(request: InferenceRequest, texts: list[str]) -> list[Prediction]:
        return await request.unless_gone(predictor.classify(texts, request.deadline, request.usage))

    async def predict(request: InferenceRequest) -> Answer:
        """Classify one text."""
        require_json(request)
        body = decode_json(await request.body(), one)
        (prediction,) = await classify(request, [body.text])
        return json_answer(as_response(prediction), timing_headers(request, predictor))

    async def predict_batch(request: InferenceRequest) -> Answer:
        """Classify several texts: all of them, in the same order, or one error."""
        require_json(request)
        body = decode_json(await request.body(), many)
        if not body.texts:
            raise Invalid("texts: expected at least one")
        predictions = await classify(request, body.texts)
        content = BatchResponse([as_response(prediction) for prediction in predictions])
        return json_answer(content, timing_headers(request, predictor))

    return {"/predict": predict, "/predict/batch": predict_batch}


def service_router(predictor: Predictor, metrics_source: MetricsSource, handlers: dict[str, Handler]) -> APIRouter:
    """Health and metrics, and the documentation of `handlers`."""
    router = APIRouter()
    describe(router, "/predict", handlers["/predict"], PredictRequest, PredictResponse)
    describe(router, "/predict/batch", handlers["/predict/batch"], BatchRequest, BatchResponse)
    unavailable: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the body says why"}}

    @router.get("/live", responses=unavailable)
    async def live() -> JSONResponse:
        """200 while the process can make progress; 503 when a runner is stuck."""
        stuck = predictor.stuck()
        return JSONResponse({"error": stuck}, 503) if stuck else JSONResponse({"status": "live"})

    @router.get("/ready", responses=unavailable)
    async def ready() -> JSONResponse:
        """200 once the model has passed every check; 503 with the stage before, and while draining."""
        if predictor.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"error": "not ready", "stage": predictor.stage}, 503, {"retry-after": "1"})

    @router.get("/metrics")
    async def scrape() -> Response:
        """Prometheus text."""
        return Response(await metrics_source.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
