"""The web floor: the same ASGI server and options as the service's, answering the same JSON with no model."""

from typing import Any

ANSWER = b'{"label":"positive","score":0.991267}'


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Reads the body, answers a constant."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        continue
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})
