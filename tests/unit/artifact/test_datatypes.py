"""Names of datatypes, and strings that come as bytes."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.artifact.datatypes import DTYPES, ONNX_TYPES, Datatype, datatype_of, decode_strings
from app.errors import Invalid


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_datatype_is_named_by_its_arrays_and_once_by_onnx(datatype: Datatype) -> None:
    assert datatype_of(np.zeros(1, DTYPES[datatype])) == datatype
    assert list(ONNX_TYPES.values()).count(datatype) == 1


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([b"a"]), np.array(["a"], object)], ids=["U", "S", "O"])
def test_strings_of_any_kind_are_bytes(array: np.ndarray) -> None:
    assert datatype_of(array) == "BYTES"


def test_a_dtype_outside_the_protocol_has_no_name() -> None:
    with pytest.raises(KeyError):
        datatype_of(np.zeros(1, np.complex64))


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4, 1)])
def test_strings_are_decoded_where_they_are_bytes_and_keep_their_shape(shape: tuple[int, ...]) -> None:
    given = np.array(["é".encode(), "b", b"", "日本"], object).reshape(shape)
    decoded = decode_strings(given, "x")
    assert decoded.shape == shape
    assert decoded.ravel().tolist() == ["é", "b", "", "日本"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.binary(min_size=1, max_size=8).filter(lambda raw: not is_utf8(raw)))
def test_strings_that_are_not_utf8_are_invalid(raw: bytes) -> None:
    with pytest.raises(Invalid, match=r"^x: expected UTF-8$"):
        decode_strings(np.array(["fine", raw], object), "x")
