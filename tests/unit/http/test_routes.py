"""The table of routes: every row answers, is described and counted; what only looks like a row is told so."""

import json
import re

import pytest

from app.http.oip import handlers
from app.http.openapi import document
from app.http.routes import LABELS, ROUTES, Route, find_inference_route, rows_of, serves
from app.runtime.session import Model
from app.runtime.tasks import TASKS
from app.settings import Settings
from tests.text_model import NAME, VERSION
from tests.unit.http.asgi import PREDICT, Served

TENSOR = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the heron waits"]}]}
BODIES = {
    "/predict": PREDICT,
    "/predict/batch": b'{"texts": ["a", "b"]}',
    "/v2/models/infer": json.dumps(TENSOR).encode(),
}
# Without a queue of jobs, whose rows are in test_jobs.
ROWS = rows_of(Settings())
# Those of the task of the model here.
SERVED = tuple(route for route in ROWS if serves(route, "text-classification"))
ELSEWHERE = tuple(route for route in ROWS if not serves(route, "text-classification"))
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
PATHS = tuple(dict.fromkeys(route.path for route in ROWS))


def filled(path: str, name: str = NAME, version: str = VERSION) -> str:
    return path.format(model_name=name, model_version=version)


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.mark.parametrize("route", SERVED, ids=named)
async def test_every_row_answers_is_described_and_is_counted_from_the_start(reviews: Model, route: Route) -> None:
    status = 400 if route.handler is handlers.repository_change else 200  # which only says that it is not done here
    async with Served(reviews) as served:
        if route.label:
            assert served.requests(200, route.label) == 0
            assert served.sample("inference_request_duration_seconds_count", route=route.label) == 0
        client = await served.ask(filled(route.path), route.method, BODIES.get(route.label, b""))
        assert client.status == status, client.text
        described = document(served.app)["paths"].get(route.path, {})
        assert (route.method.lower() in described) is route.in_document
        if route.label:
            assert served.requests(200, route.label) == 1


def test_every_label_of_the_table_is_one_of_metrics() -> None:
    assert set(LABELS) == {route.label for route in ROUTES if route.label}
    assert {route.label for route in SERVED if route.label} == set(BODIES)


def test_every_task_of_the_table_is_one_that_there_is_and_has_one_handler_on_a_path() -> None:
    assert {task for route in ROUTES for task in route.tasks} <= set(TASKS)
    for task in TASKS:
        served = [(route.method, route.path) for route in ROUTES if serves(route, task)]
        assert len(set(served)) == len(served)


@pytest.mark.parametrize("path", sorted({route.path for route in ELSEWHERE} - {route.path for route in SERVED}))
async def test_a_route_of_another_task_is_not_found_and_says_which_are(reviews: Model, path: str) -> None:
    async with Served(reviews) as served:
        client = await served.ask(path, "POST", PREDICT)
        assert client.status == 404
        assert client.body == {
            "error": "this model's task is text-classification: use POST /predict, POST /predict/batch, "
            f"POST /v2/models/{NAME}/infer"
        }
        assert served.requests(404, path) == 1
        assert path not in document(served.app)["paths"]


async def test_there_is_no_document_before_the_model_says_which_routes_there_are() -> None:
    async with Served() as served:
        client = await served.ask("/openapi.json")
        assert (client.status, client.body) == (503, {"error": "not ready: verifying"})


@pytest.mark.parametrize("path", PATHS)
async def test_another_method_on_a_path_of_the_table_is_405_and_says_which_is_allowed(
    reviews: Model, path: str
) -> None:
    allowed = {route.method for route in ROUTES if route.path == path}
    async with Served(reviews) as served:
        for method in METHODS:
            if method not in allowed and not (method == "HEAD" and "GET" in allowed):
                client = await served.ask(filled(path), method, PREDICT)
                assert client.status == 405, method
                assert allowed <= set(re.split(", *", client.headers["allow"]))
                assert list(client.body) == ["error"]


NEAR_MISSES = (
    *(filled(path) + "/" for path in PATHS),
    *("/" + filled(path) for path in PATHS),
    *(filled(path).upper() for path in PATHS),
    *(filled(path) + "\n" for path in PATHS),
    *(filled(path) + "\r\nx-injected: 1" for path in PATHS),
    *(filled(path, "", "") for path in PATHS if "{" in path),
    *(filled(path, "one\ntwo", "1\n2") for path in PATHS if "{" in path),
    *(filled(path, "n" * 100_000, "1" * 100_000) for path in PATHS if "{" in path),
    *(filled(path) + "/" + "x" * 100_000 for path in ("/predict", "/live")),
    *("/", "//", "", "/predict//batch", "/v2/models/infer", "/v2/models", "/v2/models/", "/v2/models//", "/predict/\0"),
    *(f"/v2/models/{NAME}/versions", f"/v2/models/{NAME}/versions/", f"/v2/models/{NAME}/versions/infer"),
    *(
        f"/v2/models/{NAME}//infer",
        f"/v2//models/{NAME}/infer",
        "/../predict",
        "/predict/../live",
        "/\u2603",
        "/\ufffd",
    ),
)


@pytest.mark.parametrize("path", NEAR_MISSES, ids=lambda path: ascii(path[:60]))
async def test_what_only_looks_like_a_route_is_an_error_and_neither_a_redirect_nor_a_failure(
    reviews: Model, path: str
) -> None:
    async with Served(reviews) as served:
        for method in METHODS:
            client = await served.ask(path, method, PREDICT)
            assert client.status == 200 or 400 <= client.status < 500, method
            assert "location" not in client.headers
            if client.status != 200:
                assert list(client.body) == ["error"], method
                assert client.headers["content-type"] == "application/json"
            if client.status == 405:
                assert client.headers["allow"]


async def test_a_model_called_infer_takes_no_inference_by_its_name_alone(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = await served.ask("/v2/models/infer", "POST", PREDICT)
        assert client.status in (404, 405)
        assert list(client.body) == ["error"]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/v2/models/m/infer", {"model_name": "m"}),
        ("/v2/models/m/versions/1/infer", {"model_name": "m", "model_version": "1"}),
        ("/v2/models/versions/infer", {"model_name": "versions"}),
        ("/predict", {}),
        ("/predict/", None),
        ("/v2/models/m/versions/infer", None),
        ("/v2/models/a/b/infer", None),
        ("/v2/models//infer", None),
        ("/v2/models/m/inferno", None),
        ("x/v2/models/m/infer", None),
    ],
)
def test_an_inference_route_is_found_with_the_parts_of_its_path(path: str, parts: dict[str, str] | None) -> None:
    found = find_inference_route(path)
    assert (found and found[1]) == parts
