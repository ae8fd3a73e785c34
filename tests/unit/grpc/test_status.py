"""Every error of the family has its gRPC code, and says when to come back if it is one to come back from."""

import grpc
import pytest
from starlette.exceptions import HTTPException

from app.errors import BadRequest, RequestError, TooManyRows, Unavailable
from app.grpc.status import CODES, ending
from tests.unit.test_errors import family


@pytest.mark.parametrize("kind", family(RequestError), ids=lambda kind: kind.__name__)
def test_every_status_of_the_family_has_a_code(kind):
    assert kind.status in CODES


def test_a_refusal_that_passes_says_when_to_come_back():
    code, message, metadata = ending(Unavailable("queue full", "queue_full", 1.2))
    assert (code, message) == (grpc.StatusCode.UNAVAILABLE, "queue full")
    assert metadata == (("retry-after", "2"), ("grpc-retry-pushback-ms", "2000"))


@pytest.mark.parametrize(
    ("error", "code"),
    [(TooManyRows("many"), "RESOURCE_EXHAUSTED"), (BadRequest("bad"), "INVALID_ARGUMENT"),
     (HTTPException(401), "UNAUTHENTICATED"), (HTTPException(418), "UNKNOWN")],
)  # fmt: skip
def test_one_that_does_not_pass_says_no_time(error, code):
    found, _, metadata = ending(error)
    assert (found.name, metadata) == (code, ())
