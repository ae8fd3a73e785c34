"""ModelInfer's messages: what goes in comes out, typed and raw; what lies is refused and breaks nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.artifact.datatypes import DATATYPES
from app.errors import BadRequest, Invalid, RequestError
from app.grpc.codec import CONTENTS, PIECE_ELEMENTS, decode_request, encode_response
from app.grpc.protocol.open_inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from app.oip.tensors import MAX_ID_CHARACTERS, MAX_RANK, MAX_STRINGS, MAX_TENSORS
from tests.server.test_tritonclient import TYPES

PLENTY = 1 << 30
EVERY = [pytest.param(name, array, id=name) for name, (_, array) in TYPES.items()]
TYPED = [each for each in EVERY if each.id != "FP16"]


def raw(array: np.ndarray) -> bytes:
    """Little-endian elements; BYTES each behind their length as uint32. Written from the protocol, not from the app."""
    if array.dtype != object:
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    items = [item.encode() for item in array.ravel()]
    return b"".join(len(item).to_bytes(4, "little") + item for item in items)


def elements(array: np.ndarray) -> list[Any]:
    return [item.encode() if isinstance(item, str) else item for item in array.ravel().tolist()]


def asking(name: str, array: np.ndarray, *, typed: bool) -> ModelInferRequest:
    """One input `x`."""
    request = ModelInferRequest(inputs=[{"name": "x", "datatype": name, "shape": array.shape}])
    if typed:
        getattr(request.inputs[0].contents, CONTENTS[name]).extend(elements(array))
    else:
        request.raw_input_contents.append(raw(array))
    return request


def respond(request: ModelInferRequest, most_bytes: int = PLENTY, **outputs: np.ndarray) -> ModelInferResponse:
    labels = ["cat", "dog", "heron"]
    encoded = encode_response(request, ("m", "1"), outputs, labels, most_bytes, by_rows=True)
    return ModelInferResponse.FromString(encoded)


@pytest.mark.parametrize(("name", "array"), EVERY)
def test_raw_contents_come_out_as_they_went_in(name, array):
    request, tensors = decode_request(asking(name, array, typed=False).SerializeToString())
    assert tensors["x"].dtype == DATATYPES[name]
    assert elements(tensors["x"]) == elements(array)
    response = respond(request, y=tensors["x"])
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == (name, [2, 2])
    assert list(response.raw_output_contents) == [raw(array)]
    assert not response.outputs[0].HasField("contents")


@pytest.mark.parametrize(("name", "array"), TYPED)
def test_typed_contents_come_out_as_they_went_in(name, array):
    request, tensors = decode_request(asking(name, array, typed=True).SerializeToString())
    assert (tensors["x"].dtype, tensors["x"].shape) == (DATATYPES[name], (2, 2))
    assert elements(tensors["x"]) == elements(array)
    response = respond(request, y=tensors["x"])
    assert list(getattr(response.outputs[0].contents, CONTENTS[name])) == elements(array)
    assert not response.raw_output_contents


@pytest.mark.parametrize("count", [1, PIECE_ELEMENTS, PIECE_ELEMENTS + 1, 3 * PIECE_ELEMENTS])
def test_what_is_converted_in_pieces_is_whole(count):
    array = np.arange(count, dtype=np.int32)
    request, tensors = decode_request(asking("INT32", array, typed=True).SerializeToString())
    np.testing.assert_array_equal(tensors["x"], array)
    assert list(respond(request, y=array).outputs[0].contents.int_contents) == array.tolist()


def test_half_floats_have_no_typed_contents_and_are_answered_raw():
    half = np.array([0.5, -2.0], np.float16)
    request = asking("FP32", np.array([1.0], np.float32), typed=True)
    response = respond(request, y=half, z=np.array([1], np.int64))
    assert list(response.raw_output_contents) == [half.tobytes(), np.array([1], np.int64).tobytes()]
    lying = ModelInferRequest(inputs=[{"name": "x", "datatype": "FP16", "shape": [1]}])
    lying.inputs[0].contents.fp32_contents.append(1.0)
    with pytest.raises(BadRequest, match="raw_input_contents"):
        decode_request(lying.SerializeToString())


def test_numbers_that_are_none_come_through():
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    request, tensors = decode_request(asking("FP32", odd, typed=True).SerializeToString())
    np.testing.assert_array_equal(tensors["x"], odd)
    np.testing.assert_array_equal(respond(request, y=odd).outputs[0].contents.fp32_contents, odd)


def tensor(**more: Any) -> dict[str, Any]:
    found = {"name": "x", "datatype": "INT8", "shape": [2], "contents": {"int_contents": [1, 2]}, **more}
    return {key: value for key, value in found.items() if value is not None}


WRONG = {
    "datatype": {"inputs": [tensor(datatype="BF16")]},
    "no datatype": {"inputs": [tensor(datatype="")]},
    "too few": {"inputs": [tensor(shape=[3])]},
    "too many": {"inputs": [tensor(shape=[1])]},
    "negative": {"inputs": [tensor(shape=[-1])]},
    "endless": {"inputs": [tensor(shape=[2**62])]},
    "endless product": {"inputs": [tensor(shape=[2**30, 2**30])]},
    "rank": {"inputs": [tensor(shape=[1] * (MAX_RANK + 1))]},
    "does not fit": {"inputs": [tensor(contents={"int_contents": [1, 128]})]},
    "does not fit, unsigned": {"inputs": [tensor(datatype="UINT8", contents={"uint_contents": [1, 256]})]},
    "another field": {"inputs": [tensor(contents={"int64_contents": [1, 2]})]},
    "one field more": {"inputs": [tensor(contents={"int_contents": [1, 2], "fp32_contents": [1.0]})]},
    "no contents": {"inputs": [tensor(contents=None)]},
    "twice": {"inputs": [tensor(), tensor()]},
    "output twice": {"inputs": [tensor()], "outputs": [{"name": "y"}, {"name": "y"}]},
    "many": {"inputs": [tensor(name=str(number)) for number in range(MAX_TENSORS + 1)]},
    "long name": {"inputs": [tensor(name="x" * 2000)]},
    "long id": {"inputs": [tensor()], "id": "x" * (MAX_ID_CHARACTERS + 1)},
    "raw and typed": {"inputs": [tensor()], "raw_input_contents": [b"\1\2"]},
    "raw of one": {"inputs": [tensor(contents=None), tensor(name="z", contents=None)], "raw_input_contents": [b"\1\2"]},
    "raw too short": {"inputs": [tensor(contents=None)], "raw_input_contents": [b"\1"]},
    "raw too long": {"inputs": [tensor(contents=None)], "raw_input_contents": [b"\1\2\3"]},
    "raw texts": {"inputs": [tensor(datatype="BYTES", contents=None)], "raw_input_contents": [b"\xff\xff\xff\xff" * 2]},
    "shared memory": {"inputs": [tensor(parameters={"shared_memory_region": InferParameter(string_param="r")})]},
}


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG.keys())
def test_what_lies_about_itself_is_refused_without_its_own_words(fields):
    with pytest.raises(BadRequest) as caught:
        decode_request(ModelInferRequest(**fields).SerializeToString())
    assert "xx" not in str(caught.value)


@pytest.mark.parametrize("shape", [[0], [2, 0]])
def test_an_input_without_elements_is_not_acceptable(shape):
    with pytest.raises(Invalid):
        decode_request(ModelInferRequest(inputs=[tensor(shape=shape)]).SerializeToString())


@pytest.mark.parametrize("contents", [{"bytes_contents": [b""] * (MAX_STRINGS + 1)}, None])
def test_more_texts_than_one_request_may_have_are_refused_before_they_are_read(contents):
    many = tensor(datatype="BYTES", shape=[MAX_STRINGS + 1], contents=contents)
    blobs = [] if contents else [bytes(4 * (MAX_STRINGS + 1))]
    with pytest.raises(Invalid, match="BYTES"):
        decode_request(ModelInferRequest(inputs=[many], raw_input_contents=blobs).SerializeToString())


@pytest.mark.parametrize("part", [b"\x2a\x00", b"\x32\x00", b"\x22\x00", b"\x3a\x00", b"\x08\x01", b"\x0d\0\0\0\0"])
def test_a_message_of_more_parts_than_any_needs_is_refused_before_they_are_made(part, monkeypatch):
    monkeypatch.setattr("app.grpc.codec.parse", lambda *_: pytest.fail("it was parsed"))
    inside = part * 20_000
    length = bytes([len(inside) & 127 | 128, len(inside) >> 7 & 127 | 128, len(inside) >> 14])
    for raw in (inside, b"\x2a" + length + inside, b"\x32" + length + inside):
        with pytest.raises(Invalid, match="at most 16384 fields"):
            decode_request(raw)


def test_a_large_message_of_few_parts_is_read_and_one_that_is_cut_is_left_to_the_parser():
    array = np.arange(100_000, dtype=np.int64).reshape(-1, 2)
    for typed in (True, False):
        whole = asking("INT64", array, typed=typed).SerializeToString()
        np.testing.assert_array_equal(decode_request(whole)[1]["x"], array)
        for cut in (len(whole) - 1, 40_000):
            with pytest.raises(BadRequest, match="ModelInferRequest"):
                decode_request(whole[:cut])
    with pytest.raises(BadRequest, match="ModelInferRequest"):
        decode_request(b"\xff" * (4 << 20))


@settings(deadline=None, derandomize=True, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_damaged_request_is_read_or_refused(data):
    array = np.array(["one", "zwölf"], np.object_)
    whole = bytearray(asking("BYTES", array, typed=data.draw(st.booleans())).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    try:
        request, tensors = decode_request(bytes(whole[:cut]))
    except RequestError:
        return
    assert len(tensors) == len(request.inputs)


OUTPUTS = {"scores": np.array([[0.1, 0.7, 0.2]], np.float32), "label": np.array(["dog"], np.object_)}


def test_outputs_come_in_the_order_asked_for_and_the_largest_values_by_name():
    classes = {"classification": InferParameter(int64_param=2)}
    request = ModelInferRequest(id="7", outputs=[{"name": "label"}, {"name": "scores", "parameters": classes}])
    response = respond(request, **OUTPUTS)
    assert (response.model_name, response.model_version, response.id) == ("m", "1", "7")
    assert [output.name for output in response.outputs] == ["label", "scores"]
    assert list(response.outputs[1].contents.bytes_contents) == [b"0.700000:1:dog", b"0.200000:2:heron"]


@pytest.mark.parametrize(
    "want",
    [
        {"name": "other"},
        {"name": "scores", "parameters": {"shared_memory_region": InferParameter(string_param="r")}},
        {"name": "scores", "parameters": {"classification": InferParameter(string_param="2")}},
        {"name": "scores", "parameters": {"classification": InferParameter()}},
        {"name": "label", "parameters": {"classification": InferParameter(uint64_param=2)}},
    ],
)
def test_an_output_that_cannot_be_had_is_refused(want):
    with pytest.raises(BadRequest):
        respond(ModelInferRequest(outputs=[want]), **OUTPUTS)


@pytest.mark.parametrize("blobs", [[], [b"x"]], ids=["typed", "raw"])
def test_an_answer_is_counted_before_it_is_made(blobs):
    request = ModelInferRequest(raw_input_contents=blobs)
    with pytest.raises(Invalid, match="at most 64 bytes"):
        respond(request, 64, y=np.zeros(1 << 10))
    with pytest.raises(Invalid, match="at most 64 bytes"):
        respond(request, 64, y=np.array(["a text"] * 12, np.object_))
