"""Open Inference Protocol v2 over HTTP: health, metadata, configuration, statistics, inference.

Field names follow the protocol and Triton's extensions of it, which the public `tritonclient` expects.
"""

from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from app import __version__
from app.artifact.datatypes import DTYPES, Tensors
from app.artifact.manifest import TensorSpec
from app.errors import BadRequest, Invalid
from app.http.middleware import Handler
from app.http.oip.codec import InferRequest, decode_strings, decode_tensors, encode_response, split_body
from app.http.predict import decode_json, describe, path_parameters, refuse_compressed, timing_headers
from app.http.request import Answer, InferenceRequest
from app.multiprocess.totals import MetricsSource
from app.predictor import Predictor, Statistics
from app.runtime.model import Model
from app.runtime.tasks.task import TextTask

SERVER_NAME = "sentiment-inference"
JSON = "application/json"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]


def interface(model: Model) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs as clients see them: text classification takes text, not token ids."""
    manifest = model.artifact.manifest
    if not isinstance(model.task, TextTask):
        return manifest.inputs, manifest.outputs
    outputs = [
        TensorSpec("label", "BYTES", [-1]),
        TensorSpec("score", "FP32", [-1]),
        TensorSpec("probabilities", "FP32", [-1, len(manifest.labels)]),
    ]
    return [TensorSpec("text", "BYTES", [-1])], outputs


def configuration(model: Model, queue_rows: int, runners: int) -> dict[str, Any]:
    """The model's configuration as Triton's model configuration extension words it."""
    manifest = model.artifact.manifest
    inputs, outputs = interface(model)
    # With a batch size Triton's `dims` leave the first axis out. Text keeps it: its rows are the only axis.
    batched = manifest.batching and not isinstance(model.task, TextTask)

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.shape[1:] if batched else spec.shape}

    return {
        "name": manifest.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": queue_rows if batched else 0,
        "input": [tensor(spec) for spec in inputs],
        "output": [tensor(spec) for spec in outputs],
        "instance_group": [{"kind": "KIND_GPU" if model.session.provider == "cuda" else "KIND_CPU", "count": runners}],
        "dynamic_batching": {"preferred_batch_size": [model.batch_rows]},
    }


def statistics_of(metrics_source: Statistics, model: Model) -> dict[str, Any]:
    """Totals since start as Triton's statistics extension words them; times in nanoseconds."""
    manifest = model.artifact.manifest

    def entry(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": manifest.name,
        "version": manifest.version,
        "last_inference": int(metrics_source.last_unix_seconds * 1000),
        "inference_count": metrics_source.rows,
        "execution_count": metrics_source.runs,
        "inference_stats": {
            "success": entry(metrics_source.succeeded, metrics_source.succeeded_seconds),
            "fail": entry(metrics_source.failed, metrics_source.failed_seconds),
            "queue": entry(metrics_source.succeeded, metrics_source.queue_seconds),
            "compute_infer": entry(metrics_source.succeeded, metrics_source.inference_seconds),
        },
        "batch_stats": [],
    }


async def infer_text(predictor: Predictor, tensors: Tensors, request: InferenceRequest) -> Tensors:
    """Input `text` BYTES [rows] → `label` BYTES [rows], `score` FP32 [rows], `probabilities` FP32 [rows, labels]."""
    text = tensors.get("text")
    if text is None or len(tensors) != 1:
        raise Invalid("inputs: expected one, named text")
    if text.ndim != 1 or text.dtype != np.object_ or not text.size:
        raise Invalid(f"inputs[0]: expected BYTES [rows] with at least one row, found {text.dtype} {list(text.shape)}")
    rows = decode_strings(text, "inputs[0]").tolist()
    predictions = await predictor.classify(rows, request.deadline, request.usage)
    return {
        "label": np.array([prediction.label for prediction in predictions], np.object_),
        "score": np.array([prediction.score for prediction in predictions], np.float32),
        "probabilities": np.stack([prediction.probabilities for prediction in predictions]),
    }


async def infer_tensors(predictor: Predictor, model: Model, tensors: Tensors, request: InferenceRequest) -> Tensors:
    """The model's own inputs and outputs. Raises Invalid if an input is not as the manifest says."""
    for spec in model.artifact.manifest.inputs:
        array = tensors.get(spec.name)
        if array is None:
            raise Invalid(f"inputs: expected {[spec.name for spec in model.artifact.manifest.inputs]}")
        if array.dtype != DTYPES[spec.datatype]:
            raise Invalid(f"input {spec.name!r}: datatype: expected {spec.datatype}")
        if spec.datatype == "BYTES":
            tensors[spec.name] = decode_strings(array, f"input {spec.name!r}")
    return await predictor.infer(tensors, request.deadline, request.usage)


def infer_handler(predictor: Predictor) -> Handler:
    """Handler of …/infer."""
    decoder = msgspec.json.Decoder(InferRequest)

    async def infer(request: InferenceRequest) -> Answer:
        """Inference: JSON, or JSON followed by binary tensors."""
        parameters = request.path_params
        model = predictor.named(parameters["model_name"] or "", parameters["model_version"])
        refuse_compressed(request)
        body = await request.body()
        head, binary = split_body(body, request.header(b"inference-header-content-length"))
        content = decode_json(head, decoder)
        tensors = decode_tensors(content, binary)
        timeout_us = content.parameters.get("timeout")
        if timeout_us is not None:
            if type(timeout_us) is not int or timeout_us < 0:
                raise BadRequest("parameters: timeout: expected microseconds")
            if 0 < timeout_us < (request.deadline - request.started) * 1e6:
                request.deadline = request.started + timeout_us / 1e6
        if isinstance(model.task, TextTask):
            outputs = await request.unless_gone(infer_text(predictor, tensors, request))
        else:
            outputs = await request.unless_gone(infer_tensors(predictor, model, tensors, request))
        manifest = model.artifact.manifest
        answer, header_length = encode_response(content, manifest.name, manifest.version, outputs)
        headers = timing_headers(request, predictor)
        if header_length is None:
            return Answer(200, answer, headers)
        headers.append((b"inference-header-content-length", b"%d" % header_length))
        return Answer(200, answer, headers, b"application/octet-stream")

    return infer


def protocol_router(predictor: Predictor, metrics_source: MetricsSource, infer: Handler) -> APIRouter:
    """Routes under /v2 that answer from `predictor`, and the documentation of `infer`."""
    router = APIRouter(prefix="/v2")
    unavailable: dict[int | str, dict[str, Any]] = {503: {"description": "Not now; the body says why"}}

    @router.get("")
    async def server() -> JSONResponse:
        """Server metadata."""
        return JSONResponse({"name": SERVER_NAME, "version": __version__, "extensions": EXTENSIONS})

    @router.get("/health/live", responses=unavailable)
    async def live() -> JSONResponse:
        """As /live."""
        stuck = predictor.stuck()
        return JSONResponse({"error": stuck}, 503) if stuck else JSONResponse({"live": True})

    @router.get("/health/ready", responses=unavailable)
    async def ready() -> JSONResponse:
        """As /ready."""
        predictor.require_ready()
        return JSONResponse({"ready": True})

    def model_of(request: Request) -> Model:
        return predictor.named(request.path_params["model_name"], request.path_params.get("model_version"))

    async def metadata(request: Request) -> Response:
        """Model metadata: inputs and outputs."""
        model = model_of(request)
        manifest = model.artifact.manifest
        inputs, outputs = interface(model)
        content = {"name": manifest.name, "versions": [manifest.version], "platform": "onnxruntime_onnx"}
        return Response(msgspec.json.encode({**content, "inputs": inputs, "outputs": outputs}), media_type=JSON)

    async def model_ready(request: Request) -> JSONResponse:
        """Whether this model may answer."""
        name = model_of(request).artifact.manifest.name
        predictor.require_ready()
        return JSONResponse({"name": name, "ready": True})

    async def config(request: Request) -> JSONResponse:
        """Model configuration."""
        model, limits = model_of(request), predictor.limits
        assert limits is not None
        return JSONResponse(configuration(model, limits.queue_rows, limits.runners))

    async def stats(request: Request) -> JSONResponse:
        """Statistics since start."""
        return JSONResponse({"model_stats": [statistics_of(await metrics_source.statistics(), model_of(request))]})

    # Before the routes with a name in them, which it would match as well.
    @router.get("/models/stats", responses=unavailable)
    async def all_stats() -> JSONResponse:
        """Statistics of every model, that is, of the one there is."""
        return JSONResponse({"model_stats": [statistics_of(await metrics_source.statistics(), predictor.loaded())]})

    failures: dict[int | str, dict[str, Any]] = {404: {"description": "Unknown model or version"}, **unavailable}
    for path in ("/models/{model_name}", "/models/{model_name}/versions/{model_version}"):
        shown = "version" not in path
        for suffix, endpoint in (("", metadata), ("/ready", model_ready), ("/config", config), ("/stats", stats)):
            router.add_api_route(
                path + suffix,
                endpoint,
                responses=failures,
                include_in_schema=shown,
                response_model=None,
                openapi_extra=path_parameters(path),
            )
        describe(router, path + "/infer", infer, InferRequest, None, include_in_schema=shown)
    return router
