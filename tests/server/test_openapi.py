"""The OpenAPI document says what there is, and whatever fits it, or just misses it, never ends in a server error."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests import onnx_models
from tests.process import ServerProcess
from tests.text_model import NAME

ROUTES = {
    ("post", "/predict"),
    ("post", "/predict/batch"),
    ("get", "/live"),
    ("get", "/ready"),
    ("get", "/metrics"),
    ("get", "/v2"),
    ("get", "/v2/health/live"),
    ("get", "/v2/health/ready"),
    ("get", "/v2/models/stats"),
    ("get", "/v2/models/{model_name}"),
    ("get", "/v2/models/{model_name}/ready"),
    ("get", "/v2/models/{model_name}/config"),
    ("get", "/v2/models/{model_name}/stats"),
    ("post", "/v2/models/{model_name}/infer"),
}
INFERENCES = sorted(path for method, path in ROUTES if method == "post")
# The same examples in every run, and no verdict that depends on how busy the machine is.
repeatable = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


# Beyond any wait on a busy machine: a deadline that passes there would be a 504, and no fault of the request.
PATIENT = {"request_timeout_ms": 300_000}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """The text model."""
    with ServerProcess(**PATIENT) as process:
        yield process.ready()


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> dict[str, Any]:
    return get(server, "/openapi.json").json()


def get(server: ServerProcess, path: str) -> httpx.Response:
    return httpx.get(server.url + path, timeout=300)


@pytest.fixture(scope="module")
def tensor_server(package: Callable[..., Path]) -> Iterator[ServerProcess]:
    with ServerProcess(package(onnx_models.two_outputs, "two"), **PATIENT) as process:
        yield process.ready()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict]:
    return {(method, path): item[method] for path, item in document["paths"].items() for method in item}


def test_the_document_lists_every_route_of_the_contract(document):
    assert set(operations(document)) >= ROUTES


def test_every_route_says_in_words_what_it_does(document):
    assert [route for route, operation in operations(document).items() if not operation.get("description")] == []


def test_every_part_of_a_path_that_varies_is_described(document):
    for (_, path), operation in operations(document).items():
        described = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path" and p["required"]}
        assert described == {part[1:-1] for part in path.split("/") if part.startswith("{")}, path


def test_no_parameter_is_described_but_parts_of_the_path(document):
    others = {
        (path, parameter["name"])
        for (_, path), operation in operations(document).items()
        for parameter in operation.get("parameters", [])
        if parameter["in"] != "path"
    }
    assert others == set()


def test_no_two_operations_share_a_name(document):
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("path", "required"),
    [("/predict", "text"), ("/predict/batch", "texts"), ("/v2/models/{model_name}/infer", "inputs")],
)
def test_every_inference_route_describes_its_body(document, path, required):
    body = operations(document)["post", path]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert body["required"] is True
    assert required in schema["required"]
    assert schema["properties"][required]["type"] in ("string", "array")


@pytest.mark.parametrize("path", ["/predict", "/predict/batch"])
def test_the_answer_that_is_described_is_the_answer_that_comes(document, server, path):
    described = operations(document)["post", path]["responses"]["200"]["content"]["application/json"]["schema"]
    body = {"text": "Marvellous!"} if path == "/predict" else {"texts": ["Marvellous!"]}
    answer = httpx.post(server.url + path, json=body, timeout=300).json()
    if path == "/predict/batch":
        (answer,) = answer["predictions"]
        described = described["properties"]["predictions"]["items"]
    assert set(described["required"]) <= set(answer) <= set(described["properties"])


@pytest.mark.parametrize("path", INFERENCES)
def test_every_inference_route_lists_the_refusals_of_the_contract(document, path):
    responses = operations(document)["post", path]["responses"]
    assert {"400", "408", "413", "415", "422", "429", "503", "504"} <= set(responses)
    for status, response in responses.items():
        if status >= "400":
            assert "error" in response["content"]["application/json"]["schema"]["properties"], status


def test_the_document_and_its_page_are_served(server):
    assert get(server, "/openapi.json").headers["content-type"] == "application/json"
    page = get(server, "/docs")
    assert page.status_code == 200
    # The page itself and all that it names are here: it needs no other host.
    names = re.findall(r"""(?:href|src)="([^"]+)\"""", page.text)
    assert names
    assert {get(server, "/" + name).status_code for name in names} == {200}
    assert get(server, "/redoc").status_code == 404


# What is generated from the document, against the real servers.


def send_generated(server: ServerProcess, method: str, path: str, mode: GenerationMode, **fixed: str) -> set[int]:
    """Sends what schemathesis makes of one operation; `fixed`: parts of its path. Returns the statuses."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = set()

    @repeatable
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        case.path_parameters = {**(case.path_parameters or {}), **fixed}
        response = case.call(session=session)
        case.validate_response(response, checks=[not_a_server_error])
        statuses.add(response.status_code)

    with requests.Session() as session:
        send()
    return statuses


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_no_fitting_request_ends_in_a_server_error(server, method, path):
    statuses = send_generated(server, method, path, GenerationMode.POSITIVE)
    assert max(statuses) < 500
    # The document's examples, the model's name among them, are generated as well.
    assert 200 in statuses


@pytest.mark.parametrize("path", INFERENCES)
def test_no_request_that_just_misses_ends_in_a_server_error(server, path):
    statuses = send_generated(server, "post", path, GenerationMode.NEGATIVE)
    assert max(statuses) < 500
    assert max(statuses) >= 400


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("name", [NAME, "two"])
def test_no_inference_with_a_model_that_is_there_ends_in_a_server_error(server, tensor_server, name, mode):
    process = tensor_server if name == "two" else server
    statuses = send_generated(process, "post", "/v2/models/{model_name}/infer", mode, model_name=name)
    assert max(statuses) < 500
    assert statuses & {400, 422}
    assert 404 not in statuses


def test_the_server_is_well_after_all_of_that(server, tensor_server):
    for process in (server, tensor_server):
        assert get(process, "/live").status_code == 200
        assert get(process, "/ready").status_code == 200
        assert process.metric("inference_requests_in_flight") == 0
        assert process.metric("inference_queue_rows") == 0
        assert [line for line in process.logs() if line.get("event") == "unhandled"] == []
        assert process.errors() == ""
