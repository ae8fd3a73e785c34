"""Open Inference Protocol v2 over HTTP: health, metadata, configuration, statistics, repository index, inference.

Field names follow the protocol and Triton's extensions of it, which the public `tritonclient` expects.
"""

import asyncio
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse, Response

from app import NAME, __version__
from app.artifact.datatypes import Tensors
from app.artifact.manifest import TensorSpec
from app.errors import BadRequest, BodyTimeout, BodyTooLarge
from app.http.oip.answer import encode_response
from app.http.oip.codec import InferRequest, decode_tensors, split_body
from app.http.request import InferenceRequest, decode_json
from app.http.response import Response as InferenceResponse
from app.lifecycle import Lifecycle
from app.oip.outputs import classified
from app.predictor import aside
from app.runtime.session import Model
from app.telemetry.metrics import Statistics

EXTENSIONS = ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"]
DECODER = msgspec.json.Decoder(InferRequest)
# Beyond that, reading a body or making an answer may take longer than a thread does to start.
QUICK_BYTES = 32768
MAX_INDEX_BYTES, INDEX_SECONDS = 4096, 5


class IndexRequest(msgspec.Struct):
    """ready: only models that are."""

    ready: bool = False


INDEX_DECODER = msgspec.json.Decoder(IndexRequest)


async def infer(request: InferenceRequest) -> InferenceResponse:
    """Inference: JSON, or JSON followed by binary tensors."""
    predictor, path = request.predictor, request.path_params
    model = predictor.named(path["model_name"], path.get("model_version"))
    body, header = await request.body(), request.header(b"inference-header-content-length")
    content, tensors = await aside(len(body) > QUICK_BYTES, _decode, body, header)
    if 0 < content.parameters.timeout < (request.deadline - request.started) * 1e6:
        request.deadline = request.started + content.parameters.timeout / 1e6
    outputs = await request.unless_client_leaves(predictor.infer(tensors, request.deadline, request.usage))
    long = sum(array.nbytes for array in outputs.values()) > QUICK_BYTES
    body, header_length = await aside(long, _encode, content, model, outputs, request.most_answer_bytes)
    headers = request.model_headers()
    if header_length is None:
        return InferenceResponse(200, body, headers)
    headers.append((b"inference-header-content-length", b"%d" % header_length))
    return InferenceResponse(200, body, headers, b"application/octet-stream")


def _decode(body: bytes, header_length: str | None) -> tuple[InferRequest, Tensors]:
    head, binary = split_body(body, header_length)
    content = decode_json(head, DECODER)
    return content, decode_tensors(content, binary)


def _encode(content: InferRequest, model: Model, outputs: Tensors, most_bytes: int) -> tuple[bytes, int | None]:
    manifest, task = model.artifact.manifest, model.task
    for want in content.outputs:
        if (count := want.parameters.classification) and want.name in outputs:
            found = classified(outputs[want.name], count, manifest.labels, rows=task.by_rows)
            outputs = outputs | {want.name: found}
    return encode_response(content, manifest.name, manifest.version, outputs, most_bytes)


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
    return JSONResponse(metadata_of(_model(request)))


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


async def repository_index(request: Request) -> Response:
    """The one model there is, and whether it is ready."""
    body = b""
    try:
        async with asyncio.timeout(INDEX_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_INDEX_BYTES:
                    raise BodyTooLarge(f"body: expected at most {MAX_INDEX_BYTES} bytes")
    except TimeoutError:
        raise BodyTimeout(f"body: not received in {INDEX_SECONDS} s") from None
    only_ready = body != b"" and decode_json(body, INDEX_DECODER).ready
    manifest, is_ready = _model(request).artifact.manifest, _lifecycle(request).ready
    state, reason = ("READY", "") if is_ready else ("UNAVAILABLE", _lifecycle(request).stage)
    entry = {"name": manifest.name, "version": manifest.version, "state": state, "reason": reason}
    return JSONResponse([entry] if is_ready or not only_ready else [])


async def repository_change(request: Request) -> Response:
    """Refused: what is served is checked before it is ready, and another model is another rollout."""
    raise BadRequest("models are not loaded or unloaded at run time: roll out another artifact (APP_MODEL_DIR)")


def metadata_of(model: Model) -> dict[str, Any]:
    """The model's metadata as the protocol words it."""
    manifest, task = model.artifact.manifest, model.task
    return {
        "name": manifest.name,
        "versions": [manifest.version],
        "platform": "onnxruntime_onnx",
        "inputs": [msgspec.structs.asdict(spec) for spec in task.inputs],
        "outputs": [msgspec.structs.asdict(spec) for spec in task.outputs],
    }


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
            "compute_input": entry(totals.succeeded, totals.input_seconds),
            "compute_infer": entry(totals.succeeded, totals.inference_seconds),
            "compute_output": entry(totals.succeeded, totals.output_seconds),
            "cache_hit": entry(0, 0),
            "cache_miss": entry(0, 0),
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
