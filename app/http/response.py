"""What an inference request gets: status, headers and body, and the one shape of every error."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.exceptions import HTTPException

from app.errors import RequestError

_ENCODER = msgspec.json.Encoder()


@dataclass(slots=True)
class Response:
    """Status, body, and headers as ASGI wants them (names in lower case)."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content_type: bytes = b"application/json"
    retry_after_seconds: int | None = None

    def all_headers(self) -> list[tuple[bytes, bytes]]:
        """`headers`, and those that the body has."""
        length = b"%d" % len(self.body)
        return [(b"content-type", self.content_type), (b"content-length", length), *self.headers]


def json_response(content: Any, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    """`content` as JSON: anything that msgspec encodes."""
    return Response(200, _ENCODER.encode(content), headers or [])


def error_response(error: RequestError | HTTPException) -> Response:
    """The one shape of every error, `{"error": …}`, with the headers that its status asks for."""
    if isinstance(error, HTTPException):
        given = (error.headers or {}).items()
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given]
        return Response(error.status_code, _ENCODER.encode({"error": error.detail}), headers)
    headers = []
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_seconds))
    if error.challenge is not None:
        headers.append((b"www-authenticate", error.challenge.encode()))
    if error.close:
        headers.append((b"connection", b"close"))
    body = _ENCODER.encode({"error": str(error)})
    return Response(error.status, body, headers, retry_after_seconds=error.retry_after_seconds)
