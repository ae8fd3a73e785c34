"""The files of the page at / and of /docs: each read when it is first asked for, and allowed to load from here alone.

Knows nothing of the model: scripts ask for what they show.
"""

import hashlib
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

STATIC = Path(__file__).parent / "static"
# A client may keep a file, but asks each time whether it is still the one: there is no version in an address.
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
KINDS = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE = (
    "page.css", "page.js", "dom.js", "charts.js", "forms.js", "tensors.js", "requests.js", "answers.js",
)  # fmt: skip
DOCS = ("docs.css", "docs.js", "icon.svg")
# Swagger UI, from the package that has it.
SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")


def file(name: str) -> Callable[[Request], Awaitable[Response]]:
    """The handler that answers with a file of ours, or of Swagger UI."""

    async def handler(request: Request) -> Response:
        """A file of the page or of the documentation."""
        body, tag = _read(name)
        headers = HEADERS | {"etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=KINDS[Path(name).suffix])

    return handler


@cache
def _read(name: str) -> tuple[bytes, str]:
    """A file's content, and the tag that stands for it."""
    body = ((_swagger() if name in SWAGGER else STATIC) / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _swagger() -> Path:
    """Found, not imported: its files are all that is wanted of it."""
    found = find_spec("fastapi_swagger")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0]) / "resources"
