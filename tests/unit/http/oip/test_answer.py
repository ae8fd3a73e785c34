"""Answers of the Open Inference Protocol: bounded before they are made, exact or refused."""

import json
from typing import Any

import numpy as np
import pytest

from app.artifact.datatypes import DATATYPES
from app.errors import Invalid, RunFailed
from app.http.oip.answer import PIECE_ELEMENTS, WIDEST, encode_response
from app.http.oip.codec import InferRequest, OutputParameters, RequestedOutput, RequestParameters

PLENTY = 1 << 30
BINARY = RequestParameters(binary_data_output=True)
NUMBERS = [name for name in DATATYPES if name != "BYTES"]


def encode(array: np.ndarray, most_bytes: int = PLENTY, *, binary: bool = False) -> tuple[bytes, int | None]:
    """One output `y`."""
    request = InferRequest([], parameters=RequestParameters(binary_data_output=binary))
    return encode_response(request, "m", "1", {"y": array}, most_bytes)


def data_of(body: bytes) -> Any:
    (output,) = json.loads(body)["outputs"]
    return output["data"]


def extremes(name: str) -> list[Any]:
    """The numbers of a datatype that take most characters."""
    dtype = DATATYPES[name]
    if dtype.kind in "iu":
        return [np.iinfo(dtype).min, np.iinfo(dtype).max]
    rng = np.random.default_rng(4)
    return (
        [False] if name == "BOOL" else [-np.finfo(dtype).tiny, *(-rng.random(2000) * float(np.finfo(dtype).tiny) * 4)]
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_is_wider_than_it_is_counted(name):
    body, _ = encode(np.array(extremes(name), DATATYPES[name]))
    assert max(len(text) + 1 for text in body.split(b"[")[-1].split(b"]")[0].split(b",")) <= WIDEST[name]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_an_answer_of_numbers_is_counted_before_it_is_made(name, binary):
    array = np.zeros((3, 1000), DATATYPES[name])
    size = array.nbytes if binary else array.size * WIDEST[name]
    encode(array, size, binary=binary)
    with pytest.raises(Invalid, match="fewer rows or outputs"):
        encode(array, size - 1, binary=binary)


def test_an_answer_too_large_is_refused_without_its_memory(monkeypatch):
    # A view of one number: as text it would be 100 GB.
    array = np.broadcast_to(np.float32(0.1), (1000, 4_000_000))
    for binary in (False, True):
        with pytest.raises(Invalid):
            encode(array, binary=binary)


def test_outputs_are_counted_together():
    outputs = {name: np.zeros(100) for name in ("a", "b", "c")}
    encode_response(InferRequest([], parameters=BINARY), "m", "1", outputs, 2400)
    with pytest.raises(Invalid):
        encode_response(InferRequest([], parameters=BINARY), "m", "1", outputs, 2399)
    # Only those that are asked for.
    wanted = InferRequest([], parameters=BINARY, outputs=[RequestedOutput("c")])
    encode_response(wanted, "m", "1", outputs, 800)


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_texts_are_counted_as_long_as_they_are(binary):
    array = np.array(["x" * 1000, "", "yz"] * 5000, object)
    encode(array, 5000 * 1100, binary=binary)
    with pytest.raises(Invalid):
        encode(array, 5000 * 1000, binary=binary)


@pytest.mark.parametrize("name", sorted(DATATYPES))
@pytest.mark.parametrize("size", [0, 1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 3 * PIECE_ELEMENTS])
def test_an_answer_that_is_made_in_pieces_is_whole(name, size):
    array = (
        np.arange(size).astype(str).astype(object)
        if name == "BYTES"
        else (np.arange(size) % 100).astype(DATATYPES[name])
    )
    assert data_of(encode(array)[0]) == array.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("size", [3, 3 * PIECE_ELEMENTS])
def test_what_json_has_no_word_for_is_the_models_failure_and_names_the_output_and_the_way_out(value, name, size):
    array = np.zeros(size, DATATYPES[name])
    array[size // 2] = value
    with pytest.raises(RunFailed, match=r"output 'y'.*binary_data"):
        encode(array)
    body, length = encode(array, binary=True)
    assert body[length:] == array.tobytes()


def test_one_output_in_binary_does_not_excuse_another():
    outputs = {"a": np.array([np.nan]), "b": np.array([np.inf])}
    asked = [RequestedOutput("a", OutputParameters(binary_data=True)), RequestedOutput("b")]
    with pytest.raises(RunFailed, match="output 'b'"):
        encode_response(InferRequest([], outputs=asked), "m", "1", outputs, PLENTY)


def test_a_text_may_say_null():
    assert data_of(encode(np.array(["null"], object))[0]) == ["null"]


# The largest values.
