"""Asks a served model as a client does and says in one line how it answers; exit code 1 if not as it should.

The standard library only, and loadtest/payloads.py, which makes a request for any model.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException, HTTPMessage
from typing import Any

from loadtest.payloads import JSON, PayloadError, Served, shown

TIMEOUT_SECONDS = 10
RETRY_SECONDS = 1


class Failure(Exception):
    """What is wrong, as one line."""


class Service:
    """The service at an address like http://HOST:PORT."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON) -> tuple[HTTPMessage, bytes]:
        """Headers and body of the answer. Raises Failure for any status but 200."""
        request = urllib.request.Request(self.url + path, body, dict(headers))  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
                return answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            raise Failure(f"{self.url}{path} answered {error.code}: {shown(error.read())}") from None
        except (OSError, HTTPException) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise Failure(f"{self.url}{path} did not answer: {reason or type(error).__name__}") from None

    def ask_json(self, path: str, content: Any) -> tuple[HTTPMessage, Any]:
        """The same, with JSON both ways."""
        headers, body = self.ask(path, json.dumps(content).encode())
        return headers, json.loads(body)

    def until_ready(self, seconds: float) -> None:
        """Waits for /ready. Raises Failure with the last reason why not."""
        limit = time.monotonic() + seconds
        while True:
            try:
                self.ask("/ready")
            except Failure as failure:
                if time.monotonic() >= limit:
                    raise Failure(f"not ready within {seconds:g} s: {failure}") from None
                time.sleep(RETRY_SECONDS)
            else:
                return


def require(holds: bool, failure: str) -> None:
    """Raises Failure."""
    if not holds:
        raise Failure(failure)


def check_text(service: Service, text: str, label: str) -> tuple[HTTPMessage, str]:
    """A text gets its label, or its labels, and the right one among them. Returns headers, and what was answered."""
    headers, found = service.ask_json("/predict", {"text": text})
    labels = {each["label"]: each["score"] for each in found.get("labels", [found])}
    require(all(0 <= score <= 1 for score in labels.values()), f"/predict answered no label with its score: {found}")
    require(label in ("", *labels), f"/predict answered {found}, not {label}")
    return headers, ", ".join(f"{name} {score:.2f}" for name, score in labels.items())


def check_protocol(service: Service, served: Served) -> tuple[HTTPMessage, str]:
    """Any model answers a row of its inputs over the Open Inference Protocol."""
    (payload,) = served.payloads(1, 1)
    headers, body = service.ask(payload.path, payload.body, payload.headers)
    outputs = json.loads(body[: int(headers["inference-header-content-length"])])["outputs"]
    require(bool(outputs), f"{served.path} answered no outputs")
    return headers, ", ".join(each["name"] for each in outputs)


def check(options: Mapping[str, str]) -> str:
    """What was answered, as one line. Raises Failure."""
    service = Service(options["SMOKE_URL"])
    service.until_ready(float(options["SMOKE_PATIENCE_SECONDS"]))
    served = Served.ask(service.url)
    headers, answered = check_protocol(service, served)
    if served.takes_text:
        headers, answered = check_text(service, options["SMOKE_TEXT"], options["SMOKE_LABEL"])
    model, expected = headers["x-model"], options["SMOKE_MODEL"]
    require(expected in ("", model), f"{service.url} serves {model}, not {expected}")
    return f"{model} at {service.url}: {answered}"


if __name__ == "__main__":
    try:
        print("smoke test passed:", check(os.environ))
    except (Failure, PayloadError) as error:
        sys.exit(f"smoke test failed: {error}")
    except Exception as error:  # an answer of another shape than this service's
        sys.exit(f"smoke test failed: not an answer of this service: {type(error).__name__}: {error}")
