"""The OpenAPI document without a network: its order, its examples, and what somebody added; tests/server sends them."""

import pytest

from app.errors import STATUSES, ClientClosed
from app.http.examples import ERRORS
from app.http.openapi import INFERENCE, OPERATION, PROTOCOL, document
from app.runtime.session import Model
from tests.text_model import LABELS, NAME
from tests.unit.http.asgi import Served


def test_every_status_of_an_error_has_a_meaning_and_an_example() -> None:
    assert {status for status in STATUSES if status >= 400} - {ClientClosed.status} <= set(ERRORS)


async def test_inference_comes_first_and_every_operation_is_of_one_group(reviews: Model) -> None:
    async with Served(reviews) as served:
        paths = document(served.app)["paths"]
        groups = [operation["tags"] for item in paths.values() for operation in item.values()]
        assert {len(tags) for tags in groups} == {1}
        order = [INFERENCE, PROTOCOL, OPERATION]
        assert [tag for (tag,) in groups] == sorted((tag for (tag,) in groups), key=order.index)


async def test_examples_have_the_names_and_labels_of_the_model(reviews: Model) -> None:
    async with Served(reviews) as served:
        paths = document(served.app)["paths"]
        answer = paths["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
        assert answer["label"] in LABELS
        (name,) = paths["/v2/models/{model_name}/infer"]["post"]["parameters"]
        assert name["example"] == NAME


@pytest.mark.parametrize("status", ["404", "503"])
async def test_an_error_says_what_it_means_in_the_one_shape_of_errors(reviews: Model, status: str) -> None:
    async with Served(reviews) as served:
        for item in document(served.app)["paths"].values():
            for operation in item.values():
                if (response := operation["responses"].get(status)) is not None:
                    assert response["description"] not in ("", "Error")
                    assert response["content"]["application/json"]["example"]["error"]


async def test_an_endpoint_that_somebody_added_to_the_application_is_in_the_document(reviews: Model) -> None:
    async def mine() -> dict[str, str]:
        return {}

    async with Served(reviews) as served:
        served.app.get("/mine")(mine)
        assert "/mine" in document(served.app)["paths"]


async def test_a_gateway_has_examples_without_a_model() -> None:
    async with Served(role="gateway", queue_url="redis://127.0.0.1:1") as served:
        item = document(served.app)["paths"]["/jobs"]["post"]
        assert item["requestBody"]["content"]["application/json"]["example"]["texts"]
        assert item["responses"]["202"]["content"]["application/json"]["example"]["id"]
