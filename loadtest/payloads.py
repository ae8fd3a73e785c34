"""Requests that a served model takes, from what the server says of it over the Open Inference Protocol: texts for a
text model, random tensors of its shapes for any other. The standard library only: it also runs beside locust, in Jobs.
"""

import json
import math
import random
import struct
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtest.texts import text_of

JSON = {"Content-Type": "application/json"}
TIMEOUT_SECONDS = 60
SHOWN_CHARACTERS = 300
# The values of one tensor as bytes, for `struct`. BF16 and BYTES have none.
FORMATS = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I",
    "UINT64": "Q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
Spec = Mapping[str, Any]


class PayloadError(Exception):
    """No request can be made for this server; the message is one line for people."""


@dataclass(frozen=True)
class Payload:
    """One POST: its path and body, and the headers that the body needs."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)


@dataclass(frozen=True)
class Served:
    """A model as the server describes it."""

    name: str
    inputs: Sequence[Spec]
    outputs: Sequence[Spec]

    @property
    def takes_text(self) -> bool:
        """Whether /predict serves it: a text in, a label out."""
        taken = [(spec["name"], spec["datatype"]) for spec in self.inputs]
        return taken == [("text", "BYTES")] and "label" in [spec["name"] for spec in self.outputs]

    @property
    def path(self) -> str:
        return f"/v2/models/{self.name}/infer"

    @staticmethod
    def ask(url: str, name: str = "") -> "Served":
        """The model of that name, or the first that the server has; `url` is http://HOST:PORT. Raises PayloadError."""
        try:
            name = name or str(_get(f"{url}/v2/models/stats")["model_stats"][0]["name"])
            found = _get(f"{url}/v2/models/{name}")
            return Served(name, found["inputs"], found["outputs"])
        except urllib.error.HTTPError as error:
            raise PayloadError(f"{error.url} answered {error.code}: {shown(error.read())}") from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = getattr(error, "reason", error)
            raise PayloadError(f"{url}: no model's metadata: {getattr(reason, 'strerror', '') or reason}") from None

    def payloads(self, count: int, size: int, seed: int = 1) -> list[Payload]:
        """`count` requests of one row. Every other axis that may vary has one length in a request, from 1 to `size`.

        Integers are 0 to 9, so that they are valid indices of most tables; floats are standard normal. Raises
        PayloadError for a datatype that is none of the protocol's.
        """
        rng, made = random.Random(seed), []
        for _ in range(count):
            varying = rng.randint(1, size)
            shapes = [
                [length if length >= 0 else varying if axis else 1 for axis, length in enumerate(spec["shape"])]
                for spec in self.inputs
            ]
            tensors = zip(self.inputs, shapes, strict=True)
            made.append(self.payload([(spec, shape, random_bytes(spec, shape, rng)) for spec, shape in tensors]))
        return made

    def payload(self, tensors: Sequence[tuple[Spec, Sequence[int], bytes]]) -> Payload:
        """A request with these tensors: specification, shape, binary data. Binary both ways, or writing and reading
        numbers as JSON would be much of what is measured."""
        inputs = [
            {
                "name": spec["name"],
                "datatype": spec["datatype"],
                "shape": shape,
                "parameters": {"binary_data_size": len(raw)},
            }
            for spec, shape, raw in tensors
        ]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return Payload(self.path, head + b"".join(raw for _, _, raw in tensors), headers)


def random_bytes(spec: Spec, shape: Sequence[int], rng: random.Random) -> bytes:
    """Random values of a tensor, as the protocol's binary data."""
    count, datatype = math.prod(shape), spec["datatype"]
    if datatype == "BYTES":
        return values_bytes(spec, [text_of("short", rng) for _ in range(count)])
    if datatype == "BOOL":
        return values_bytes(spec, rng.choices((False, True), k=count))
    if datatype.startswith(("FP", "BF")):
        return values_bytes(spec, [rng.gauss(0, 1) for _ in range(count)])
    return values_bytes(spec, rng.choices(range(10), k=count))


def values_bytes(spec: Spec, values: Sequence[Any]) -> bytes:
    """Values as the protocol's binary data: little-endian, strings with their length. Raises PayloadError."""
    datatype = spec["datatype"]
    try:
        if datatype == "BYTES":
            encoded = [value if isinstance(value, bytes) else str(value).encode() for value in values]
            return b"".join(struct.pack("<I", len(each)) + each for each in encoded)
        if datatype == "BF16":
            # The upper half of a float32.
            raw = struct.pack(f"<{len(values)}f", *values)
            return b"".join(raw[start + 2 : start + 4] for start in range(0, len(raw), 4))
        # Any number will do for a whole one: files are often written as float64.
        numbers = map(int, values) if "INT" in datatype else values
        return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *numbers)
    except (KeyError, struct.error, OverflowError):
        raise PayloadError(f"{spec['name']}: expected values of a datatype {datatype}") from None


def post(url: str, payload: Payload) -> tuple[int, str]:
    """Sends one request to http://HOST:PORT: status, start of the body. Raises PayloadError if nothing answers."""
    request = urllib.request.Request(url + payload.path, payload.body, dict(payload.headers))  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return answer.status, shown(answer.read(SHOWN_CHARACTERS))
    except urllib.error.HTTPError as error:
        return error.code, shown(error.read())
    except OSError as error:
        raise PayloadError(f"{url}{payload.path}: {getattr(error, 'reason', error)}") from None


def shown(body: bytes) -> str:
    """The start of a body on one line."""
    return " ".join(body[:SHOWN_CHARACTERS].decode("utf-8", "replace").split())


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
        return json.load(answer)
