"""What the OpenAPI document shows of each route: a request, its answer, and what each error says. Names, labels and
tensors are those of the model that is served. A route that is not here has none.
"""

from math import prod
from typing import Any

from app import NAME, __version__
from app.artifact.datatypes import DATATYPES
from app.artifact.manifest import Manifest, TensorSpec
from app.http.oip.handlers import EXTENSIONS, configuration, metadata_of, statistics_of
from app.predictor import Predictor
from app.telemetry.metrics import Statistics

TEXT = "Zoë loves every page of it!"
QUERY, TEXTS = "When was the bridge built?", ["It was finished in 1894.", "The river is 300 km long."]
VECTOR = [0.0312, -0.0541, 0.0127]
JOB = "a45c1f0b0c8e4f6f8d3a1f6c2b7f9d10"
# Beyond that, the example shows how the tensor is sent in binary.
MOST_ELEMENTS = 64
FILE_BYTES = 24_576

# What it means, and a message.
ERRORS = {
    400: ("Not parseable", "body: JSON is malformed: invalid character (byte 9)"),
    401: ("Refused by a hook: who asks is not known", "expected an API key"),
    403: ("Refused by a hook: who asks may not", "this key may not ask for predictions"),
    404: ("Unknown model, version, job or path", "unknown model; this server has 'my-model'"),
    405: ("Another method", "Method Not Allowed"),
    408: ("The body did not come in time", "body: not received before the deadline"),
    413: ("Body too large, also when unpacked", "body: expected at most 4194304 bytes, received more"),
    415: ("Content type or encoding that is not taken", "content-type: expected application/json"),
    422: ("Parseable, but not acceptable", "Object missing required field `text`"),
    429: ("More rows than the queue can ever hold", "600 rows: the queue holds at most 512; send fewer per request"),
    500: ("The model failed on these rows", "the model failed on this input"),
    503: ("Queue full, too late, not ready or draining: come again after `Retry-After` seconds", "queue full"),
    504: ("Not answered before the deadline", "not answered before its deadline"),
}
FIXED: dict[str, tuple[Any, Any]] = {
    "/live": (None, {"status": "live"}),
    "/ready": (None, {"status": "ready"}),
    "/metrics": (None, "# HELP model_ready 1 while the model may answer.\n# TYPE model_ready gauge\nmodel_ready 1.0\n"),
    "/v2": (None, {"name": NAME, "version": __version__, "extensions": EXTENSIONS}),
    "/v2/health/live": (None, {"live": True}),
    "/v2/health/ready": (None, {"ready": True}),
    "/jobs": ({"texts": [TEXT]}, {"id": JOB}),
    "/jobs/{job_id}": (None, {"id": JOB, "status": "queued"}),
}


def bodies(path: str, predictor: Predictor | None) -> tuple[Any, Any]:
    """A request's body and the answer's; None where a route has none."""
    if path in FIXED or predictor is None:
        return FIXED.get(path, (None, None))
    model, task = predictor.model, predictor.model.task
    manifest = model.artifact.manifest
    named = {"name": manifest.name, "version": manifest.version}
    match path:
        case "/predict":
            return (None if manifest.image else {"text": TEXT}), _prediction(manifest)
        case "/predict/batch":
            return {"texts": [TEXT]}, {"predictions": [_prediction(manifest)]}
        case "/embed":
            return {"inputs": [TEXT]}, [VECTOR]
        case "/v1/embeddings":
            answer = {"data": [{"index": 0, "embedding": VECTOR, "object": "embedding"}], "model": manifest.name}
            return {"input": [TEXT]}, answer | {"usage": {"prompt_tokens": 9, "total_tokens": 9}, "object": "list"}
        case "/rerank":
            return {"query": QUERY, "texts": TEXTS}, [{"index": 0, "score": 0.98}, {"index": 1, "score": 0.02}]
        case "/v2/repository/index":
            return {"ready": True}, [named | {"state": "READY", "reason": ""}]
        case "/v2/models/{model_name}":
            return None, metadata_of(model)
        case "/v2/models/{model_name}/ready":
            return None, {"name": manifest.name, "ready": True}
        case "/v2/models/{model_name}/config":
            return None, configuration(model, predictor.batcher.limits.queue_rows)
        case "/v2/models/stats" | "/v2/models/{model_name}/stats":
            return None, {"model_stats": [statistics_of(model, Statistics())]}
        case "/v2/models/{model_name}/infer":
            outputs = [_tensor(spec, manifest.labels[0] if manifest.labels else "a text") for spec in task.outputs]
            answer = {"model_name": manifest.name, "model_version": manifest.version, "outputs": outputs}
            text = None if manifest.image else TEXT
            return {"inputs": [_tensor(spec, text) for spec in task.inputs]}, answer
    return None, None


def refusal(path: str, status: int, *, inference: bool) -> tuple[str, dict[str, str]]:
    """What an error means on a path, and its body."""
    if status == 503 and path in ("/live", "/v2/health/live"):
        return "No progress can be made", {"error": "runner 0 has been in one run for over 30 s"}
    if status == 503 and path == "/ready":
        return "Not ready, and the stage", {"error": "not ready", "stage": "loading"}
    if status == 503 and not inference:
        return "Not ready", {"error": "not ready: loading"}
    meaning, message = ERRORS[status]
    return meaning, {"error": message}


def parameter(name: str, predictor: Predictor | None) -> str | None:
    """Of a part of a path that varies."""
    if name == "model_name" and predictor is not None:
        return predictor.model.artifact.manifest.name
    return JOB if name == "job_id" else None


def _prediction(manifest: Manifest) -> dict[str, Any]:
    labels = manifest.labels
    if manifest.task == "token-classification":
        kind = next((label for label in labels if label != "O"), "O")
        kind = kind.partition("-")[2] or kind
        return {"entities": [{"entity_group": kind, "score": 0.98, "word": "Zoë", "start": 0, "end": 3}]}
    if manifest.task == "text-regression":
        return {"value": dict.fromkeys(labels, 0.4) if labels else 0.4}
    if manifest.problem_type == "multi_label":
        return {"labels": [{"label": labels[-1], "score": 0.98}]}
    return {"label": labels[-1], "score": 0.98}


def _tensor(spec: TensorSpec, text: str | None) -> dict[str, Any]:
    """text: what elements are of BYTES; None if they are files, which JSON cannot hold."""
    shape = [1 if size < 0 else size for size in spec.shape]
    count = prod(shape)
    tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
    if count > MOST_ELEMENTS or (text is None and spec.datatype == "BYTES"):
        size = FILE_BYTES if spec.datatype == "BYTES" else DATATYPES[spec.datatype].itemsize
        return tensor | {"parameters": {"binary_data_size": count * size}}
    filling: Any = {"BYTES": text, "BOOL": False}.get(spec.datatype, 0.5 if "FP" in spec.datatype else 0)
    return tensor | {"data": [filling] * count}
