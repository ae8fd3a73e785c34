"""Bodies of the Open Inference Protocol to its codec: refused in one family of errors, or the same again both ways."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from app.artifact.datatypes import DATATYPES, Array, Tensors
from app.errors import RequestError
from app.http.oip.answer import encode_response
from app.http.oip.codec import InferRequest, RequestParameters, decode_tensors, split_body
from app.http.request import decode_json

# The body, and the header that says where its JSON ends.
Case = tuple[bytes, str | None]
EXAMPLES = 300
DECODER = msgspec.json.Decoder(InferRequest)
# An array of the widest datatype, of elements that take one character and a comma.
MOST_BYTES_PER_BYTE = 8
MOST_BYTES = 1 << 20

numbers = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 10**400, 65504, 65520]),
    st.floats(),
    st.sampled_from([-0.0, 1e39, 1e308, 5e-324, 0.1]),
)
texts = st.text(max_size=4)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=6
)
sizes = st.one_of(st.integers(0, 3), st.sampled_from([-1, 2**40, 2**63, 10**30, 1.5, True, "1"]))
names = st.sampled_from(["a", "b", "", "\0", "é", "\U0001f427"]) | texts
datatypes = st.sampled_from([*DATATYPES, "FP8", "bytes", ""])


def usual(strategy: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly of the first kind."""
    return st.integers(0, 7).flatmap(lambda pick: other if pick == 0 else strategy)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """An input tensor, and its part of the binary body. Mostly one that fits its shape."""
    datatype = draw(datatypes)
    shape = draw(usual(st.lists(st.integers(1, 3), max_size=3), st.lists(sizes, max_size=4)))
    spec: dict[str, Any] = {"name": draw(names), "datatype": datatype, "shape": shape}
    fits = datatype in DATATYPES and all(type(size) is int and 0 < size < 4 for size in shape)
    count = int(np.prod(shape)) if fits else 1
    if draw(st.booleans()):
        kind = DATATYPES[datatype].kind if datatype in DATATYPES else "O"
        element = {"b": st.booleans(), "O": texts, "f": numbers}.get(kind, st.integers(0, 100))
        spec["data"] = draw(
            usual(st.lists(element, min_size=count, max_size=count), st.lists(anything, max_size=6) | anything)
        )
        return spec, b""
    if datatype == "BYTES":
        elements = draw(st.lists(st.binary(max_size=4), min_size=count, max_size=count))
        raw = b"".join(len(each).to_bytes(4, "little") + each for each in elements)
    else:
        width = DATATYPES[datatype].itemsize if datatype in DATATYPES else 4
        raw = draw(st.binary(min_size=count * width, max_size=count * width))
    raw = draw(usual(st.just(raw), st.binary(max_size=16)))
    spec["parameters"] = {"binary_data_size": draw(usual(st.just(len(raw)), anything))}
    return spec, raw


def encoded(value: Any) -> bytes:
    """JSON, with what Python writes beyond it: NaN, lone surrogates."""
    return json.dumps(value).encode(errors="surrogatepass")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Requests, mostly as they should be, sometimes damaged."""
    drawn = draw(st.lists(inputs(), max_size=3))
    request: dict[str, Any] = {"inputs": [spec for spec, _ in drawn]}
    if draw(st.integers(0, 7)) == 0:
        request |= draw(
            st.dictionaries(st.sampled_from(["id", "parameters", "outputs", "inputs"]), anything, max_size=2)
        )
    head = encoded(request)
    body = bytearray(head + b"".join(raw for _, raw in drawn))
    for place, change in draw(
        usual(st.just([]), st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3)), max_size=2))
    ):
        body[place : place + 1] = change
    length = draw(usual(st.just(str(len(head))), st.sampled_from(["", "-1", "+1", "0", "²", "1" * 20, "00001"])))
    binary = any(raw for _, raw in drawn)
    return bytes(body), draw(usual(st.just(length if binary else None), st.just(length)))


CASES = cases()


def decoded(body: bytes, header_length: str | None) -> Tensors:
    """As the handler does it."""
    head, binary = split_body(body, header_length)
    return decode_tensors(decode_json(head, DECODER), binary)


def again(tensors: Tensors, *, binary: bool) -> Tensors:
    """Answered with, and read again as a request."""
    asks = InferRequest(inputs=[], parameters=RequestParameters(binary_data_output=binary))
    body, length = encode_response(asks, "m", "1", tensors, MOST_BYTES)
    head, rest = split_body(body, None if length is None else str(length))
    answer = json.loads(head)
    return decoded(
        encoded({"inputs": answer["outputs"]}) + bytes(rest), str(len(encoded({"inputs": answer["outputs"]})))
    )


def same(one: Array, other: Array) -> bool:
    if one.dtype == object:
        as_bytes = [
            [each if isinstance(each, bytes) else each.encode() for each in array.ravel()] for array in (one, other)
        ]
        return one.shape == other.shape and as_bytes[0] == as_bytes[1]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()


def in_json(array: Array) -> bool:
    """Whether JSON can say it: text, and finite numbers."""
    if array.dtype == object:
        return all(isinstance(each, str) for each in array.ravel())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def check(case: Case) -> None:
    """Raises what is wrong."""
    body, header_length = case
    try:
        tensors = decoded(body, header_length)
    except RequestError:
        return
    assert sum(array.nbytes for array in tensors.values()) <= MOST_BYTES_PER_BYTE * len(body)
    if not tensors:
        return
    found = again(tensors, binary=True)
    assert list(found) == list(tensors)
    assert all(same(tensors[name], found[name]) for name in tensors), tensors
    speakable = {name: array for name, array in tensors.items() if in_json(array)}
    found = again(speakable, binary=False)
    assert all(same(speakable[name], found[name]) for name in speakable), tensors


@contextmanager
def checking() -> Iterator[Callable[[Case], None]]:
    """The check of a case."""
    yield check
