"""The metrics of the contract: their names and labels, and that their numbers agree with what clients saw."""

import asyncio
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from app.http.routes import LABELS
from app.telemetry.metrics import GpuMetrics, Metrics
from tests.process import ServerProcess
from tests.text_model import NAME, text_model

# Dashboards, alerts, autoscaling and the load test use these names: name → type, labels.
CONTRACT: dict[str, tuple[str, tuple[str, ...]]] = {
    "inference_requests_total": ("counter", ("route", "code")),
    "inference_request_duration_seconds": ("histogram", ("route",)),
    "inference_requests_in_flight": ("gauge", ()),
    "inference_queue_rows": ("gauge", ()),
    "inference_queue_wait_seconds": ("histogram", ()),
    "inference_run_seconds": ("histogram", ()),
    "inference_batch_rows": ("histogram", ()),
    "inference_tokens_total": ("counter", ("kind",)),
    "inference_runners": ("gauge", ()),
    "inference_runner_busy_seconds_total": ("counter", ()),
    "inference_rejected_total": ("counter", ("reason",)),
    "inference_request_bytes": ("histogram", ()),
    "inference_predictions_total": ("counter", ("label",)),
    "inference_prediction_score": ("histogram", ()),
    "log_lines_dropped_total": ("counter", ()),
    "model_reference_prediction_ratio": ("gauge", ("label",)),
    "model_load_seconds": ("gauge", ("stage",)),
    "model_ready": ("gauge", ()),
    "model_info": ("gauge", ("name", "version", "digest", "provider", "precision")),
}
GPU_CONTRACT = ("gpu_utilization_ratio", "gpu_memory_used_bytes", "gpu_memory_total_bytes", "gpu_power_watts")
ROUTES = ("/predict", "/predict/batch", "/embed", "/v1/embeddings", "/rerank", "/jobs", "/v2/models/infer")
CODES = ("200", "400", "401", "403", "404", "405", "408", "413", "415", "422", "429", "499", "500", "503", "504")
REASONS = (
    *("invalid", "unauthorized", "body_timeout", "body_too_large", "too_many_rows", "client_closed", "queue_full"),
    *("late", "not_ready", "draining", "memory", "deadline"),
)
PATIENCE_SECONDS = 30
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def text_of(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


@pytest.fixture(scope="module")
def fresh() -> str:
    return text_of(Metrics(LABELS))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    # A patient deadline: on a slow machine no request of these tests is to be refused.
    with ServerProcess(request_timeout_ms=60_000) as process:
        yield process.ready()


def scrape(server: ServerProcess) -> Samples:
    return parse(server.get("/metrics").text)


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.005)


def assert_idle(server: ServerProcess) -> None:
    """Waits for the gauges: the server notices that a client has left only when it looks."""
    until(lambda: server.metric("inference_requests_in_flight") == 0)
    until(lambda: server.metric("inference_queue_rows") == 0)


# --- names and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTRACT)
def test_every_metric_of_the_contract_exists_with_its_type_and_a_description(fresh: str, name: str) -> None:
    kind, _ = CONTRACT[name]
    assert f"# TYPE {name} {kind}\n" in fresh
    (description,) = [line for line in fresh.splitlines() if line.startswith(f"# HELP {name} ")]
    assert len(description.split()) > 3


def test_there_are_no_inference_or_model_metrics_beside_the_contract(fresh: str) -> None:
    names = {line.split()[2] for line in fresh.splitlines() if line.startswith("# TYPE ")}
    ours = {
        name for name in names if name.startswith(("inference_", "model_", "gpu_", "log_")) and "_created" not in name
    }
    assert ours == set(CONTRACT)


def test_every_label_value_is_there_before_the_first_request(fresh: str) -> None:
    samples = parse(fresh)
    expected = [
        *(key("inference_requests_total", route=route, code=code) for route in ROUTES for code in CODES),
        *(key("inference_request_duration_seconds_count", route=route) for route in ROUTES),
        *(key("inference_tokens_total", kind=kind) for kind in ("real", "padding")),
        *(key("inference_rejected_total", reason=reason) for reason in REASONS),
        *(key("model_load_seconds", stage=stage) for stage in ("signature", "verifying", "loading", "warming")),
    ]
    assert [sample for sample in expected if samples.get(sample) != 0] == []


def test_label_names_are_those_of_the_contract_and_their_values_are_closed(fresh: str) -> None:
    found: dict[str, set[frozenset[tuple[str, str]]]] = {}
    for name, labels in parse(fresh):
        found.setdefault(name, set()).add(labels)
    assert len(found["inference_requests_total"]) == len(ROUTES) * len(CODES)
    assert len(found["inference_rejected_total"]) == len(REASONS)
    for name, (kind, labels) in CONTRACT.items():
        sample = f"{name}_count" if kind == "histogram" else name
        for values in found.get(sample, ()):
            assert {label for label, _ in values} == set(labels), name


def test_gpu_metrics_are_those_of_the_contract_and_only_there_with_a_gpu(fresh: str) -> None:
    assert "gpu_" not in fresh
    metrics = Metrics(LABELS)
    GpuMetrics(metrics.registry)
    text = text_of(metrics)
    for name in GPU_CONTRACT:
        assert f"# TYPE {name} gauge\n" in text


def test_two_applications_in_one_process_do_not_add_up() -> None:
    one, other = Metrics(LABELS), Metrics(LABELS)
    one.in_flight.inc()
    assert parse(text_of(other))[key("inference_requests_in_flight")] == 0


def test_the_queue_gauge_is_read_when_scraped() -> None:
    metrics, rows = Metrics(LABELS), [3]
    metrics.queue_rows.set_function(lambda: rows[0])
    assert parse(text_of(metrics))[key("inference_queue_rows")] == 3
    rows[0] = 0
    assert parse(text_of(metrics))[key("inference_queue_rows")] == 0


# --- a running server -------------------------------------------------------------------------------------------------


def test_a_scrape_is_prometheus_text_with_the_process_in_it(server: ServerProcess) -> None:
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = parse(response.text)
    assert samples[key("process_resident_memory_bytes")] > 0
    assert set(parse(text_of(Metrics(LABELS)))) <= set(samples)


def test_the_model_is_described(server: ServerProcess) -> None:
    manifest = json.loads((text_model() / "manifest.json").read_text())
    samples = scrape(server)
    assert samples[key("model_ready")] == 1
    assert samples[key("inference_runners")] >= 1
    ((_, labels),) = [sample for sample in samples if sample[0] == "model_info"]
    info = dict(labels)
    assert (info["name"], info["version"], info["provider"]) == (manifest["name"], manifest["version"], "cpu")
    assert info["precision"] == manifest["precision"]
    assert len(info["digest"]) == 64
    for stage in ("verifying", "loading", "warming"):
        assert samples[key("model_load_seconds", stage=stage)] > 0


def test_counts_agree_with_what_many_clients_at_once_were_answered(server: ServerProcess) -> None:
    tokenizer = Tokenizer.from_file(str(text_model() / "tokenizer.json"))
    texts = ["a fine day", "the kettle took its time but the tea was worth every minute of it", "no", "well, well!"]
    infer = f"/v2/models/{NAME}/infer"

    def tensor(rows: list[str]) -> dict[str, object]:
        return {"inputs": [{"name": "text", "shape": [len(rows)], "datatype": "BYTES", "data": rows}]}

    # Path, route label, JSON body, texts that the model is to see.
    kinds: list[tuple[str, str, object, list[str]]] = [
        ("/predict", "/predict", {"text": texts[0]}, texts[:1]),
        ("/predict", "/predict", {"text": texts[1]}, texts[1:2]),
        ("/predict", "/predict", {"text": "   "}, []),
        ("/predict", "/predict", {"text": 3}, []),
        ("/predict", "/predict", b"{", []),
        ("/predict/batch", "/predict/batch", {"texts": texts}, texts),
        ("/predict/batch", "/predict/batch", {"texts": []}, []),
        ("/predict/batch", "/predict/batch", {"texts": ["x"] * 513}, []),
        (infer, "/v2/models/infer", tensor(texts[:3]), texts[:3]),
        (infer, "/v2/models/infer", tensor([]), []),
        ("/v2/models/unknown/infer", "/v2/models/infer", b"", []),
    ]
    seen: Counter[tuple[str, str]] = Counter()
    rows = tokens = body_bytes = 0
    lock = threading.Lock()

    def client(offset: int) -> None:
        nonlocal rows, tokens, body_bytes
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for number in range(44):
                path, route, body, accepted = kinds[(offset + number) % len(kinds)]
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                response = http.post(path, content=content, headers={"content-type": "application/json"})
                assert response.status_code == 200 or not accepted, response.text
                with lock:
                    seen[route, str(response.status_code)] += 1
                    rows += len(accepted)
                    tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(accepted))
                    body_bytes += len(content)

    before = scrape(server)
    threads = [threading.Thread(target=client, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_idle(server)
    after = scrape(server)

    def gained(name: str, **labels: str) -> float:
        return after[key(name, **labels)] - before[key(name, **labels)]

    assert {code for _, code in seen} == {"200", "400", "404", "422", "429"}
    counted = {
        (route, code): gained("inference_requests_total", route=route, code=code)
        for route, code in itertools.product(ROUTES, CODES)
    }
    assert {pair: count for pair, count in counted.items() if count} == dict(seen)
    for route in ROUTES:
        sent = sum(count for (label, _), count in seen.items() if label == route)
        assert gained("inference_request_duration_seconds_count", route=route) == sent
    refused = Counter(code for (_, code), count in seen.items() for _ in range(count))
    assert gained("inference_rejected_total", reason="invalid") == refused["400"] + refused["404"] + refused["422"]
    assert gained("inference_rejected_total", reason="too_many_rows") == refused["429"]
    assert gained("inference_batch_rows_sum") == rows
    assert gained("inference_queue_wait_seconds_count") == rows
    assert gained("inference_tokens_total", kind="real") == tokens
    assert gained("inference_run_seconds_count") == gained("inference_batch_rows_count") <= rows
    assert gained("inference_runner_busy_seconds_total") == pytest.approx(gained("inference_run_seconds_sum"))
    assert 0 < gained("inference_request_bytes_count") <= sum(seen.values())
    assert gained("inference_request_bytes_sum") == body_bytes


def test_padding_is_counted_apart_from_real_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(text_model() / "tokenizer.json"))
    texts = ["short", "this is longer", "short"]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    requests = 10
    with ServerProcess(runners=1).ready() as server:
        before = scrape(server)
        for _ in range(requests):
            httpx.post(f"{server.url}/predict/batch", json={"texts": texts}).raise_for_status()
        after = scrape(server)

    def counted(name: str, **labels: str) -> float:
        return after[key(name, **labels)] - before[key(name, **labels)]

    # One run, if padding costs less than a second one as measured in warm-up; else two.
    together = 2 * requests - counted("inference_run_seconds_count")
    assert 0 <= together <= requests
    assert counted("inference_tokens_total", kind="real") == requests * sum(lengths)
    assert counted("inference_tokens_total", kind="padding") == together * (3 * max(lengths) - sum(lengths))


@pytest.mark.parametrize("http_processes", [1, 2])
def test_predictions_are_counted_once_by_label_whatever_the_route_and_beside_their_reference(
    http_processes: int,
) -> None:
    labels = ("negative", "positive")
    bad, good = "an awful day", "a lovely day"
    tensor = {"name": "text", "shape": [3], "datatype": "BYTES", "data": [good, bad, good]}
    served = ServerProcess(text_model(reference=True), http_processes=http_processes)
    with served.ready() as server, httpx.Client(base_url=server.url) as http:
        before = scrape(server)
        scores = [http.post("/predict", json={"text": text}).json()["score"] for text in (bad, good)]
        answers = http.post("/predict/batch", json={"texts": [bad, bad, good]}).json()["predictions"]
        outputs = http.post(f"/v2/models/{NAME}/infer", json={"inputs": [tensor]}).json()["outputs"]
        assert http.post("/predict", json={"text": " "}).status_code == 422
        after = scrape(server)
    scores += [answer["score"] for answer in answers] + outputs[1]["data"]

    assert [before[key("inference_predictions_total", label=label)] for label in labels] == [0, 0]
    assert [after[key("inference_predictions_total", label=label)] for label in labels] == [4, 4]
    assert after[key("inference_prediction_score_count")] == 8
    assert after[key("inference_prediction_score_sum")] == pytest.approx(sum(scores))
    assert [after[key("model_reference_prediction_ratio", label=label)] for label in labels] == [0.5, 0.5]


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_clients_that_leave_bring_the_gauges_back_and_are_counted(server: ServerProcess, reset: bool) -> None:
    closed = key("inference_requests_total", route="/predict", code="499")
    left = key("inference_rejected_total", reason="client_closed")
    before = scrape(server)
    sockets = []
    for _ in range(10):
        client = socket.create_connection(("127.0.0.1", server.port))
        client.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
        )
        sockets.append(client)
    until(lambda: server.metric("inference_requests_in_flight") == 10)
    for client in sockets:
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()
    assert_idle(server)
    after = scrape(server)
    assert after[closed] - before[closed] == 10
    assert after[left] - before[left] == 10


def test_clients_that_leave_while_their_rows_wait_bring_the_gauges_back(server: ServerProcess) -> None:
    async def leave(http: httpx.AsyncClient) -> None:
        task = asyncio.create_task(http.post("/predict/batch", json={"texts": ["slowly does it " * 40] * 24}))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            await asyncio.gather(*[leave(http) for _ in range(15)])

    asyncio.run(crowd())
    assert_idle(server)
    assert httpx.post(f"{server.url}/predict", json={"text": "still here"}).status_code == 200


def test_no_request_whatever_it_looks_like_makes_a_new_series(server: ServerProcess) -> None:
    before = set(scrape(server))
    with httpx.Client(base_url=server.url) as http:
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "BREW"):
            for path in ("/predict", "/predict/batch", "/predict/", "/nowhere", "/v2/models/any/infer", "/live/%ff"):
                http.request(method, path, headers={"x-request-id": f"{method}-{path[-3:]}"})
        http.post("/v2/models/another/versions/123/infer", json={})
        http.post("/predict", content=b"x", headers={"content-type": "text/plain"})
        http.post("/predict", content=b"x" * 5_000_000, headers={"content-type": "application/json"})
    assert set(scrape(server)) == before
    assert_idle(server)


def test_scrapes_and_probes_do_not_count_as_requests(server: ServerProcess) -> None:
    def counted() -> float:
        return sum(value for (name, _), value in scrape(server).items() if name == "inference_requests_total")

    before = counted()
    for path in ("/live", "/ready", "/metrics", "/v2", "/v2/health/ready", "/openapi.json", "/docs"):
        server.get(path).raise_for_status()
    assert counted() == before
