"""The Open Inference Protocol over real server processes, for text and for tensor models of different shape."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests import onnx_models
from tests.process import ServerProcess
from tests.text_model import text_model

# Beyond any wait on a busy machine; nothing here takes that long.
LONG_SECONDS = 120
ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
# Two rows of each, with the values that a careless conversion would lose.
VALUES: dict[str, list[list[Any]]] = {
    "BOOL": [[True, False], [False, True]],
    "UINT8": [[0, 255], [1, 128]],
    "UINT16": [[0, 2**16 - 1], [1, 2**15]],
    "UINT32": [[0, 2**32 - 1], [1, 2**31]],
    "UINT64": [[0, 2**64 - 1], [1, 2**63]],
    "INT8": [[-128, 127], [0, -1]],
    "INT16": [[-(2**15), 2**15 - 1], [0, -1]],
    "INT32": [[-(2**31), 2**31 - 1], [0, -1]],
    "INT64": [[-(2**63), 2**63 - 1], [0, 2**53 + 1]],
    "FP16": [[0.5, -65504.0], [6e-8, -0.0]],
    "FP32": [[0.1, 3.4028234663852886e38], [1e-45, -0.0]],
    "FP64": [[0.1, 1.7976931348623157e308], [5e-324, -0.0]],
    "BYTES": [["plain", "naïve ☕"], ["", "nul\0inside"]],
}
DTYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def every_type(path: Path) -> Path:
    """in_T [rows, 2] → out_T [rows, 2], unchanged, for every datatype T: one server instead of thirteen."""
    nodes = [helper.make_node("Identity", [f"in_{name}"], [f"out_{name}"]) for name in ELEMENT_TYPES]
    inputs = [onnx_models.tensor(f"in_{name}", ["rows", 2], kind) for name, kind in ELEMENT_TYPES.items()]
    outputs = [onnx_models.tensor(f"out_{name}", ["rows", 2], kind) for name, kind in ELEMENT_TYPES.items()]
    return onnx_models.save(path, nodes, inputs, outputs)


def widened(path: Path) -> Path:
    """float32 x [rows, 1] → y [rows, 100000]: an answer far larger than its question."""
    weights = np.full((1, 100_000), 0.1234567, np.float32)
    nodes = [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    inputs, outputs = [onnx_models.tensor("x", ["rows", 1])], [onnx_models.tensor("y", ["rows", 100_000])]
    return onnx_models.save(path, nodes, inputs, outputs, weights=weights)


class Served:
    """A model being served: its folder, its process, a connection."""

    def __init__(self, folder: Path, process: ServerProcess) -> None:
        self.folder = folder
        self.process = process
        manifest = json.loads((folder / "manifest.json").read_text())
        self.name, self.version, self.labels = manifest["name"], manifest["version"], manifest["labels"]
        self.client = httpx.Client(base_url=process.url, timeout=LONG_SECONDS)

    @property
    def path(self) -> str:
        return f"/v2/models/{self.name}"

    def get(self, suffix: str = "") -> Any:
        """The JSON of one of the model's GET routes."""
        response = self.client.get(self.path + suffix)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, inputs: list[dict], **extra: Any) -> httpx.Response:
        """An inference in JSON."""
        return self.client.post(f"{self.path}/infer", json={"inputs": inputs, **extra})

    def post_binary(self, inputs: list[dict], blobs: list[bytes], **extra: Any) -> httpx.Response:
        """An inference whose inputs are binary."""
        for spec, blob in zip(inputs, blobs, strict=True):
            spec["parameters"] = {"binary_data_size": len(blob)}
        head = json.dumps({"inputs": inputs, **extra}).encode()
        headers = {"inference-header-content-length": str(len(head))}
        return self.client.post(f"{self.path}/infer", content=head + b"".join(blobs), headers=headers)

    def runs(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What ONNX Runtime by itself answers."""
        session = ort.InferenceSession(self.folder / "model.onnx")
        return dict(zip((node.name for node in session.get_outputs()), session.run(None, feeds), strict=True))

    def statistics(self) -> dict:
        (model,) = self.get("/stats")["model_stats"]
        return model


@pytest.fixture(scope="module")
def served(package: Callable[..., Path]) -> Iterator[dict[str, Served]]:
    """One server for each model; they start side by side."""
    folders = {
        "text": text_model(),
        "mlp": package(onnx_models.mlp, "scorer", "3"),
        "image": package(onnx_models.image),
        "two": package(onnx_models.two_outputs),
        "types": package(every_type),
        "lookup": package(onnx_models.lookup),
        "wide": package(widened),
    }
    # A free runner waits for eight rows: requests that are sent together share a run.
    together = {"batch_delay_ms": 1000, "max_batch_rows": 8, "runners": 1}
    patient = {"request_timeout_ms": LONG_SECONDS * 1000}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(ServerProcess(folder, **patient, **(together if name == "lookup" else {})))
            for name, folder in folders.items()
        }
        models = {name: Served(folders[name], process.ready()) for name, process in processes.items()}
        for model in models.values():
            stack.callback(model.client.close)
        yield models


@pytest.fixture
def text(served: dict[str, Served]) -> Served:
    return served["text"]


@pytest.fixture
def mlp(served: dict[str, Served]) -> Served:
    return served["mlp"]


@pytest.fixture
def two(served: dict[str, Served]) -> Served:
    return served["two"]


@pytest.fixture
def lookup(served: dict[str, Served]) -> Served:
    return served["lookup"]


def features(rows: int = 1) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, 4), np.float32)


def as_json(name: str, datatype: str, array: Any) -> dict:
    array = np.asarray(array)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}


def texts(*rows: str) -> dict:
    return {"name": "text", "datatype": "BYTES", "shape": [len(rows)], "data": list(rows)}


def pair(rows: int = 1) -> list[dict]:
    """Inputs of the two-output model."""
    a, b = np.arange(rows * 2).reshape(rows, 2), np.ones((rows, 2)) / 2
    return [as_json("a", "INT64", a), as_json("b", "FP32", b)]


def outputs_of(response: httpx.Response) -> dict[str, np.ndarray]:
    """Outputs of a JSON answer, in its order."""
    assert response.status_code == 200, response.text
    return {
        output["name"]: np.array(output["data"], DTYPES.get(output["datatype"], object)).reshape(output["shape"])
        for output in response.json()["outputs"]
    }


def binary_outputs_of(response: httpx.Response) -> dict[str, bytes]:
    """Raw bytes of each output of a binary answer; together they are all of its body."""
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    header, rest = json.loads(response.content[:length]), response.content[length:]
    raw = {}
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        raw[output["name"]], rest = rest[:size], rest[size:]
    assert not rest
    return raw


def to_bytes_elements(items: list[str]) -> bytes:
    return b"".join(len(raw).to_bytes(4, "little") + raw for raw in (item.encode() for item in items))


def refused(response: httpx.Response, *statuses: int) -> str:
    """Asserts one of the statuses and the one shape of errors; returns the message."""
    assert response.status_code in statuses, response.text
    content = response.json()
    assert list(content) == ["error"]
    assert isinstance(content["error"], str)
    assert content["error"]
    return content["error"]


# Who is there.


def test_the_server_names_itself_and_its_extensions(text):
    content = text.client.get("/v2").json()
    assert set(content) == {"name", "version", "extensions"}
    assert "binary_tensor_data" in content["extensions"]


def test_a_ready_server_is_live_and_ready(text):
    assert text.client.get("/v2/health/live").status_code == 200
    assert text.client.get("/v2/health/ready").status_code == 200
    assert text.get("/ready")["ready"] is True


def test_a_text_model_takes_text_and_answers_labels(text):
    content = text.get()
    assert content["name"] == text.name
    assert content["versions"] == [text.version]
    assert content["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert content["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "score", "datatype": "FP32", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, len(text.labels)]},
    ]


def test_a_tensor_model_shows_its_own_inputs_and_outputs(two):
    content = two.get()
    assert content["inputs"] == [
        {"name": "a", "datatype": "INT64", "shape": [-1, 2]},
        {"name": "b", "datatype": "FP32", "shape": [-1, 2]},
    ]
    assert content["outputs"] == [
        {"name": "total", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "largest", "datatype": "INT64", "shape": [-1]},
    ]


def test_every_datatype_has_its_protocol_name_in_the_metadata(served):
    content = served["types"].get()
    assert {spec["name"]: spec["datatype"] for spec in content["inputs"]} == {f"in_{name}": name for name in DTYPES} | {
        "in_BYTES": "BYTES"
    }


def test_the_configuration_of_a_batching_model_leaves_the_first_axis_out(served):
    config = served["image"].get("/config")
    assert config["max_batch_size"] >= 1
    assert config["input"] == [{"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, -1, -1]}]
    assert config["output"] == [{"name": "classes", "data_type": "TYPE_FP32", "dims": [5]}]


def test_the_configuration_calls_strings_what_triton_calls_them(text):
    config = text.get("/config")
    assert config["name"] == text.name
    assert config["max_batch_size"] == 0
    assert config["input"] == [{"name": "text", "data_type": "TYPE_STRING", "dims": [-1]}]


@pytest.mark.parametrize("suffix", ["", "/ready", "/config"])
def test_the_version_may_be_named(mlp, suffix):
    assert mlp.get(f"/versions/{mlp.version}{suffix}") == mlp.get(suffix)


def test_an_inference_may_name_the_version(mlp):
    body = {"inputs": [as_json("features", "FP32", features())]}
    answers = [mlp.client.post(f"{mlp.path}{v}/infer", json=body) for v in ("", f"/versions/{mlp.version}")]
    assert outputs_of(answers[0])["scores"].tolist() == outputs_of(answers[1])["scores"].tolist()
    assert answers[0].json()["model_version"] == mlp.version


@pytest.mark.parametrize("suffix", ["", "/ready", "/config", "/stats"])
@pytest.mark.parametrize("model", ["/v2/models/otherwise", "/v2/models/scorer/versions/1847", "/v2/models/SCORER"])
def test_an_unknown_model_or_version_is_not_found(mlp, model, suffix):
    message = refused(mlp.client.get(model + suffix), 404)
    assert "otherwise" not in message
    assert "1847" not in message


@pytest.mark.parametrize("model", ["/v2/models/otherwise", "/v2/models/scorer/versions/1847"])
def test_an_inference_with_an_unknown_model_or_version_is_not_found(mlp, model):
    refused(mlp.client.post(f"{model}/infer", json={"inputs": []}), 404)


# Inference.


def test_polar_sentences_get_their_labels_in_order(text):
    rows = ["What a wonderful, friendly place!", "Awful. A rude, dirty and overpriced mess.", "I am so happy with it."]
    response = text.post([texts(*rows)])
    outputs = outputs_of(response)
    assert outputs["label"].tolist() == ["positive", "negative", "positive"]
    assert list(outputs) == ["label", "score", "probabilities"]
    assert outputs["probabilities"].shape == (3, len(text.labels))
    assert outputs["probabilities"].sum(axis=1) == pytest.approx(1, abs=1e-4)
    assert outputs["score"] == pytest.approx(outputs["probabilities"].max(axis=1), abs=1e-4)
    assert [text.labels[i] for i in outputs["probabilities"].argmax(axis=1)] == outputs["label"].tolist()


def test_text_may_come_and_go_in_binary(text):
    rows = ["Lovely — truly lovely ☀", "The worst purchase of my life."]
    spec = {"name": "text", "datatype": "BYTES", "shape": [2]}
    response = text.post_binary([spec], [to_bytes_elements(rows)], parameters={"binary_data_output": True})
    raw = binary_outputs_of(response)
    expected = outputs_of(text.post([texts(*rows)]))
    assert raw["label"] == to_bytes_elements(expected["label"].tolist())
    assert np.frombuffer(raw["score"], "<f4") == pytest.approx(expected["score"], abs=0.05)
    assert len(raw["probabilities"]) == 2 * len(text.labels) * 4


def test_text_longer_than_the_window_is_still_answered(text):
    outputs = outputs_of(text.post([texts("A splendid and delightful evening. " * 400)]))
    assert outputs["label"].tolist() == ["positive"]


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_a_model_of_features_answers_what_onnx_runtime_answers_however_many_rows(mlp, rows):
    array = features(rows)
    outputs = outputs_of(mlp.post([as_json("features", "FP32", array)]))
    np.testing.assert_allclose(outputs["scores"], mlp.runs({"features": array})["scores"], rtol=1e-4, atol=1e-5)


def test_binary_features_give_the_same_scores_as_json(mlp):
    array = features(5)
    spec = {"name": "features", "datatype": "FP32", "shape": [5, 4]}
    response = mlp.post_binary([spec], [array.tobytes()], parameters={"binary_data_output": True})
    found = np.frombuffer(binary_outputs_of(response)["scores"], "<f4").reshape(5, 3)
    assert response.headers["content-type"] == "application/octet-stream"
    np.testing.assert_allclose(found, mlp.runs({"features": array})["scores"], rtol=1e-4, atol=1e-5)


async def test_images_of_different_sizes_sent_together_each_get_their_own_answer(served):
    model = served["image"]
    rng = np.random.default_rng(5)
    pictures = [rng.standard_normal((1, 3, side, side + 1), np.float32) for side in (4, 5, 6, 4, 5, 6)]
    async with httpx.AsyncClient(base_url=model.process.url, timeout=LONG_SECONDS) as client:
        bodies = [{"inputs": [as_json("pixels", "FP32", picture)]} for picture in pictures]
        answers = await asyncio.gather(*(client.post(f"{model.path}/infer", json=body) for body in bodies))
    for picture, answer in zip(pictures, answers, strict=True):
        expected = model.runs({"pixels": picture})["classes"]
        np.testing.assert_allclose(outputs_of(answer)["classes"], expected, rtol=1e-3, atol=1e-4)


def test_both_inputs_and_both_outputs_of_a_model_keep_their_datatypes(two):
    response = two.post(pair(3))
    outputs = outputs_of(response)
    assert {output["name"]: output["datatype"] for output in response.json()["outputs"]} == {
        "total": "FP32",
        "largest": "INT64",
    }
    assert outputs["total"].tolist() == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]
    assert outputs["largest"].tolist() == [1, 1, 1]


def test_inputs_may_come_in_any_order(two):
    assert outputs_of(two.post(pair()[::-1]))["total"].tolist() == [[0.5, 1.5]]


@pytest.fixture(scope="module")
def json_answer(served: dict[str, Served]) -> dict:
    """What the model of every datatype makes of VALUES, sent and answered in JSON."""
    inputs = [{"name": f"in_{name}", "datatype": name, "shape": [2, 2], "data": rows} for name, rows in VALUES.items()]
    response = served["types"].post(inputs)
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


@pytest.fixture(scope="module")
def binary_answer(served: dict[str, Served]) -> dict[str, bytes]:
    """The same, sent and answered in binary."""
    inputs = [{"name": f"in_{name}", "datatype": name, "shape": [2, 2]} for name in VALUES]
    response = served["types"].post_binary(
        inputs, [wire(name) for name in VALUES], parameters={"binary_data_output": True}
    )
    return binary_outputs_of(response)


def wire(name: str) -> bytes:
    """VALUES of a datatype as the binary extension has them."""
    if name == "BYTES":
        return to_bytes_elements([item for row in VALUES[name] for item in row])
    return np.array(VALUES[name], DTYPES[name]).tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_every_datatype_survives_json(json_answer, name):
    output = json_answer[f"out_{name}"]
    assert (output["datatype"], output["shape"]) == (name, [2, 2])
    found = output["data"]
    if name == "BYTES":
        assert found == [item for row in VALUES[name] for item in row]
        return
    assert {type(item) for item in found} == {type(VALUES[name][0][0])}
    assert np.array(found, DTYPES[name]).tobytes() == np.array(VALUES[name], DTYPES[name]).tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_every_datatype_survives_binary(binary_answer, name):
    assert binary_answer[f"out_{name}"] == wire(name)


def test_infinities_and_nans_survive_binary(served):
    inputs = [{"name": f"in_{name}", "datatype": name, "shape": [2, 2]} for name in VALUES]
    odd = np.array([[np.inf, -np.inf], [np.nan, 0]])
    blobs = [odd.astype(DTYPES[name]).tobytes() if name.startswith("FP") else wire(name) for name in VALUES]
    raw = binary_outputs_of(served["types"].post_binary(inputs, blobs, parameters={"binary_data_output": True}))
    for name in ("FP16", "FP32", "FP64"):
        assert np.array_equal(np.frombuffer(raw[f"out_{name}"], DTYPES[name]), odd.ravel(), equal_nan=True)


def test_what_json_has_no_word_for_is_a_failure_that_says_how_to_ask(served):
    inputs = [{"name": f"in_{name}", "datatype": name, "shape": [2, 2]} for name in VALUES]
    blobs = [np.array([[1, 2], [np.nan, 0]], np.float32).tobytes() if name == "FP32" else wire(name) for name in VALUES]
    message = refused(served["types"].post_binary(inputs, blobs), 500)
    assert "'out_FP32'" in message
    assert "binary_data" in message
    wanted = [{"name": "out_FP64"}]
    assert served["types"].post_binary(inputs, blobs, outputs=wanted).status_code == 200


@pytest.mark.parametrize("rows", [10, 500])
def test_an_answer_too_large_is_refused_and_says_what_to_ask_for(served, rows):
    wide = served["wide"]
    spec = as_json("x", "FP32", np.ones((rows, 1)))
    message = refused(wide.post([spec]), 422)
    assert "fewer rows" in message
    assert "binary" in message
    assert wide.client.get("/live").status_code == 200


def test_an_answer_larger_than_its_question_comes_whole_in_either_format(served):
    spec = as_json("x", "FP32", np.ones((6, 1)))
    answer = outputs_of(served["wide"].post([spec]))["y"]
    raw = binary_outputs_of(served["wide"].post([spec], parameters={"binary_data_output": True}))["y"]
    assert answer.shape == (6, 100_000)
    assert answer.astype(np.float32).tobytes() == raw


# What the request asks for.


def test_the_largest_values_come_as_classes_with_the_labels_of_the_manifest(text):
    wanted = [{"name": "probabilities", "parameters": {"classification": 1}}, {"name": "label"}]
    response = text.post([texts("I love it.", "I hate it.")], outputs=wanted)
    outputs = outputs_of(response)
    assert response.json()["outputs"][0]["datatype"] == "BYTES"
    assert outputs["probabilities"].shape == (2, 1)
    for found, label in zip(outputs["probabilities"][:, 0], outputs["label"], strict=True):
        score, index, name = found.split(":")
        assert float(score) > 0.5
        assert text.labels[int(index)] == name == label


def test_classes_of_a_tensor_model_are_the_largest_of_each_row(mlp):
    array = features(3)
    wanted = [{"name": "scores", "parameters": {"classification": 2}}]
    found = outputs_of(mlp.post([as_json("features", "FP32", array)], outputs=wanted))["scores"]
    expected = mlp.runs({"features": array})["scores"].argsort(axis=1)[:, ::-1][:, :2]
    assert [[int(item.split(":")[1]) for item in row] for row in found] == expected.tolist()


@pytest.mark.parametrize("value", [-1, 1.5, "2", True, [2]])
def test_a_number_of_classes_that_is_none_is_refused(mlp, value):
    wanted = [{"name": "scores", "parameters": {"classification": value}}]
    refused(mlp.post([as_json("features", "FP32", features())], outputs=wanted), 400, 422)


def test_the_request_id_comes_back(mlp, two):
    spec = as_json("features", "FP32", features())
    assert mlp.post([spec], id="order 66 — ☂").json()["id"] == "order 66 — ☂"
    raw = {"name": "features", "datatype": "FP32", "shape": [1, 4]}
    response = mlp.post_binary([raw], [features().tobytes()], id="b", parameters={"binary_data_output": True})
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.content[:length])["id"] == "b"


def test_an_answer_names_the_model_its_version_and_its_times(mlp):
    response = mlp.post([as_json("features", "FP32", features())])
    assert (response.json()["model_name"], response.json()["model_version"]) == (mlp.name, mlp.version)
    assert response.headers["x-model"] == f"{mlp.name}/{mlp.version}"
    assert "inference;dur=" in response.headers["server-timing"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("names", [["largest"], ["total"], ["largest", "total"], ["total", "largest"]])
def test_only_the_outputs_asked_for_come_in_the_order_asked_for(two, names):
    response = two.post(pair(), outputs=[{"name": name} for name in names])
    assert list(outputs_of(response)) == names


def test_each_output_comes_in_the_format_asked_for_it(two):
    wanted = [{"name": "largest", "parameters": {"binary_data": True}}, {"name": "total"}]
    response = two.post(pair(), outputs=wanted)
    length = int(response.headers["inference-header-content-length"])
    largest, total = json.loads(response.content[:length])["outputs"]
    assert response.content[length:] == np.array([1], "<i8").tobytes()
    assert "data" not in largest
    assert total["data"] == [0.5, 1.5]


def test_an_output_may_refuse_the_format_asked_for_all(two):
    wanted = [{"name": "total", "parameters": {"binary_data": False}}, {"name": "largest"}]
    response = two.post(pair(), outputs=wanted, parameters={"binary_data_output": True})
    length = int(response.headers["inference-header-content-length"])
    total, largest = json.loads(response.content[:length])["outputs"]
    assert total["data"] == [0.5, 1.5]
    assert largest["parameters"] == {"binary_data_size": 8}


def test_parameters_that_mean_nothing_here_are_accepted(two):
    parameters = {"priority": 1, "sequence_id": 4, "sequence_start": True, "mine": "yes", "ratio": 0.5}
    a, b = pair()
    wanted = [{"name": "total", "parameters": {"mine": 1}}]
    assert list(outputs_of(two.post([{**a, "parameters": {"mine": 1}}, b], parameters=parameters, outputs=wanted)))


@pytest.mark.parametrize("timeout", [0, 50_000_000, 10**18])
def test_a_timeout_that_leaves_time_is_accepted(two, timeout):
    assert two.post(pair(), parameters={"timeout": timeout}).status_code == 200


@pytest.mark.parametrize("timeout", [-1, 1.5, True, "50", [], {}])
def test_a_timeout_that_is_no_number_of_microseconds_is_refused(two, timeout):
    assert "timeout" in refused(two.post(pair(), parameters={"timeout": timeout}), 400, 422)


def test_a_timeout_beyond_any_clock_is_no_server_error(two):
    assert two.post(pair(), parameters={"timeout": 10**400}).status_code in (200, 400, 422)


def test_a_timeout_shorter_than_the_wait_ends_in_504(lookup):
    # Alone in its batch, the row waits longer than this for others.
    response = lookup.post([as_json("index", "INT64", [3])], parameters={"timeout": 20_000})
    refused(response, 504)


# What does not fit the model.

FITTING = {"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [{**FITTING, "name": "feature"}],
        [FITTING, {**FITTING, "name": "more"}],
        [{**FITTING, "datatype": "FP64"}],
        [{**FITTING, "datatype": "INT64"}],
        [{**FITTING, "datatype": "BYTES", "data": ["a", "b", "c", "d"]}],
        [{**FITTING, "shape": [4]}],
        [{**FITTING, "shape": [2, 2]}],
        [{**FITTING, "shape": [1, 1, 4]}],
        [{**FITTING, "shape": [0, 4], "data": []}],
    ],
    ids=[
        "no input",
        "another name",
        "one too many",
        "FP64 for FP32",
        "INT64 for FP32",
        "BYTES for FP32",
        "rank too small",
        "another width",
        "rank too large",
        "no rows",
    ],
)
def test_inputs_that_are_not_the_models_are_invalid(mlp, inputs):
    refused(mlp.post(inputs), 422)


def test_one_of_two_inputs_alone_is_invalid(two):
    refused(two.post(pair()[:1]), 422)


def test_inputs_with_different_numbers_of_rows_are_invalid(two):
    refused(two.post([pair(1)[0], pair(2)[1]]), 422)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "texts", "datatype": "BYTES", "shape": [1], "data": ["fine"]},
        {"name": "text", "datatype": "FP32", "shape": [1], "data": [1]},
        {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["fine"]},
        {"name": "text", "datatype": "BYTES", "shape": [], "data": ["fine"]},
        {"name": "text", "datatype": "BYTES", "shape": [0], "data": []},
        {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["fine", "  \n"]},
        {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["", "fine"]},
    ],
    ids=["another name", "numbers", "two axes", "no axis", "no rows", "a blank row", "an empty row"],
)
def test_texts_that_are_no_list_of_texts_are_invalid(text, spec):
    refused(text.post([spec]), 422)


def test_text_that_is_not_utf8_is_invalid(text):
    spec = {"name": "text", "datatype": "BYTES", "shape": [1]}
    refused(text.post_binary([spec], [b"\2\0\0\0\xff\xfe"]), 422)


def test_strings_for_a_tensor_model_that_are_not_utf8_are_invalid(served):
    inputs = [{"name": f"in_{name}", "datatype": name, "shape": [2, 2]} for name in VALUES]
    blobs = [b"\1\0\0\0\xff" * 4 if name == "BYTES" else wire(name) for name in VALUES]
    refused(served["types"].post_binary(inputs, blobs), 422)


def test_an_output_that_the_model_does_not_have_is_refused(two):
    message = refused(two.post(pair(), outputs=[{"name": "quixotry"}]), 400, 422)
    assert "quixotry" not in message


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b'"inputs"', b"\xff\xfe", b'{"inputs": {}}', b'{"inputs": [1]}', b'{"input": []}'],
    ids=str,
)
def test_a_body_that_is_no_inference_request_is_refused(mlp, body):
    refused(mlp.client.post(f"{mlp.path}/infer", content=body), 400, 422)


@pytest.mark.parametrize("header", ["-1", "1e3", "999999", "abc", "0", "", "99999999999999999999"])
def test_a_header_length_that_lies_is_a_bad_request(mlp, header):
    head = json.dumps({"inputs": [FITTING]}).encode()
    response = mlp.client.post(f"{mlp.path}/infer", content=head, headers={"inference-header-content-length": header})
    refused(response, 400)


@pytest.mark.parametrize("change", [-1, 1, -16, 4, 2**40])
def test_a_binary_size_that_lies_is_a_bad_request(mlp, change):
    spec = {"name": "features", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16 + change}}
    head = json.dumps({"inputs": [spec]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    refused(mlp.client.post(f"{mlp.path}/infer", content=head + features().tobytes(), headers=headers), 400)


@pytest.mark.parametrize(
    "shape", [[0, 10**30], [10**3000, 10**3000], [1] * 65, [-1, 4], [2**63]], ids=lambda shape: str(len(str(shape)))
)
def test_a_shape_that_no_tensor_can_have_is_a_bad_request(mlp, shape):
    data = [] if 0 in shape else [1.0]
    refused(mlp.post([{"name": "features", "datatype": "FP32", "shape": shape, "data": data}]), 400)


def test_numbers_of_another_kind_are_a_bad_request(two):
    a, b = pair()
    refused(two.post([{**a, "data": [1.5, 2]}, b]), 400)
    refused(two.post([a, {**b, "data": [True, 2]}]), 400)
    refused(two.post([a, {**b, "data": [1e300, 2]}]), 400)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_packed_body_is_answered_as_it_would_be_plain(mlp, encoding, pack):
    array = features(5)
    plain = json.dumps({"inputs": [as_json("features", "FP32", array)]}).encode()
    spec = {"name": "features", "datatype": "FP32", "shape": [5, 4], "parameters": {"binary_data_size": 80}}
    head = json.dumps({"inputs": [spec]}).encode()
    expected = mlp.runs({"features": array})["scores"]
    for body, length in ((plain, None), (head + array.tobytes(), str(len(head)))):
        headers = {"content-encoding": encoding} | ({"inference-header-content-length": length} if length else {})
        answer = mlp.client.post(f"{mlp.path}/infer", content=pack(body), headers=headers)
        np.testing.assert_allclose(outputs_of(answer)["scores"], expected, rtol=1e-4, atol=1e-5)


def test_a_body_in_another_packing_is_refused(mlp):
    body = gzip.compress(json.dumps({"inputs": [FITTING]}).encode())
    refused(mlp.client.post(f"{mlp.path}/infer", content=body, headers={"content-encoding": "br"}), 415)
    refused(mlp.client.post(f"{mlp.path}/infer", content=body[:-3], headers={"content-encoding": "gzip"}), 400)


def test_shared_memory_is_refused_and_not_ignored(two):
    a, b = pair()
    refused(two.post([{**a, "parameters": {"shared_memory_region": "r"}}, b]), 400, 422)


def test_more_rows_than_the_queue_can_ever_hold_are_too_many(mlp):
    refused(mlp.post([as_json("features", "FP32", features(5000))]), 429)


def test_text_routes_are_not_there_for_a_tensor_model(mlp):
    refused(mlp.client.post("/predict", json={"text": "hello"}), 404)


def test_a_refused_request_leaves_the_connection_usable(mlp):
    with httpx.Client(base_url=mlp.process.url, limits=httpx.Limits(max_connections=1), timeout=LONG_SECONDS) as client:
        for _ in range(3):
            refused(client.post("/v2/models/otherwise/infer", json={"inputs": [FITTING]}), 404)
            refused(client.post(f"{mlp.path}/infer", content=b"{"), 400)
            assert client.post(f"{mlp.path}/infer", json={"inputs": [FITTING]}).status_code == 200


# Failure and counting.


async def test_a_row_that_the_model_fails_on_fails_alone(lookup):
    before = lookup.statistics()
    indices = [1, 2, 3, 99, 5, 6, 7, 8]
    async with httpx.AsyncClient(base_url=lookup.process.url, timeout=LONG_SECONDS) as client:
        answers = await asyncio.gather(
            *(client.post(f"{lookup.path}/infer", json={"inputs": [as_json("index", "INT64", [i])]}) for i in indices)
        )
    for index, answer in zip(indices, answers, strict=True):
        if index == 99:
            assert "99" not in refused(answer, 500)
        else:
            assert outputs_of(answer)["value"].tolist() == [index]
    after = lookup.statistics()
    # They did share a run; each by itself would be eight.
    assert after["execution_count"] - before["execution_count"] < len(indices)
    assert after["inference_stats"]["fail"]["count"] == before["inference_stats"]["fail"]["count"] + 1
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 7
    assert lookup.client.get("/live").status_code == 200


def test_statistics_count_requests_rows_and_time(mlp):
    before = mlp.statistics()
    for rows in (1, 4):
        outputs_of(mlp.post([as_json("features", "FP32", features(rows))]))
    after = mlp.statistics()
    assert (after["name"], after["version"]) == (mlp.name, mlp.version)
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 2
    assert after["last_inference"] >= before["last_inference"]
    parts = {"queue": 2, "compute_input": 2, "compute_infer": 2, "compute_output": 2}
    for kind, count in {"success": 2, "fail": 0, "cache_hit": 0, "cache_miss": 0, **parts}.items():
        assert after["inference_stats"][kind]["count"] - before["inference_stats"][kind]["count"] == count
    spent = {kind: after["inference_stats"][kind]["ns"] - before["inference_stats"][kind]["ns"] for kind in parts}
    assert min(spent.values()) > 0
    assert sum(spent.values()) <= after["inference_stats"]["success"]["ns"] - before["inference_stats"]["success"]["ns"]
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]


def test_refused_requests_are_no_inferences(mlp):
    before = mlp.statistics()
    refused(mlp.post([]), 422)
    assert mlp.statistics()["inference_count"] == before["inference_count"]


# Models as a repository.


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}', b'{"ready": false}'])
def test_the_repository_has_the_one_model(mlp, body):
    response = mlp.client.post("/v2/repository/index", content=body)
    assert response.status_code == 200
    assert response.json() == [{"name": mlp.name, "version": mlp.version, "state": "READY", "reason": ""}]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ready": 1}', b"\xff", b" " * 5000])
def test_a_question_to_the_repository_that_is_none_is_refused(mlp, body):
    refused(mlp.client.post("/v2/repository/index", content=body), 400, 413, 422)


@pytest.mark.parametrize("change", ["load", "unload"])
@pytest.mark.parametrize("name", ["scorer", "otherwise"])
def test_no_model_is_loaded_or_unloaded_at_run_time(mlp, name, change):
    message = refused(mlp.client.post(f"/v2/repository/models/{name}/{change}", json={"parameters": {}}), 400)
    assert "at run time" in message
    assert mlp.get("/ready")["ready"] is True


@pytest.mark.parametrize(
    "path",
    ["/v2/trace/setting", "/v2/logging", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/region/r/register",
     "/v2/models/scorer/trace/setting"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_extensions_that_are_not_offered_are_not_found(mlp, path, method):
    refused(mlp.client.request(method, path, json={} if method == "POST" else None), 404)
