"""Each task over a real server process: its routes, the Open Inference Protocol, and what other tasks' routes say."""

import struct
from base64 import b64decode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient

from app.http.routes import LABELS
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.runtime.tasks.answers import predicted
from tests import task_models
from tests.process import ServerProcess
from tests.task_models import TEXTS, picture

Serve = Callable[[str], "Task"]
PATIENT = {"max_queue_wait_ms": 600_000, "request_timeout_ms": 600_000, "max_body_bytes": 1 << 20}
LONG = "and the bank of New York " * 9


class Task:
    """A server with a small model of a task, and the same model in this process."""

    def __init__(self, server: ServerProcess, model: Model) -> None:
        self.server, self.model = server, model
        self.client = httpx.Client(base_url=server.url, timeout=600)

    def ask(self, path: str, body: Any, status: int = 200) -> Any:
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()

    def outputs(self, inputs: list[Any]) -> dict[str, np.ndarray]:
        """What the model answers in this process, each row by itself."""
        rows = [self.model.task.encode([each])[0] for each in inputs]
        return self.model.task.respond(rows, [self.model.run([row.payload])[0] for row in rows])

    def predictions(self, inputs: list[Any]) -> list[Any]:
        rows = [self.model.task.encode([each])[0] for each in inputs]
        return self.model.task.predictions(rows, [self.model.run([row.payload])[0] for row in rows])


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """`serve("text-embedding")`: that task, served; each by one process for all of the module."""
    running: dict[str, Task] = {}

    def start(name: str) -> Task:
        if name not in running:
            folder = task_models.BUILD[name](tmp_path_factory.mktemp("artifact") / "artifact")
            process = ServerProcess(folder, **PATIENT)
            running[name] = Task(process.ready(), load_model(folder))
        return running[name]

    yield start
    for task in running.values():
        task.client.close()
        task.server.__exit__()


def close(found: Any, expected: Any) -> bool:
    """Whether two answers are the same but for rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


# --- predict ----------------------------------------------------------------------------------------------------------


def label(each: Any) -> dict:
    return {"label": each.label, "score": each.score}


def labels(each: Any) -> dict:
    return {"labels": [{"label": one.label, "score": one.score} for one in each.labels]}


def entities(each: Any) -> dict:
    names = ("entity_group", "score", "word", "start", "end")
    return {"entities": [{name: getattr(entity, name) for name in names} for entity in each.entities]}


SHAPES = {
    "text-classification": label,
    "multi-label": labels,
    "text-regression": lambda each: {"value": each.value},
    "token-classification": entities,
}


@pytest.mark.parametrize("name", SHAPES)
def test_texts_are_answered_in_the_shape_of_their_task_alone_and_many_at_once(serve, name):
    task = serve(name)
    expected = [
        SHAPES[name](each) | ({"truncated": True} if each.truncated else {}) for each in task.predictions(list(TEXTS))
    ]
    assert sum("truncated" in each for each in expected) == 1
    assert close(task.ask("/predict/batch", {"texts": TEXTS}), {"predictions": expected})
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: task.ask("/predict", {"text": text}), TEXTS * 4))
    assert close(found, expected * 4)


def test_labels_are_sorted_and_all_of_them_over_the_threshold(serve):
    answers = serve("multi-label").ask("/predict/batch", {"texts": TEXTS})["predictions"]
    scores = [[each["score"] for each in answer["labels"]] for answer in answers]
    assert all(row == sorted(row, reverse=True) for row in scores)
    assert min(score for row in scores for score in row) >= 0.5
    assert len({len(row) for row in scores}) > 1


def test_entities_stand_where_the_answer_says_in_code_points(serve):
    text = "😀 Zoë lives in Perú with 日本 and Bob"
    found = serve("token-classification").ask("/predict", {"text": text})["entities"]
    assert found
    assert [entity["word"] for entity in found] == [text[entity["start"] : entity["end"]] for entity in found]


@pytest.mark.parametrize("name", ["text-classification", "multi-label", "token-classification"])
def test_what_is_predicted_is_counted_by_label(serve, name):
    task = serve(name)
    counted = dict.fromkeys(task.model.task.labels, 0)
    for label, _ in predicted(task.predictions(list(TEXTS))):
        counted[label] += 1

    def counts() -> list[float]:
        return [task.server.metric("inference_predictions_total", label=label) for label in counted]

    before = counts()
    task.ask("/predict/batch", {"texts": TEXTS})
    assert [after - was for after, was in zip(counts(), before, strict=True)] == list(counted.values())
    assert sum(counted.values()) > 1


@pytest.mark.parametrize("name", ["text-regression", "text-embedding", "text-pair"])
def test_a_model_without_labels_has_no_series_of_predictions(serve, name):
    text = serve(name).server.get("/metrics").text
    assert "inference_predictions_total{" not in text
    assert "model_reference_prediction_ratio{" not in text
    assert "inference_prediction_score_count 0.0" in text


# --- embeddings -------------------------------------------------------------------------------------------------------


def test_embeddings_in_the_shape_of_text_embeddings_inference(serve):
    task = serve("text-embedding")
    expected = task.outputs(list(TEXTS))["embedding"]
    found = np.array(task.ask("/embed", {"inputs": TEXTS}))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(task.ask("/embed", {"inputs": TEXTS[1]}), expected[1:2], rtol=1e-4, atol=1e-5)
    raw = np.array(task.ask("/embed", {"inputs": list(TEXTS), "normalize": False}))
    assert (np.abs(np.linalg.norm(raw, axis=1) - 1) > 1e-3).all()
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), expected, rtol=1e-4, atol=1e-5)


def test_a_text_beyond_the_window_is_embedded_as_far_as_it_goes_unless_it_may_not_be_cut(serve):
    task = serve("text-embedding")
    assert task.ask("/embed", {"inputs": LONG}) == task.ask("/embed", {"inputs": LONG + LONG, "truncate": True})
    refused = task.ask("/embed", {"inputs": ["Anna", LONG], "truncate": False}, 422)
    assert refused == {"error": "an input is longer than the model's window; shorten it, or send `truncate` true"}
    assert len(task.ask("/embed", {"inputs": ["Anna"], "truncate": False})) == 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"inputs": []}, 422, "inputs: expected at least one"),
        ({"inputs": [1, 2]}, 422, "inputs"),
        ({"inputs": ""}, 422, "text 0"),
        ({"inputs": "a", "prompt_name": "query"}, 422, "prompt_name"),
        ({"inputs": "a", "truncation_direction": "left"}, 422, "truncation_direction: expected right"),
        ({"inputs": "a", "dimensions": 3}, 422, "dimensions: expected 6"),
        ({}, 422, "inputs"),
    ],
)
def test_what_embed_cannot_do_it_says(serve, body, status, said):
    assert said in serve("text-embedding").ask("/embed", body, status)["error"]


def test_the_hub_client_extracts_features(serve):
    task = serve("text-embedding")
    client = InferenceClient(f"{task.server.url}/embed")
    expected = task.outputs(list(TEXTS))["embedding"]
    np.testing.assert_allclose(client.feature_extraction(list(TEXTS)), expected, rtol=1e-4, atol=1e-5)
    raw = client.feature_extraction(TEXTS[0], normalize=False, truncate=True, truncation_direction="right")
    assert raw.shape == (1, 6)
    assert np.linalg.norm(raw) != pytest.approx(1, abs=1e-3)


def test_embeddings_in_the_shape_of_openai(serve):
    task = serve("text-embedding")
    expected = task.outputs(list(TEXTS))["embedding"]
    answer = task.ask("/v1/embeddings", {"model": "text-embedding", "input": TEXTS, "dimensions": 6, "user": "u"})
    assert {key: value for key, value in answer.items() if key not in ("data", "usage")} == {
        "object": "list",
        "model": "text-embedding",
    }
    tokens = sum(unit.length for unit in task.model.task.encode(list(TEXTS)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert [(each["object"], each["index"]) for each in answer["data"]] == [("embedding", i) for i in range(len(TEXTS))]
    np.testing.assert_allclose([each["embedding"] for each in answer["data"]], expected, rtol=1e-4, atol=1e-5)

    (packed,) = task.ask("/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})["data"]
    found = struct.unpack("<6f", b64decode(packed["embedding"], validate=True))
    assert list(found) == task.ask("/v1/embeddings", {"input": [TEXTS[0]]})["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": [1, 2, 3]}, 400, "token ids are not taken"),
        ({"input": [[1, 2], [3]]}, 400, "token ids are not taken"),
        ({"input": []}, 422, "input: expected at least one"),
        ({"input": ["Anna", ""]}, 422, "text 1"),
        ({"input": "Anna", "model": "gpt"}, 404, "this server has 'text-embedding'"),
        ({"input": "Anna", "dimensions": 256}, 422, "dimensions: expected 6"),
        ({"input": "Anna", "encoding_format": "hex"}, 422, "encoding_format"),
        ({"model": "text-embedding"}, 422, "input"),
    ],
)
def test_what_openais_route_cannot_do_it_says(serve, body, status, said):
    assert said in serve("text-embedding").ask("/v1/embeddings", body, status)["error"]


# --- rerank -----------------------------------------------------------------------------------------------------------

QUERY = "Anna in Peru"


def test_texts_are_ranked_best_first(serve):
    task = serve("text-pair")
    scores = task.outputs([(QUERY, text) for text in TEXTS])["score"]
    ranks = task.ask("/rerank", {"query": QUERY, "texts": TEXTS})
    assert [rank["index"] for rank in ranks] == np.argsort(-scores, kind="stable").tolist()
    assert close([rank["score"] for rank in ranks], sorted(scores.tolist(), reverse=True))
    assert {tuple(rank) for rank in ranks} == {("index", "score")}

    raw = task.ask("/rerank", {"query": QUERY, "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert [rank["text"] for rank in raw] == [TEXTS[rank["index"]] for rank in raw]
    logits = np.array([rank["score"] for rank in raw])
    assert (np.diff(logits) <= 0).all()
    assert logits.max() > 1
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), [rank["score"] for rank in ranks], atol=1e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"query": QUERY, "texts": []}, "texts: expected at least one"),
        ({"query": " ", "texts": ["Anna"]}, "query 0"),
        ({"query": QUERY, "texts": ["Anna", ""]}, "text 1"),
        ({"query": QUERY, "texts": [LONG], "truncate": False}, "longer than the model's window"),
        ({"query": QUERY, "texts": ["Anna"], "truncation_direction": "Left"}, "truncation_direction"),
        ({"texts": ["Anna"]}, "query"),
    ],
)
def test_what_rerank_cannot_do_it_says(serve, body, said):
    assert said in serve("text-pair").ask("/rerank", body, 422)["error"]


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_is_classified_from_its_file(serve, kind):
    task = serve("image-classification")
    files = [picture(40 + seed, 30, kind, seed=seed) for seed in range(8)]

    def ask(file: bytes) -> dict:
        response = task.client.post("/predict", content=file, headers={"content-type": f"image/{kind.lower()}"})
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, files))
    expected = task.predictions(files)
    assert close(found, [label(each) for each in expected])
    assert len({each.label for each in expected}) > 1


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (picture(), "image/gif", 415),
        (picture(), "application/json", 415),
        (b"", "image/png", 422),
        (picture()[:-30], "image/png", 422),
        (picture(kind="GIF"), "image/png", 422),
        (picture(5000, 4000, mode="L"), "image/png", 413),
    ],
)
def test_what_is_no_image_is_refused(serve, content, kind, status):
    if status == 413:
        content = picture_of_nothing(5000, 4000)
        assert len(content) < PATIENT["max_body_bytes"]
    response = serve("image-classification").client.post("/predict", content=content, headers={"content-type": kind})
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]


def picture_of_nothing(width: int, height: int) -> bytes:
    """A small file of many pixels."""
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


# --- every task -------------------------------------------------------------------------------------------------------


def triton_inputs(name: str) -> dict[str, list[bytes]]:
    if name == "image-classification":
        return {"image": [picture(30, 20, seed=seed) for seed in range(3)]}
    texts = {"text": [text.encode() for text in TEXTS]}
    return texts | {"query": [QUERY.encode()] * len(TEXTS)} if name == "text-pair" else texts


@pytest.mark.parametrize("name", task_models.BUILD)
def test_every_task_is_served_over_the_open_inference_protocol(serve, name):
    task = serve(name)
    model = task.model.artifact.manifest.name
    inputs = []
    for key, values in triton_inputs(name).items():
        given = triton.InferInput(key, [len(values)], "BYTES")
        given.set_data_from_numpy(np.array(values, object))
        inputs.append(given)
    client = triton.InferenceServerClient(task.server.url.removeprefix("http://"), network_timeout=600)
    answer = client.infer(model, inputs)
    rows = list(triton_inputs(name).values())
    encoded = task.model.task.read({key: np.array(values, object) for key, values in triton_inputs(name).items()})
    expected = task.outputs(encoded)
    assert len(encoded) == len(rows[0])
    declared = {spec["name"]: spec for spec in client.get_model_metadata(model)["outputs"]}
    assert list(declared) == list(expected)
    for output, values in expected.items():
        found = answer.as_numpy(output)
        assert len(declared[output]["shape"]) == found.ndim
        if values.dtype == object:
            assert [each.decode() for each in found] == values.tolist()
        else:
            np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4)


PATHS = {
    "text-classification": {"/predict", "/predict/batch"},
    "text-embedding": {"/embed", "/v1/embeddings"},
    "text-pair": {"/rerank"},
    "text-regression": {"/predict", "/predict/batch"},
    "token-classification": {"/predict", "/predict/batch"},
    "image-classification": {"/predict"},
}


@pytest.mark.parametrize("name", PATHS)
def test_the_document_has_the_routes_of_the_task_and_any_other_is_not_found_and_names_them(serve, name):
    task = serve(name)
    model = task.model.artifact.manifest.name
    document = task.client.get("/openapi.json").json()["paths"]
    assert PATHS[name] == {path for path in document if path in LABELS}
    infer = "/v2/models/{model_name}/infer"
    assert infer in document
    media = document[next(iter(PATHS[name]))]["post"]["requestBody"]["content"]
    assert set(media) == ({"image/jpeg", "image/png"} if "image" in name else {"application/json"})
    for path in set().union(*PATHS.values()) - PATHS[name]:
        error = task.ask(path, {}, 404)["error"]
        assert error.startswith(f"this model's task is {name}: use ")
        named = set(error.partition("use ")[2].split(", "))
        assert named == {f"POST {path}" for path in PATHS[name]} | {f"POST /v2/models/{model}/infer"}
        assert task.server.metric("inference_requests_total", route=path, code="404") >= 1


@pytest.mark.parametrize("name", task_models.BUILD)
def test_every_answer_is_in_the_shape_that_the_document_says(serve, name):
    import jsonschema

    task = serve(name)
    document = task.client.get("/openapi.json").json()["paths"]
    bodies: dict[str, Any] = {
        "/predict": {"text": TEXTS[1]},
        "/predict/batch": {"texts": TEXTS},
        "/embed": {"inputs": TEXTS},
        "/v1/embeddings": {"input": TEXTS, "encoding_format": "base64"},
        "/rerank": {"query": QUERY, "texts": TEXTS, "return_text": True},
    }
    for path, body in bodies.items():
        if path in document:
            described = document[path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
            if "image" in name:
                answer = task.client.post(path, content=picture(), headers={"content-type": "image/png"}).json()
            else:
                answer = task.ask(path, body)
            jsonschema.validate(answer, described)


@pytest.mark.parametrize("name", task_models.BUILD)
def test_every_example_of_a_request_is_answered_as_its_example_says_and_every_error_has_one(serve, name):
    task = serve(name)
    for path, item in task.client.get("/openapi.json").json()["paths"].items():
        for method, operation in item.items():
            examples = {}
            for status, response in operation["responses"].items():
                (content,) = response["content"].values()
                examples[status] = content["example"]
            assert all("error" in example for status, example in examples.items() if status >= "400")
            parts = {part["name"]: part["example"] for part in operation["parameters"]}
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            if method == "post" and (body is None or "binary_data_size" in str(body)):
                assert "image" in name  # a file
                continue
            answer = task.client.request(method, path.format(**parts), json=body)
            assert answer.status_code == 200, (path, answer.text)
            if path != "/metrics":
                assert type(answer.json()) is type(examples["200"])
                assert list(answer.json()) == list(examples["200"]) or isinstance(examples["200"], list), path


def test_the_servers_are_well_after_all_of_that(serve):
    for name in task_models.BUILD:
        server = serve(name).server
        assert server.get("/live").status_code == 200
        assert [line for line in server.logs() if line.get("event") == "unhandled"] == []
        assert server.errors() == ""
        assert server.metric("inference_requests_in_flight") == 0


@pytest.mark.parametrize("name", ["token-classification", "text-pair", "image-classification", "text-embedding"])
def test_tasks_are_served_by_several_http_processes_as_well(tmp_path, name):
    folder = task_models.BUILD[name](tmp_path / "artifact")
    with ServerProcess(folder, http_processes=2, **PATIENT) as process:
        task = Task(process.ready(), load_model(folder))
        if name == "token-classification":
            expected = [entities(each) for each in task.predictions(list(TEXTS[:3]))]
            assert close(task.ask("/predict/batch", {"texts": TEXTS[:3]}), {"predictions": expected})
        elif name == "text-pair":
            scores = task.outputs([(QUERY, text) for text in TEXTS])["score"].tolist()
            found = task.ask("/rerank", {"query": QUERY, "texts": TEXTS})
            assert close([rank["score"] for rank in found], sorted(scores, reverse=True))
        elif name == "text-embedding":
            expected = task.outputs(list(TEXTS))["embedding"].tolist()
            assert close(task.ask("/embed", {"inputs": TEXTS}), expected)
        else:
            response = task.client.post("/predict", content=picture(), headers={"content-type": "image/png"})
            assert close(response.json(), label(task.predictions([picture()])[0]))
        task.client.close()
