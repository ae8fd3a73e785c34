"""The Open Inference Protocol codec: what goes in comes out; what lies about itself is refused and breaks nothing."""

import json
import math
from contextlib import suppress
from typing import Any

import hypothesis.extra.numpy as npst
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from app.artifact.datatypes import DATATYPES
from app.errors import BadRequest, Invalid, RequestError
from app.http.oip.answer import encode_response
from app.http.oip.codec import InferRequest, RequestParameters, decode_tensors, split_body
from app.http.oip.json_data import PIECE_BYTES
from app.http.request import decode_json
from app.oip.tensors import MAX_STRINGS

DECODER = msgspec.json.Decoder(InferRequest)
PLENTY = 1 << 30
FLOATS, INTEGERS = ("FP16", "FP32", "FP64"), tuple(n for n, d in DATATYPES.items() if d.kind in "iu")
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=3)

# The same examples in every run, and no verdict that depends on how busy the machine is.
repeatable = settings(deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def arrays(datatype: str, *, finite: bool = False) -> st.SearchStrategy[np.ndarray]:
    """Arrays of every shape; for JSON, which has neither infinities nor bytes, `finite` numbers and text."""
    elements: st.SearchStrategy[Any] | None = None
    if datatype == "BYTES":
        elements = st.text(st.characters(codec="utf-8"), max_size=8) if finite else st.binary(max_size=12)
    elif finite and datatype in FLOATS:
        width = DATATYPES[datatype].itemsize * 8
        elements = st.floats(width=width, allow_nan=False, allow_infinity=False)
    return npst.arrays(DATATYPES[datatype], SHAPES, elements=elements, fill=st.nothing())


named_arrays = st.sampled_from(sorted(DATATYPES)).flatmap(lambda name: st.tuples(st.just(name), arrays(name)))
finite_arrays = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda name: st.tuples(st.just(name), arrays(name, finite=True))
)


def to_wire(datatype: str, array: np.ndarray) -> bytes:
    """Little-endian elements; BYTES each behind their length as uint32. Written from the protocol, not from the app."""
    if datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in array.ravel())
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def from_wire(datatype: str, shape: list[int], raw: bytes) -> np.ndarray:
    """The other way round."""
    if datatype != "BYTES":
        return np.frombuffer(raw, DATATYPES[datatype].newbyteorder("<")).reshape(shape)
    items = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        items.append(raw[4:end])
        raw = raw[end:]
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def binary_request(tensors: list[tuple[str, np.ndarray]], **extra: Any) -> tuple[bytes, bytes]:
    """The JSON part and the binary part of a request with inputs t0, t1, …"""
    blobs = [to_wire(datatype, array) for datatype, array in tensors]
    inputs = [
        {
            "name": f"t{index}",
            "shape": list(array.shape),
            "datatype": datatype,
            "parameters": {"binary_data_size": len(blob)},
        }
        for index, ((datatype, array), blob) in enumerate(zip(tensors, blobs, strict=True))
    ]
    return json.dumps({"inputs": inputs, **extra}).encode(), b"".join(blobs)


def decode(body: bytes, header_length: int | str | None = None) -> dict[str, np.ndarray]:
    """A body through the codec, as the infer route does it."""
    length = None if header_length is None else str(header_length)
    head, binary = split_body(body, length)
    return decode_tensors(decode_json(head, DECODER), binary)


def decode_one(datatype: str, shape: Any, data: Any = None, *, binary: bytes = b"", **parameters: Any) -> np.ndarray:
    """One input `x` through the codec."""
    spec = {"name": "x", "shape": shape, "datatype": datatype, "parameters": parameters}
    head = json.dumps({"inputs": [spec if data is None else {**spec, "data": data}]}).encode()
    return decode(head + binary, len(head))["x"]


def same(expected: np.ndarray, found: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit of every number."""
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return False
    if expected.dtype == np.object_:
        return expected.tolist() == found.tolist()
    return expected.tobytes() == found.tobytes()


# What goes in comes out.


@repeatable
@given(st.lists(named_arrays, min_size=1, max_size=4))
def test_binary_inputs_of_every_datatype_and_shape_arrive_bit_by_bit(tensors):
    head, binary = binary_request(tensors)
    found = decode(head + binary, len(head))
    assert list(found) == [f"t{index}" for index in range(len(tensors))]
    assert all(same(array, found[f"t{index}"]) for index, (_, array) in enumerate(tensors))


@repeatable
@given(finite_arrays, st.booleans())
def test_json_inputs_of_every_datatype_and_shape_arrive_whether_flat_or_nested(tensor, nested):
    datatype, array = tensor
    assume(not nested or array.ndim)
    data = array.tolist() if nested else array.ravel().tolist()
    assert same(array, decode_one(datatype, list(array.shape), data))


@repeatable
@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), named_arrays, min_size=1))
def test_binary_outputs_of_every_datatype_and_shape_leave_bit_by_bit(tensors):
    request = InferRequest([], parameters=RequestParameters(binary_data_output=True))
    outputs = {name: array for name, (_, array) in tensors.items()}
    body, header_length = encode_response(request, "m", "1", outputs, PLENTY)
    header = json.loads(body[:header_length])
    offset = header_length
    assert [output["name"] for output in header["outputs"]] == list(tensors)
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        datatype, array = tensors[output["name"]]
        assert output["datatype"] == datatype
        assert same(array, from_wire(datatype, output["shape"], body[offset : offset + size]))
        offset += size
    assert offset == len(body)


@repeatable
@given(finite_arrays)
def test_json_outputs_of_every_datatype_and_shape_leave_unchanged(tensor):
    datatype, array = tensor
    body, header_length = encode_response(InferRequest([], id="seven"), "m", "1", {"y": array}, PLENTY)
    answer = json.loads(body)
    (output,) = answer["outputs"]
    assert header_length is None
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1", "seven")
    assert (output["name"], output["datatype"]) == ("y", datatype)
    assert same(array, np.array(output["data"], array.dtype).reshape(output["shape"]))


@repeatable
@given(st.lists(finite_arrays, min_size=1, max_size=4), st.data())
def test_requested_outputs_come_in_the_order_asked_for_each_in_its_own_format(tensors, data):
    names = [f"t{index}" for index in range(len(tensors))]
    wanted = data.draw(st.lists(st.tuples(st.sampled_from(names), st.booleans()), min_size=1, unique_by=lambda w: w[0]))
    asked = [{"name": name, "parameters": {"binary_data": binary}} for name, binary in wanted]
    request = DECODER.decode(json.dumps({"inputs": [], "outputs": asked}))
    outputs = dict(zip(names, (array for _, array in tensors), strict=True))
    body, header_length = encode_response(request, "m", "1", outputs, PLENTY)
    header = json.loads(body[:header_length])
    assert [output["name"] for output in header["outputs"]] == [name for name, _ in wanted]
    assert ["data" not in output for output in header["outputs"]] == [binary for _, binary in wanted]
    assert (header_length is None) == (not any(binary for _, binary in wanted))


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_an_input_without_elements_is_invalid_in_either_format(datatype):
    for shape, data in (([0, 3], []), ([2, 0], [[], []]), ([1 << 40, 0], []), ([0], None)):
        with pytest.raises(Invalid, match="expected no size of 0"):
            decode_one(datatype, shape, data, **({} if data is not None else {"binary_data_size": 0}))


@repeatable
@given(st.integers(0, 7))
def test_numbers_are_usable_wherever_in_the_body_they_start(padding):
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    head, binary = binary_request([("FP64", array)])
    head += b" " * padding
    found = decode(head + binary, len(head))["t0"]
    assert found.flags.aligned
    assert found.flags.c_contiguous
    assert same(array, found)


def test_any_byte_but_zero_is_true():
    assert decode_one("BOOL", [4], binary=b"\0\1\2\xff", binary_data_size=4).tolist() == [False, True, True, True]


def test_binary_and_json_inputs_may_be_mixed_in_any_order():
    head = json.dumps(
        {
            "inputs": [
                {"name": "a", "shape": [1], "datatype": "INT8", "parameters": {"binary_data_size": 1}},
                {"name": "b", "shape": [1], "datatype": "INT8", "data": [5]},
                {"name": "c", "shape": [1], "datatype": "INT8", "parameters": {"binary_data_size": 1}},
            ]
        }
    ).encode()
    found = decode(head + b"\4\6", len(head))
    assert {name: array.tolist() for name, array in found.items()} == {"a": [4], "b": [5], "c": [6]}


# What lies about itself is refused.


@repeatable
@given(st.lists(named_arrays, min_size=1, max_size=3), st.data())
def test_a_body_cut_anywhere_is_a_bad_request(tensors, data):
    head, binary = binary_request(tensors)
    body = head + binary
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(BadRequest):
        decode(body[:cut], min(len(head), cut))


@repeatable
@given(st.lists(named_arrays, min_size=1, max_size=3), st.binary(min_size=1, max_size=9))
def test_bytes_after_the_last_tensor_are_a_bad_request(tensors, more):
    head, binary = binary_request(tensors)
    with pytest.raises(BadRequest):
        decode(head + binary + more, len(head))


@repeatable
@given(st.lists(named_arrays, min_size=1, max_size=3), st.data())
def test_a_header_length_that_lies_is_a_bad_request(tensors, data):
    head, binary = binary_request(tensors)
    body = head + binary
    lie = data.draw(st.integers(0, len(body) + 50).filter(lambda length: length != len(head)))
    with pytest.raises(BadRequest):
        decode(body, lie)


@pytest.mark.parametrize("beyond", [1, 1000])
def test_a_header_length_beyond_the_body_is_a_bad_request_even_if_the_body_is_all_json(beyond):
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":[1]}]}'
    assert decode(body, len(body))["x"].tolist() == [1]
    with pytest.raises(BadRequest):
        decode(body, len(body) + beyond)


@repeatable
@given(named_arrays.filter(lambda tensor: tensor[1].size))
def test_binary_tensors_without_a_header_length_are_a_bad_request(tensor):
    head, binary = binary_request([tensor])
    with pytest.raises(BadRequest):
        decode(head + binary)


@repeatable
@given(st.text(st.characters(max_codepoint=0x2FFF), max_size=30))
@example("-1")
@example("+5")
@example("1_0")
@example(" 10")
@example("1e1")
@example("²")
@example("٣")
@example("9" * 5000)
@example("")
def test_a_header_length_that_is_no_length_is_a_bad_request(text):
    assume(not (text.isascii() and text.isdigit() and len(text) < 6))
    with pytest.raises(BadRequest):
        split_body(b"x" * 10, text)


@repeatable
@given(
    st.sampled_from(sorted(DATATYPES)).flatmap(lambda n: st.tuples(st.just(n), arrays(n))),
    st.one_of(
        st.integers(),
        st.booleans(),
        st.floats(),
        st.text(max_size=3),
        st.lists(st.integers(), max_size=2),
        st.just({}),
    ),
)
@example(("INT8", np.zeros(1, np.int8)), 10**400)
@example(("INT8", np.zeros(1, np.int8)), True)
@example(("INT8", np.zeros(1, np.int8)), 1.0)
@example(("INT8", np.zeros(1, np.int8)), -1)
def test_a_binary_data_size_that_lies_is_a_bad_request(tensor, lie):
    datatype, array = tensor
    binary = to_wire(datatype, array)
    assume(type(lie) is not int or lie != len(binary))
    # JSON has no infinities, and Python writes them all the same.
    assume(type(lie) is not float or math.isfinite(lie))
    with pytest.raises((BadRequest, Invalid)):
        decode_one(datatype, list(array.shape), binary=binary, binary_data_size=lie)


@repeatable
@given(st.lists(st.binary(max_size=9), min_size=1, max_size=4), st.data())
def test_a_bytes_element_that_lies_about_its_length_is_a_bad_request(items, data):
    index = data.draw(st.integers(0, len(items) - 1))
    lie = data.draw(st.integers(0, 2**32 - 1).filter(lambda length: length != len(items[index])))
    lengths = [lie if place == index else len(item) for place, item in enumerate(items)]
    binary = b"".join(n.to_bytes(4, "little") + item for n, item in zip(lengths, items, strict=True))
    # A lie may by chance still describe as many elements and end where the tensor ends: then it is no lie.
    honest, offset = 0, 0
    while honest < len(items) and offset + 4 <= len(binary):
        offset += 4 + int.from_bytes(binary[offset : offset + 4], "little")
        honest += 1
    assume((honest, offset) != (len(items), len(binary)))
    with pytest.raises(BadRequest):
        decode_one("BYTES", [len(items)], binary=binary, binary_data_size=len(binary))


@repeatable
@given(named_arrays, SHAPES)
def test_a_shape_of_another_size_is_a_bad_request(tensor, shape):
    datatype, array = tensor
    assume(math.prod(shape) != array.size)
    binary = to_wire(datatype, array)
    with pytest.raises(BadRequest):
        decode_one(datatype, list(shape), binary=binary, binary_data_size=len(binary))


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
@pytest.mark.parametrize(
    "shape",
    [
        [-1],
        [2**31 - 1],
        [2**62, 4],
        [2**63],
        [10**30],
        [0, 10**30],
        [0, 2**40, 2**40],
        [10**3000, 10**3000],
        [0, 10**4000],
        [1] * 65,
        [1] * 5000,
    ],
    ids=lambda shape: f"{len(shape)}-sizes-up-to-{len(str(max(shape)))}-digits",
)
def test_a_shape_that_no_tensor_can_have_is_a_bad_request(datatype, shape):
    value = {"FP32": 1.0, "BYTES": "word", "BOOL": True}[datatype]
    data = [] if 0 in shape else [value]
    with pytest.raises((BadRequest, Invalid)):
        decode_one(datatype, shape, data)
    binary = b"" if 0 in shape else to_wire(datatype, np.array([b"word" if value == "word" else value]))
    with pytest.raises((BadRequest, Invalid)):
        decode_one(datatype, shape, binary=binary, binary_data_size=len(binary))


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 2], [[1, 2], [3]]),
        ([2, 2], [[1, 2, 3, 4]]),
        ([2, 2], [[1, 2, 3], [4]]),
        ([2, 2, 1], [[[1], [2]], [[3, 4], []]]),
        ([2, 2], [[1], [2], [3], [4]]),
        ([2, 2], [[1, 2], 3, 4]),
        ([2, 2], [1, 2, [3, 4]]),
        ([2, 2], [[[1, 2], [3, 4]]]),
        ([4], [[1, 2, 3, 4]]),
        ([2, 2], [1, 2, 3]),
        ([1], []),
        ([], []),
        ([], [[1]]),
    ],
    ids=str,
)
def test_data_nested_in_another_way_than_the_shape_is_a_bad_request(shape, data):
    with pytest.raises(BadRequest):
        decode_one("INT32", shape, data)


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("value", [1.5, 1.0, True, "1", None, [1], {}, 1e300, 10**400])
def test_an_integer_tensor_takes_only_integers(datatype, value):
    with pytest.raises(BadRequest):
        decode_one(datatype, [2], [1, value])


@pytest.mark.parametrize("datatype", INTEGERS)
def test_an_integer_tensor_takes_its_limits_and_nothing_beyond(datatype):
    limits = np.iinfo(DATATYPES[datatype])
    assert decode_one(datatype, [2], [int(limits.min), int(limits.max)]).tolist() == [limits.min, limits.max]
    for beyond in (int(limits.min) - 1, int(limits.max) + 1):
        with pytest.raises(BadRequest):
            decode_one(datatype, [2], [0, beyond])


@pytest.mark.parametrize("datatype", FLOATS)
@pytest.mark.parametrize("value", [True, "1.0", None, [1.0], {}, 10**400])
def test_a_float_tensor_takes_only_numbers(datatype, value):
    with pytest.raises(BadRequest):
        decode_one(datatype, [2], [1.0, value])


@pytest.mark.parametrize(("datatype", "value"), [("FP16", 70000), ("FP16", -7e4), ("FP32", 1e300), ("FP32", 10**50)])
def test_a_number_too_large_for_its_float_type_is_refused_instead_of_becoming_infinite(datatype, value):
    with pytest.raises(BadRequest):
        decode_one(datatype, [1], [value])


@pytest.mark.parametrize("datatype", FLOATS)
def test_a_float_tensor_takes_whole_numbers(datatype):
    assert decode_one(datatype, [2], [3, -4]).tolist() == [3.0, -4.0]


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("BOOL", 0), ("BOOL", 1), ("BOOL", "true"), ("BOOL", 1.0), ("BYTES", 1), ("BYTES", None), ("BYTES", True)],
)
def test_flags_and_strings_take_only_their_own_kind(datatype, value):
    with pytest.raises(BadRequest):
        decode_one(datatype, [1], [value])


@pytest.mark.parametrize("datatype", ["", "fp32", "FLOAT", "STRING", "BF16", "INT128", "FP32 "])
def test_an_unknown_datatype_is_a_bad_request(datatype):
    with pytest.raises(BadRequest):
        decode_one(datatype, [1], [1])


def test_an_input_must_say_where_its_data_are_and_only_once():
    with pytest.raises(BadRequest):
        decode_one("INT8", [1])
    with pytest.raises(BadRequest):
        decode_one("INT8", [1], [1], binary=b"\1", binary_data_size=1)


def test_a_name_given_twice_is_a_bad_request():
    spec = {"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}
    with pytest.raises(BadRequest):
        decode(json.dumps({"inputs": [spec, spec]}).encode())


@pytest.mark.parametrize("value", ["region", 1, None, []])
def test_shared_memory_is_refused_and_not_ignored(value):
    asked = {"shared_memory_region": value}
    with pytest.raises(BadRequest):
        decode_one("INT8", [1], [1], **asked)
    request = DECODER.decode(json.dumps({"inputs": [], "outputs": [{"name": "y", "parameters": asked}]}))
    with pytest.raises(BadRequest):
        encode_response(request, "m", "1", {"y": np.zeros(1)}, PLENTY)


def test_an_output_that_the_model_does_not_have_is_a_bad_request():
    request = DECODER.decode(b'{"inputs": [], "outputs": [{"name": "quixotry"}]}')
    with pytest.raises(BadRequest) as refused:
        encode_response(request, "m", "1", {"y": np.zeros(1)}, PLENTY)
    assert "quixotry" not in str(refused.value)


# What costs more than its bytes.


def numbers_beyond_one_piece(datatype: str) -> np.ndarray:
    values = np.arange(3 * PIECE_BYTES).reshape(3, -1, 4) % 100
    return (values * 1.25 if datatype in FLOATS else values % 2 if datatype == "BOOL" else values).astype(
        DATATYPES[datatype]
    )


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BYTES"])
def test_numbers_that_are_parsed_in_pieces_arrive_whole_and_in_order(datatype, nested):
    array = numbers_beyond_one_piece(datatype)
    data = array.tolist() if nested else array.ravel().tolist()
    assert same(array, decode_one(datatype, list(array.shape), data))


@pytest.mark.parametrize("place", [0, 20_000, -1])
@pytest.mark.parametrize("value", [True, "1", None, [1], 10**30, 1.5])
def test_one_wrong_element_in_any_piece_is_a_bad_request(place, value):
    data = [1] * 40_000
    data[place] = value
    with pytest.raises(BadRequest):
        decode_one("INT32", [40_000], data)


@pytest.mark.parametrize(
    ("shape", "data"), [([3], "[1 ,\n 2, 3 ]"), ([1, 3], "[[1, 2, 3]]"), ([3, 1], " [\t[1] ,[2],[3]]")]
)
def test_blanks_between_numbers_mean_nothing(shape, data):
    body = f'{{"inputs": [{{"name": "x", "datatype": "INT8", "shape": {shape}, "data": {data}}}]}}'
    assert decode(body.encode())["x"].ravel().tolist() == [1, 2, 3]


@pytest.mark.parametrize("data", ["{}", '"text"', "1", "null", "true", '{"a": [1]}'])
@pytest.mark.parametrize("datatype", ["INT8", "FP32", "BYTES", "BOOL"])
def test_data_that_are_no_list_are_a_bad_request(datatype, data):
    body = f'{{"inputs": [{{"name": "x", "datatype": "{datatype}", "shape": [1], "data": {data}}}]}}'
    with pytest.raises(BadRequest):
        decode(body.encode())


MANY = MAX_STRINGS + 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [%s]}' % b",".join([b'{"name":"a","datatype":"INT8","shape":[1],"data":[1]}'] * 14_000),
        b'{"inputs": [], "outputs": [%s]}' % b",".join([b'{"name":""}'] * 33_000),
        b'{"inputs": [], "parameters": {%s}}' % b",".join([b'"timeout":1'] * MANY),
        b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [%d], "data": [%s]}]}'
        % (MANY, b",".join([b'""'] * MANY)),
        b'{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": [%s]}]}'
        % b",".join([b'"\\\\"'] * MANY * 2),
    ],
    ids=["inputs", "outputs", "a parameter", "strings", "strings that end in a backslash"],
)
def test_more_strings_than_anybody_needs_are_refused_before_they_are_made(body):
    with pytest.raises(Invalid, match="strings in JSON"):
        decode(body)


def test_marks_within_a_text_are_no_strings():
    text = '"[{,' * 100_000
    assert decode_one("BYTES", [1], [text]).tolist() == [text]


def test_more_binary_strings_than_anybody_needs_are_refused():
    with pytest.raises(Invalid, match="BYTES elements"):
        decode_one("BYTES", [MANY], binary=bytes(4 * MANY), binary_data_size=4 * MANY)
    head, binary = binary_request([("BYTES", np.array([b""] * (MANY // 2 + 1), object))] * 2)
    with pytest.raises(Invalid, match="BYTES elements"):
        decode(head + binary, len(head))
    assert decode_one("BYTES", [MANY - 1], binary=bytes(4 * MANY - 4), binary_data_size=4 * MANY - 4).size == MANY - 1


def test_lists_of_nothing_are_refused_before_they_are_made():
    with pytest.raises(BadRequest, match="lists"):
        decode_one("BYTES", [1, 1], [[]] * MANY)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_more_tensors_than_any_model_has_are_a_bad_request(kind):
    spec = {"datatype": "INT8", "shape": [1], "data": [1]}
    content = {"inputs": [], kind: [{"name": str(index), **spec} for index in range(1025)]}
    with pytest.raises(BadRequest, match=f"{kind}: expected at most 1024"):
        decode(json.dumps(content).encode())


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_name_longer_than_any_is_a_bad_request_and_does_not_come_back(kind):
    content = {"inputs": [], kind: [{"name": "n" * 1025, "datatype": "INT8", "shape": [1], "data": [1]}]}
    with pytest.raises(BadRequest, match="characters") as refused:
        decode(json.dumps(content).encode())
    assert len(str(refused.value)) < 200


def test_a_shape_nested_to_no_end_is_a_bad_request_and_costs_no_more_than_its_bytes():
    # As lists it would be a gigabyte.
    with pytest.raises(BadRequest):
        decode_one("INT8", [100_000, *[1] * 63], [[1]] * 100_000)


# Whatever comes, the answer is tensors or a refusal.


def expect_answer_or_refusal(body: bytes, header_length: int | str | None) -> None:
    """Any exception outside the error family fails the test: a client would see 500."""
    with suppress(BadRequest, Invalid):
        head, binary = split_body(body, None if header_length is None else str(header_length))
        request = decode_json(head, DECODER)
        assert all(isinstance(array, np.ndarray) for array in decode_tensors(request, binary).values())
        encode_response(request, "m", "1", {"y": np.zeros(2), "z": np.array(["word"], object)}, PLENTY)


@repeatable
@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 220)))
def test_random_bytes_never_break_the_codec(body, header_length):
    expect_answer_or_refusal(body, header_length)


@repeatable
@given(st.lists(named_arrays, min_size=1, max_size=2), st.data())
def test_flipped_bytes_never_break_the_codec(tensors, data):
    head, binary = binary_request(tensors, id="x", outputs=[{"name": "y"}])
    body = bytearray(head + binary)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    expect_answer_or_refusal(bytes(body), len(head))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**40, 10**400, 10**4200, -(10**400)]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
)
any_json = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """`usual`, and once in a while anything: were every part odd, the first check would hide the others."""
    return st.integers(0, 9).flatmap(lambda draw: usual if draw else any_json)


sizes = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 2**40, 2**63, 10**30, 10**3000])
inputs = st.fixed_dictionaries(
    {
        "name": mostly(st.text(max_size=3)),
        "shape": mostly(st.lists(sizes, max_size=4) | st.lists(st.just(1), max_size=80)),
        "datatype": mostly(st.sampled_from(sorted(DATATYPES))),
    },
    optional={
        "data": mostly(st.lists(st.integers(0, 1), max_size=2) | st.lists(st.floats(width=16), max_size=2)),
        "parameters": mostly(st.fixed_dictionaries({}, optional={"binary_data_size": mostly(st.integers(0, 9))})),
    },
)
outputs = st.fixed_dictionaries(
    {"name": mostly(st.sampled_from("yz"))},
    optional={"parameters": mostly(st.fixed_dictionaries({"binary_data": mostly(st.booleans())}))},
)
requests = st.fixed_dictionaries(
    {"inputs": mostly(st.lists(mostly(inputs), max_size=2))},
    optional={
        "id": mostly(st.text(max_size=3)),
        "parameters": mostly(st.fixed_dictionaries({"binary_data_output": mostly(st.booleans())})),
        "outputs": mostly(st.lists(mostly(outputs), max_size=3)),
    },
)


@settings(repeatable, max_examples=500)
@given(requests, st.binary(max_size=9))
def test_well_formed_json_of_any_content_never_breaks_the_codec(content, binary):
    head = json.dumps(content).encode()
    expect_answer_or_refusal(head + binary, len(head))


@pytest.mark.parametrize(
    "opening", [b"[", b'{"inputs":', b'{"inputs":[{"name":"x","shape":[1],"datatype":"INT8","data":[[']
)
def test_json_nested_beyond_any_use_is_a_bad_request(opening):
    with pytest.raises(RequestError):
        decode(opening * 50_000)
    with pytest.raises(BadRequest):
        decode(b'{"inputs":[],"parameters":{"x":' + b"[" * 100_000)


@pytest.mark.parametrize("escape", [rb"\ud800", rb"\udfff", rb"\ud800\u0041"])
def test_text_with_half_a_surrogate_pair_is_refused(escape):
    body = b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["' + escape + b'"]}]}'
    with pytest.raises(RequestError):
        decode(body)
