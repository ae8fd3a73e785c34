"""The public `tritonclient`, as published, drives the server: the gevent client and the asyncio client alike.

Both run in a process of their own, so that gevent's event loop never meets the other tests.
"""

import asyncio
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import onnx_models
from tests.process import ServerProcess
from tests.text_model import NAME

TYPES = {
    "BOOL": (TensorProto.BOOL, np.array([[True, False], [False, True]])),
    "UINT8": (TensorProto.UINT8, np.array([[0, 255], [1, 2]], np.uint8)),
    "UINT16": (TensorProto.UINT16, np.array([[0, 65535], [1, 2]], np.uint16)),
    "UINT32": (TensorProto.UINT32, np.array([[0, 2**32 - 1], [1, 2]], np.uint32)),
    "UINT64": (TensorProto.UINT64, np.array([[0, 2**64 - 1], [1, 2]], np.uint64)),
    "INT8": (TensorProto.INT8, np.array([[-128, 127], [1, 2]], np.int8)),
    "INT16": (TensorProto.INT16, np.array([[-32768, 32767], [1, 2]], np.int16)),
    "INT32": (TensorProto.INT32, np.array([[-(2**31), 2**31 - 1], [1, 2]], np.int32)),
    "INT64": (TensorProto.INT64, np.array([[-(2**63), 2**63 - 1], [1, 2]], np.int64)),
    "FP16": (TensorProto.FLOAT16, np.array([[0.1, -65504], [0.0, 2.5]], np.float16)),
    "FP32": (TensorProto.FLOAT, np.array([[0.1, -3e38], [0.0, 2.5]], np.float32)),
    "FP64": (TensorProto.DOUBLE, np.array([[0.1, -1e308], [0.0, 2.5]], np.float64)),
    "BYTES": (TensorProto.STRING, np.array([["one", "zwölf ☀"], ["", "a longer one"]], np.object_)),
}


def every_type(path: Path) -> Path:
    """x_T [rows, 2] → y_T [rows, 2], unchanged, for every datatype T."""
    return onnx_models.save(
        path,
        [helper.make_node("Identity", [f"x_{name}"], [f"y_{name}"]) for name in TYPES],
        [onnx_models.tensor(f"x_{name}", ["rows", 2], kind) for name, (kind, _) in TYPES.items()],
        [onnx_models.tensor(f"y_{name}", ["rows", 2], kind) for name, (kind, _) in TYPES.items()],
    )


# In the client's process: plain functions of plain values, since neither client objects nor its errors can be sent.


@dataclass
class Answer:
    """An InferResult: the response's JSON part, and its outputs as the client makes arrays of them."""

    response: dict
    arrays: dict[str, np.ndarray]


@dataclass
class Refusal:
    """An InferenceServerException."""

    message: str
    status: str


@dataclass
class Call:
    """One inference. `inputs`: arrays by name; `outputs`: name and whether in binary, or None to ask for none.

    `classes`: how many of the largest values to ask for in the place of all; 0 for all.
    """

    model: str
    inputs: dict[str, np.ndarray]
    binary: bool = True
    outputs: list[tuple[str, bool]] | None = None
    classes: int = 0
    more: dict[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the client's `infer`."""
        from tritonclient.http import InferInput, InferRequestedOutput
        from tritonclient.utils import np_to_triton_dtype

        inputs = []
        for name, array in self.inputs.items():
            tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            inputs.append(tensor.set_data_from_numpy(array, binary_data=self.binary))
        wanted = self.outputs and [
            InferRequestedOutput(name, binary_data=binary, class_count=self.classes) for name, binary in self.outputs
        ]
        return {"model_name": self.model, "inputs": inputs, "outputs": wanted, **(self.more or {})}


def answer_of(result: Any) -> Answer:
    response = result.get_response()
    return Answer(response, {output["name"]: result.as_numpy(output["name"]) for output in response["outputs"]})


def sync_call(url: str, method: str, args: tuple, kwargs: dict) -> Any:
    """A method of the gevent client: its value, or Refusal."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(url) as client:
        try:
            return getattr(client, method)(*args, **kwargs)
        except InferenceServerException as error:
            return Refusal(error.message(), error.status())


def sync_infer(url: str, call: Call) -> Answer | Refusal:
    """`infer` of the gevent client."""
    result = sync_call(url, "infer", (), call.arguments())
    return result if isinstance(result, Refusal) else answer_of(result)


def sync_infer_all(url: str, calls: list[Call]) -> list[Answer | Refusal]:
    """`async_infer` of the gevent client: all sent before the first is waited for."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    answers: list[Answer | Refusal] = []
    with InferenceServerClient(url, concurrency=len(calls)) as client:
        for sent in [client.async_infer(**call.arguments()) for call in calls]:
            try:
                answers.append(answer_of(sent.get_result()))
            except InferenceServerException as error:
                answers.append(Refusal(error.message(), error.status()))
    return answers


async def _awaited(client: Any, method: str, args: tuple, kwargs: dict) -> Any:
    from tritonclient.utils import InferenceServerException

    try:
        return await getattr(client, method)(*args, **kwargs)
    except InferenceServerException as error:
        return Refusal(error.message(), error.status())


def aio_call(url: str, method: str, args: tuple, kwargs: dict) -> Any:
    """A method of the asyncio client: its value, or Refusal."""
    from tritonclient.http.aio import InferenceServerClient

    async def use() -> Any:
        async with InferenceServerClient(url) as client:
            return await _awaited(client, method, args, kwargs)

    return asyncio.run(use())


def aio_infer(url: str, call: Call) -> Answer | Refusal:
    """`infer` of the asyncio client."""
    return aio_infer_all(url, [call])[0]


def aio_infer_all(url: str, calls: list[Call]) -> list[Answer | Refusal]:
    """`infer` of the asyncio client, many at once."""
    from tritonclient.http.aio import InferenceServerClient

    async def use() -> list[Any]:
        async with InferenceServerClient(url) as client:
            return await asyncio.gather(*(_awaited(client, "infer", (), call.arguments()) for call in calls))

    results = asyncio.run(use())
    return [result if isinstance(result, Refusal) else answer_of(result) for result in results]


CLIENTS = {"gevent": (sync_call, sync_infer, sync_infer_all), "asyncio": (aio_call, aio_infer, aio_infer_all)}


# In this process.


class Client:
    """One of the two clients, at work elsewhere."""

    def __init__(self, pool: ProcessPoolExecutor, kind: str, urls: dict[str, str]) -> None:
        self._pool = pool
        self._call, self._infer, self._infer_all = CLIENTS[kind]
        self._urls = urls

    def call(self, server: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Any method but those that infer."""
        return self._pool.submit(self._call, self._urls[server], method, args, kwargs).result()

    def infer(self, model: str, inputs: dict[str, np.ndarray], **how: Any) -> Answer:
        """An inference that is answered."""
        answer = self.try_infer(model, inputs, **how)
        assert isinstance(answer, Answer), answer
        return answer

    def try_infer(self, model: str, inputs: dict[str, np.ndarray], *, to: str | None = None, **how: Any) -> Any:
        """An inference, answered or refused; `to` names a server other than the model's own."""
        return self._pool.submit(self._infer, self._urls[to or model], Call(model, inputs, **how)).result()

    def infer_all(self, model: str, all_inputs: list[dict[str, np.ndarray]]) -> list[Any]:
        """Many at the same time."""
        return self._pool.submit(
            self._infer_all, self._urls[model], [Call(model, inputs) for inputs in all_inputs]
        ).result()


@pytest.fixture(scope="module")
def urls(package: Callable[..., Path]) -> Iterator[dict[str, str]]:
    """Where each model is served, by the model's name."""
    folders = {
        "two": package(onnx_models.two_outputs, "two", "12"),
        "types": package(every_type, "types"),
        "lookup": package(onnx_models.lookup, "lookup"),
    }
    with ExitStack() as stack:
        patient = {"request_timeout_ms": 300_000}
        processes = {name: stack.enter_context(ServerProcess(folder, **patient)) for name, folder in folders.items()}
        processes[NAME] = stack.enter_context(ServerProcess(**patient))
        yield {name: process.ready().url.removeprefix("http://") for name, process in processes.items()}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(params=list(CLIENTS))
def client(request: pytest.FixtureRequest, pool: ProcessPoolExecutor, urls: dict[str, str]) -> Client:
    return Client(pool, request.param, urls)


def two_inputs(rows: int = 1) -> dict[str, np.ndarray]:
    a = np.arange(rows * 2, dtype=np.int64).reshape(rows, 2)
    return {"a": a, "b": np.full((rows, 2), 0.5, np.float32)}


def strings(*rows: str | bytes) -> dict[str, np.ndarray]:
    return {"text": np.array(rows, np.object_)}


def test_a_ready_server_is_live_and_ready(client):
    assert client.call("two", "is_server_live") is True
    assert client.call("two", "is_server_ready") is True


@pytest.mark.parametrize(("name", "version", "ready"), [("two", "", True), ("two", "12", True), ("two", "13", False)])
def test_a_model_is_ready_in_the_version_that_is_served(client, name, version, ready):
    assert client.call("two", "is_model_ready", name, version) is ready


def test_an_unknown_model_is_not_ready(client):
    assert client.call("two", "is_model_ready", "otherwise") is False


def test_the_server_names_itself(client):
    metadata = client.call("two", "get_server_metadata")
    assert metadata["name"]
    assert metadata["version"]
    assert "binary_tensor_data" in metadata["extensions"]


@pytest.mark.parametrize("version", ["", "12"])
def test_a_models_metadata_say_what_to_send(client, version):
    metadata = client.call("two", "get_model_metadata", "two", version)
    assert (metadata["name"], metadata["versions"]) == ("two", ["12"])
    assert {spec["name"]: (spec["datatype"], spec["shape"]) for spec in metadata["inputs"]} == {
        "a": ("INT64", [-1, 2]),
        "b": ("FP32", [-1, 2]),
    }
    assert [spec["name"] for spec in metadata["outputs"]] == ["total", "largest"]


@pytest.mark.parametrize("version", ["", "12"])
def test_a_models_configuration_says_how_it_batches(client, version):
    config = client.call("two", "get_model_config", "two", version)
    assert config["name"] == "two"
    assert config["max_batch_size"] > 1
    assert [(spec["name"], spec["data_type"], spec["dims"]) for spec in config["input"]] == [
        ("a", "TYPE_INT64", [2]),
        ("b", "TYPE_FP32", [2]),
    ]


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_what_is_asked_of_an_unknown_model_raises_the_clients_exception(client, method):
    refusal = client.call("two", method, "otherwise")
    assert isinstance(refusal, Refusal)
    assert refusal.status == "404"
    assert "unknown model" in refusal.message


def test_statistics_go_up_with_every_inference(client):
    def success() -> int:
        (model,) = client.call("two", "get_inference_statistics", "two")["model_stats"]
        assert (model["name"], model["version"]) == ("two", "12")
        return model["inference_stats"]["success"]["count"]

    before = success()
    client.infer("two", two_inputs())
    assert success() == before + 1


def test_statistics_of_all_models_are_those_of_the_one_there_is(client):
    assert [model["name"] for model in client.call("two", "get_inference_statistics")["model_stats"]] == ["two"]


@pytest.mark.parametrize("args", [(), ("two",), ("two", "12")])
def test_statistics_have_the_parts_that_the_clients_tools_add_up(client, args):
    client.infer("two", two_inputs())
    (model,) = client.call("two", "get_inference_statistics", *args)["model_stats"]
    parts = [model["inference_stats"][name] for name in ("queue", "compute_input", "compute_infer", "compute_output")]
    assert {part["count"] for part in parts} == {model["inference_stats"]["success"]["count"]}
    assert model["inference_stats"]["cache_hit"] == model["inference_stats"]["cache_miss"] == {"count": 0, "ns": 0}


def test_statistics_of_another_version_raise_the_clients_exception(client):
    assert client.call("two", "get_inference_statistics", "two", "13").status == "404"


def test_the_repository_has_the_one_model(client):
    index = client.call("two", "get_model_repository_index")
    assert index == [{"name": "two", "version": "12", "state": "READY", "reason": ""}]


@pytest.mark.parametrize("method", ["load_model", "unload_model"])
def test_no_model_is_loaded_or_unloaded_at_run_time(client, method):
    refusal = client.call("two", method, "two")
    assert (refusal.status, "at run time" in refusal.message) == ("400", True)


@pytest.mark.parametrize(
    "method",
    ["get_trace_settings", "get_log_settings", "get_system_shared_memory_status", "get_cuda_shared_memory_status"],
)
def test_extensions_that_are_not_offered_raise_the_clients_exception(client, method):
    assert client.call("two", method).status == "404"


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_the_likeliest_classes_come_as_the_client_asks_for_them(client, binary):
    answer = client.infer(NAME, strings("I love it."), outputs=[("probabilities", binary)], classes=1)
    (found,) = answer.arrays["probabilities"].ravel()
    score, _, label = (found.decode() if isinstance(found, bytes) else found).split(":")
    assert (float(score) > 0.5, label) == (True, "positive")


@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize("binary", [True, False], ids=["binary inputs", "JSON inputs"])
def test_several_rows_are_answered_in_order(client, rows, binary):
    inputs = two_inputs(rows)
    answer = client.infer("two", inputs, binary=binary)
    assert answer.arrays["total"].dtype == np.float32
    assert answer.arrays["largest"].dtype == np.int64
    np.testing.assert_array_equal(answer.arrays["total"], inputs["a"] + inputs["b"])
    np.testing.assert_array_equal(answer.arrays["largest"], np.ones(rows))


@pytest.mark.parametrize("outputs", [[("largest", True)], [("largest", False), ("total", True)], [("total", False)]])
def test_only_the_outputs_asked_for_come_each_as_asked(client, outputs):
    answer = client.infer("two", two_inputs(2), outputs=outputs)
    assert list(answer.arrays) == [name for name, _ in outputs]
    for (_, binary), output in zip(outputs, answer.response["outputs"], strict=True):
        assert ("data" in output) is not binary
    expected = {"total": [[0.5, 1.5], [2.5, 3.5]], "largest": [1, 1]}
    assert {name: array.tolist() for name, array in answer.arrays.items()} == {
        name: expected[name] for name, _ in outputs
    }


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_every_datatype_comes_back_as_it_was_sent(client, binary):
    inputs = {f"x_{name}": array for name, (_, array) in TYPES.items()}
    answer = client.infer("types", inputs, binary=binary, outputs=[(f"y_{name}", binary) for name in TYPES])
    for name, (_, array) in TYPES.items():
        found = answer.arrays[f"y_{name}"]
        assert found.dtype == array.dtype
        if name == "BYTES" and binary:
            found = np.vectorize(bytes.decode, otypes=[object])(found)
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_sentences_get_labels_scores_and_probabilities(client, binary):
    rows = strings("Simply brilliant, I adore it.", "Dreadful food and a horrible, rude waiter.")
    outputs = [(name, binary) for name in ("label", "score", "probabilities")]
    answer = client.infer(NAME, rows, binary=binary, outputs=outputs)
    labels = [item.decode() if isinstance(item, bytes) else item for item in answer.arrays["label"]]
    assert labels == ["positive", "negative"]
    assert answer.arrays["score"].shape == (2,)
    assert answer.arrays["probabilities"].shape == (2, 2)
    assert answer.arrays["score"] == pytest.approx(answer.arrays["probabilities"].max(axis=1), abs=1e-5)


def test_sentences_may_be_bytes(client):
    answer = client.infer(NAME, strings("Très bien — wonderful! ☀".encode()))
    assert answer.arrays["label"].tolist() == [b"positive"]


def test_the_request_id_comes_back(client):
    answer = client.infer("two", two_inputs(), more={"request_id": "order-66"})
    assert answer.response["id"] == "order-66"
    assert (answer.response["model_name"], answer.response["model_version"]) == ("two", "12")


def test_everything_else_a_caller_may_say_is_accepted(client):
    more = {
        "model_version": "12",
        "sequence_id": 5,
        "sequence_start": True,
        "priority": 2,
        "timeout": 30_000_000,
        "parameters": {"mine": "yes"},
        "headers": {"X-Request-ID": "trace.1"},
        "query_params": {"mine": "yes"},
        "response_compression_algorithm": "gzip",
    }
    assert client.infer("two", two_inputs(), more=more).arrays["largest"].tolist() == [1]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
def test_a_request_may_come_packed(client, algorithm, binary):
    inputs = two_inputs(30)
    answer = client.infer("two", inputs, binary=binary, more={"request_compression_algorithm": algorithm})
    np.testing.assert_array_equal(answer.arrays["total"], inputs["a"] + inputs["b"])


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_packed_request_is_no_way_round_the_limit(client, algorithm):
    inputs = {"a": np.zeros((300_000, 2), np.int64), "b": np.zeros((300_000, 2), np.float32)}
    refusal = client.try_infer("two", inputs, more={"request_compression_algorithm": algorithm})
    assert isinstance(refusal, Refusal)
    assert refusal.status == "413"


def test_many_at_the_same_time_each_get_their_own_answer(client):
    indices = [3, 1, 4, 1, 5, 9, 2, 6]
    answers = client.infer_all("lookup", [{"index": np.array([index])} for index in indices])
    assert [answer.arrays["value"].tolist() for answer in answers] == [[index] for index in indices]


def test_one_that_fails_among_many_raises_the_clients_exception_alone(client):
    indices = [3, 77, 4]
    first, failed, last = client.infer_all("lookup", [{"index": np.array([index])} for index in indices])
    assert (first.arrays["value"].tolist(), last.arrays["value"].tolist()) == ([3], [4])
    assert isinstance(failed, Refusal)
    assert failed.status == "500"
    assert "77" not in failed.message


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"inputs": {"a": np.zeros((1, 2), np.int64)}}, "422"),
        ({"inputs": {**two_inputs(), "c": np.zeros(1)}}, "422"),
        ({"inputs": {**two_inputs(), "b": np.zeros((1, 2))}}, "422"),
        ({"inputs": {**two_inputs(), "b": np.zeros((1, 3), np.float32)}}, "422"),
        ({"inputs": {**two_inputs(), "b": np.zeros(2, np.float32)}}, "422"),
        ({"inputs": two_inputs(100_000)}, "429"),
        ({"outputs": [("sum", True)]}, "400"),
        ({"model": "otherwise", "to": "two"}, "404"),
        ({"more": {"model_version": "13"}}, "404"),
        ({"inputs": two_inputs(300_000)}, "413"),
    ],
    ids=[
        "input missing",
        "input too many",
        "another datatype",
        "another width",
        "another rank",
        "too many rows",
        "unknown output",
        "unknown model",
        "unknown version",
        "too large",
    ],
)
def test_what_does_not_fit_raises_the_clients_exception(client, change, status):
    refusal = client.try_infer(**{"model": "two", "inputs": two_inputs(), **change})
    assert isinstance(refusal, Refusal)
    assert refusal.status == status
    assert refusal.message
    assert "decoding" not in refusal.message


def test_text_that_is_not_utf8_raises_the_clients_exception(client):
    refusal = client.try_infer(NAME, strings(b"\xff\xfe"))
    assert isinstance(refusal, Refusal)
    assert (refusal.status, "UTF-8" in refusal.message) == ("422", True)
