"""The OpenAPI document: FastAPI's own of the endpoints it serves, and from the table the routes of the model's task,
all with examples.
"""

import re
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct

from app.artifact.manifest import Manifest
from app.errors import STATUSES
from app.http.examples import bodies, parameter, refusal
from app.http.routes import Route, serves
from app.predictor import Predictor


class ErrorResponse(Struct):
    error: str


WORDS = (
    'Every error is `{"error": "…"}`: its status says whether to try again, its message what was expected. Answers '
    "carry `X-Request-ID`, which the log line of the request has as well; those of the model `X-Model` and "
    "`Server-Timing`."
)
INFERENCE, PROTOCOL, OPERATION = "Inference", "Open Inference Protocol", "Operation"


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, made once; FastAPI asks for it as `app.openapi()`. Raises Unavailable before there is a
    model, since its task says which routes there are."""
    if app.openapi_schema is None:
        rows = [route for route in app.state.rows if route.in_document]
        predictor = None
        if not all(route.queued for route in rows if route.label):
            predictor = app.state.lifecycle.loaded()
        schema = get_openapi(title=app.title, version=app.version, description=WORDS, routes=app.routes)
        # Inference first, as people look for it.
        paths: dict[str, Any] = {}
        endpoints = schema["paths"]
        for route in sorted(rows, key=lambda route: [INFERENCE, PROTOCOL, OPERATION].index(_tag(route))):
            method = route.method.lower()
            if not route.label:
                operation = endpoints[route.path][method]
            elif predictor is None or serves(route, predictor.model.artifact.manifest.task):
                operation = _operation(route, predictor.model.artifact.manifest if predictor else None)
            else:
                continue
            _illustrate(operation, route, predictor)
            paths.setdefault(route.path, {})[method] = operation
        # And what somebody added to the application itself.
        for path, item in endpoints.items():
            paths[path] = item | paths.get(path, {})
        app.openapi_schema = schema | {"paths": paths}
    return app.openapi_schema


def _tag(route: Route) -> str:
    if route.path.startswith("/v2"):
        return PROTOCOL
    return INFERENCE if route.label or route.queued else OPERATION


def _illustrate(operation: dict[str, Any], route: Route, predictor: Predictor | None) -> None:
    """Adds examples of the request and of each answer, and what each error means."""
    operation["tags"] = [_tag(route)]
    request, answer = bodies(route.path, predictor)
    for each in operation.get("parameters", []):
        if (found := parameter(each["name"], predictor)) is not None:
            each["example"] = found
    if request is not None:
        content = operation.setdefault("requestBody", {}).setdefault("content", {})
        content.setdefault("application/json", {})["example"] = request
    for status, response in operation["responses"].items():
        if int(status) < 400:
            media = "text/plain" if isinstance(answer, str) else "application/json"
            found = response.get("content", {}).get(media, {})
            if answer is not None:
                response["content"] = {media: found | {"example": answer}}
            continue
        response["description"], error = refusal(route.path, int(status), inference=bool(route.label))
        response["content"] = _content("", ErrorResponse)["content"]
        response["content"]["application/json"]["example"] = error


def path_parameters(path: str) -> list[dict[str, Any]]:
    """What OpenAPI wants said of the parts of a path that vary."""
    names = re.findall(r"{(\w+)}", path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _operation(route: Route, manifest: Manifest | None) -> dict[str, Any]:
    words = route.handler.__doc__ or ""
    answers = {str(status): _content("Error", ErrorResponse) for status in STATUSES if status not in (200, 499)}
    answer = route.response
    if isinstance(answer, dict) and manifest is not None:
        answer = answer[manifest.problem_type]
    if answer is not None:
        answers = {"202" if route.queued else "200": _content("Answer", answer), **answers}
    body = _content("", route.request) if route.request else {}
    if route.media:
        body = {"content": {media: {"schema": {"type": "string", "format": "binary"}} for media in route.media}}
    return {
        "summary": words.partition("\n")[0],
        "description": words,
        "operationId": route.path,
        "parameters": path_parameters(route.path),
        "requestBody": {"required": True, **body} if body else {},
        "responses": answers,
    }


def _content(description: str, kind: Any) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": _inline_schema(kind)}}}
    return {"description": description, **content} if description else content


def _inline_schema(kind: Any) -> dict[str, Any]:
    """JSON schema of a type, its references replaced by what they name."""
    (schema,), components = msgspec.json.schema_components([kind])

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(components[node["$ref"].rpartition("/")[2]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved: dict[str, Any] = resolve(schema)
    return resolved
