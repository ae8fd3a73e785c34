"""What gRPC says of each error: the one table from statuses of the error family to codes, and trailing metadata."""

from grpc import StatusCode
from starlette.exceptions import HTTPException

from app.errors import RequestError

Metadata = tuple[tuple[str, str], ...]
REQUEST_ID = "x-request-id"
# As `app.errors` has them, and what a hook may answer.
CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    415: StatusCode.INVALID_ARGUMENT,
    422: StatusCode.INVALID_ARGUMENT,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}


def code_of(status: int) -> StatusCode:
    """The code for an HTTP status."""
    return CODES.get(status, StatusCode.UNKNOWN)


def ending(error: RequestError | HTTPException) -> tuple[StatusCode, str, Metadata]:
    """Code, message and trailing metadata. The message has nothing of the request's content, as no error has.

    `retry-after` is in seconds, as over HTTP; `grpc-retry-pushback-ms` is what a client's retry policy heeds.
    """
    if isinstance(error, HTTPException):
        return code_of(error.status_code), str(error.detail), ()
    seconds = error.retry_after_seconds
    retry = () if seconds is None else (("retry-after", str(seconds)), ("grpc-retry-pushback-ms", str(seconds * 1000)))
    return code_of(error.status), str(error), retry
