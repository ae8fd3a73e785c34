"""The OpenAPI document: FastAPI's own of the endpoints it serves, and from the table the routes of the model's task."""

import re
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from msgspec import Struct

from app.artifact.manifest import Manifest
from app.errors import STATUSES
from app.http.routes import Route, serves


class ErrorResponse(Struct):
    error: str


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, made once; FastAPI asks for it as `app.openapi()`. Raises Unavailable before there is a
    model, since its task says which routes there are."""
    if app.openapi_schema is None:
        rows = [route for route in app.state.rows if route.label and route.in_document]
        manifest = None
        if not all(route.queued for route in rows):
            manifest = app.state.lifecycle.loaded().model.artifact.manifest
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for route in rows:
            if manifest is None or serves(route, manifest.task):
                schema["paths"].setdefault(route.path, {})[route.method.lower()] = _operation(route, manifest)
        app.openapi_schema = schema
    return app.openapi_schema


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
