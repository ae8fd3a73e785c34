"""Open Inference Protocol v2 over HTTP: health, metadata, configuration, statistics, inference.

Field names follow the protocol and Triton's extensions of it, which the public `tritonclient` expects.
"""

from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from app import NAME, __version__
from app.artifact.manifest import TensorSpec
from app.errors import BadRequest
from app.http.oip.codec import InferRequest, decode_tensors, encode_response, split_body
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response as InferenceResponse
from app.lifecycle import Lifecycle
from app.runtime.session import Model
from app.telemetry.metrics import Statistics

EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
DECODER = msgspec.json.Decoder(InferRequest)


async def infer(request: InferenceRequest) -> InferenceResponse:
    """Inference: JSON, or JSON followed by binary tensors."""
    predictor, path = request.predictor, request.path_params
    model = predictor.named(path["model_name"], path.get("model_version"))
    head, binary = split_body(await request.body(), request.header(b"inference-header-content-length"))
    content = decode_json(head, DECODER)
    tensors = decode_tensors(content, binary)
    _shorten_deadline(request, content.parameters.get("timeout"))
    outputs = await request.unless_client_leaves(predictor.infer(tensors, request.deadline, request.usage))
    manifest = model.artifact.manifest
    body, header_length = encode_response(content, manifest.name, manifest.version, outputs)
    headers = request.model_headers()
    if header_length is None:
        return InferenceResponse(200, body, headers)
    headers.append((b"inference-header-content-length", b"%d" % header_length))
    return InferenceResponse(200, body, headers, b"application/octet-stream")


def _shorten_deadline(request: InferenceRequest, timeout_us: Any) -> None:
    if timeout_us is None:
        return
    if type(timeout_us) is not int or timeout_us < 0:
        raise BadRequest("parameters: timeout: expected microseconds")
    if 0 < timeout_us < (request.deadline - request.started) * 1e6:
        request.deadline = request.started + timeout_us / 1e6


async def server(request: Request) -> Response:
    """Server metadata."""
    return JSONResponse({"name": NAME, "version": __version__, "extensions": EXTENSIONS})


async def live(request: Request) -> Response:
    """As /live."""
    stuck = _lifecycle(request).stuck()
    return JSONResponse({"error": stuck}, 503) if stuck else JSONResponse({"live": True})


async def ready(request: Request) -> Response:
    """As /ready."""
    _require_ready(request)
    return JSONResponse({"ready": True})


async def metadata(request: Request) -> Response:
    """Model metadata: inputs and outputs."""
    model = _model(request)
    manifest, task = model.artifact.manifest, model.task
    content = {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": "onnxruntime_onnx",
        "inputs": task.inputs,
        "outputs": task.outputs,
    }
    return Response(msgspec.json.encode(content), media_type="application/json")


async def model_ready(request: Request) -> Response:
    """Whether this model may answer."""
    name = _model(request).artifact.manifest.name
    _require_ready(request)
    return JSONResponse({"name": name, "ready": True})


async def config(request: Request) -> Response:
    """Model configuration."""
    return JSONResponse(configuration(_model(request), _lifecycle(request).loaded().batcher.limits.queue_rows))


async def statistics(request: Request) -> Response:
    """Statistics since start."""
    model, totals = _model(request), await request.app.state.metrics_source.statistics()
    return JSONResponse({"model_stats": [statistics_of(model, totals)]})


def configuration(model: Model, queue_rows: int) -> dict[str, Any]:
    """The model's configuration as Triton's model configuration extension words it."""
    manifest, task = model.artifact.manifest, model.task

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        kind = "STRING" if spec.datatype == "BYTES" else spec.datatype
        # With a batch size Triton's `dims` leave the first axis out.
        return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.shape[1:] if task.batched else spec.shape}

    return {
        "name": manifest.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": queue_rows if task.batched else 0,
        "input": [tensor(spec) for spec in task.inputs],
        "output": [tensor(spec) for spec in task.outputs],
        "instance_group": [{"kind": "KIND_GPU" if model.provider == "cuda" else "KIND_CPU", "count": model.runners}],
        "dynamic_batching": {"preferred_batch_size": [model.batch_rows]},
    }


def statistics_of(model: Model, totals: Statistics) -> dict[str, Any]:
    """Totals since start as Triton's statistics extension words them; times in nanoseconds."""
    manifest = model.artifact.manifest

    def entry(count: int, seconds: float) -> dict[str, int]:
        return {"count": count, "ns": int(seconds * 1e9)}

    return {
        "name": manifest.name,
        "version": manifest.version,
        "last_inference": int(totals.last_unix_seconds * 1000),
        "inference_count": totals.rows,
        "execution_count": totals.runs,
        "inference_stats": {
            "success": entry(totals.succeeded, totals.succeeded_seconds),
            "fail": entry(totals.failed, totals.failed_seconds),
            "queue": entry(totals.succeeded, totals.queue_seconds),
            "compute_infer": entry(totals.succeeded, totals.inference_seconds),
        },
        "batch_stats": [],
    }


def _lifecycle(request: Request) -> Lifecycle:
    lifecycle: Lifecycle = request.app.state.lifecycle
    return lifecycle


def _require_ready(request: Request) -> None:
    if not _lifecycle(request).ready:
        raise _lifecycle(request).unavailable()


def _model(request: Request) -> Model:
    """The model that the path names, or the one there is. Raises Unavailable before it is loaded, NotFound."""
    predictor, path = _lifecycle(request).loaded(), request.path_params
    if "model_name" not in path:
        return predictor.model
    return predictor.named(path["model_name"], path.get("model_version"))
