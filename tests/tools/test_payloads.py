"""What the load test sends is what the served model takes, by the server's own word and the server's own answer."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from loadtest.capacity.run import given
from loadtest.payloads import PayloadError, Served, post, values_bytes
from tests import onnx_models
from tests.process import NO_TLS, ServerProcess, free_port
from tests.server.test_oip import ELEMENT_TYPES, every_type
from tests.text_model import NAME

SIZE = 6
PATIENT = {"max_queue_wait_ms": 600_000, "request_timeout_ms": 600_000}
MODELS = {
    "every-type": every_type,
    "image": onnx_models.image,
    "lookup": onnx_models.lookup,
    "tokens": onnx_models.classifier,
}


@pytest.fixture(scope="module", params=MODELS)
def tensors(request: pytest.FixtureRequest, package: Callable[..., Path]) -> Iterator[ServerProcess]:
    with ServerProcess(package(MODELS[request.param], request.param), **PATIENT) as process:
        yield process.ready()


def test_every_request_made_for_a_tensor_model_is_answered(tensors):
    served = Served.ask(tensors.url)
    assert not served.takes_text
    for payload in served.payloads(20, SIZE):
        assert post(tensors.url, payload)[0] == 200


def test_a_text_model_is_known_for_one_and_takes_tensors_of_texts_too(server):
    served = Served.ask(server.url)
    assert (served.name, served.takes_text) == (NAME, True)
    assert [post(server.url, payload)[0] for payload in served.payloads(3, SIZE)] == [200] * 3


def test_axes_that_vary_have_one_length_in_a_request_and_every_length_up_to_the_size_in_many():
    specs = [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in ("ids", "mask")]
    payloads = Served("m", specs, []).payloads(200, SIZE)
    lengths = [len(payload.body) - int(payload.headers["Inference-Header-Content-Length"]) for payload in payloads]
    # Two inputs of eight bytes.
    assert {length // 16 for length in lengths} == set(range(1, SIZE + 1))
    assert [payload.body for payload in payloads] == [
        payload.body for payload in Served("m", specs, []).payloads(200, SIZE)
    ]


@pytest.mark.parametrize("datatype", sorted({"BOOL", "INT8", "UINT64", "FP16", "FP32", "FP64"}))
def test_numbers_become_the_bytes_that_numpy_makes_of_them(datatype):
    dtype = {"BOOL": "?", "INT8": "i1", "UINT64": "<u8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}[datatype]
    values = np.array([0, 1, 1], dtype)
    assert values_bytes({"name": "x", "datatype": datatype}, values.tolist()) == values.tobytes()


def test_every_datatype_of_the_protocol_is_known():
    for name in ELEMENT_TYPES:
        assert Served("m", [{"name": "x", "datatype": name, "shape": [2]}], []).payloads(1, SIZE)
    with pytest.raises(PayloadError, match=r"x: .* COMPLEX64"):
        Served("m", [{"name": "x", "datatype": "COMPLEX64", "shape": [2]}], []).payloads(1, SIZE)


@pytest.fixture(scope="module")
def lookup(package: Callable[..., Path]) -> Iterator[ServerProcess]:
    with ServerProcess(package(onnx_models.lookup, "lookup"), **PATIENT) as process:
        yield process.ready()


@pytest.mark.parametrize("name", ["index", "input.index"])
def test_given_inputs_are_sent_as_they_are_whatever_kind_of_number_the_file_has(lookup, tmp_path, name):
    np.savez(tmp_path / "inputs.npz", **{name: np.array([3.0, 1.0]), "output.value": np.zeros(2)})
    (payload,) = given(Served.ask(lookup.url), tmp_path / "inputs.npz").payloads
    answer = httpx.post(lookup.url + payload.path, content=payload.body, headers=payload.headers, verify=NO_TLS)
    assert answer.content.endswith(np.array([3, 1], np.float32).tobytes())


@pytest.mark.parametrize("content", [None, b"no archive", b"PK\3\4", {"other": np.zeros(1)}])
def test_a_file_that_does_not_hold_the_models_inputs_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "inputs.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        np.savez(path, **content)
    with pytest.raises(PayloadError, match=r"inputs\.npz") as caught:
        given(Served("m", [{"name": "index", "datatype": "INT64", "shape": [-1]}], []), path)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_or_knows_no_such_model_is_one_line(server):
    port = free_port()
    for url, name, says in (
        (f"http://127.0.0.1:{port}", "", str(port)),
        (server.url, "otherwise", "404.*unknown model"),
    ):
        with pytest.raises(PayloadError, match=says) as caught:
            Served.ask(url, name)
        assert "\n" not in str(caught.value)
