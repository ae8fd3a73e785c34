"""A real Prometheus scrapes a real server under load; what HPA, KEDA, dashboard and alerts ask gets sane answers."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loadtest.benchmark.server import free_port
from tests.deploy.test_k8s_rules import (
    QUALITY_RULES,
    adapter_query,
    alerts,
    dashboard_queries,
    hpa_metric,
    keda_query,
    recorded,
    rules,
)
from tests.manifests import tool
from tests.process import ServerProcess
from tests.text_model import text_model

PATIENCE_SECONDS = 60
CLIENTS = 4
Result = list[tuple[dict[str, str], float]]
# Only GPUs have these; only failures and refusals have those.
EMPTY_HERE = ("Utilization", "Power", "Refused by reason")
RATIOS = ("Share of errors", "Runners busy", "Padding")


class Prometheus:
    """A client of its query API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> Result:
        answer = httpx.post(f"{self.url}/api/v1/query", data={"query": expression})
        answer.raise_for_status()
        return [(each["metric"], float(each["value"][1])) for each in answer.json()["data"]["result"]]

    def wait_for(self, expression: str) -> Result:
        """The first answer that is not empty."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                if found := self.query(expression):
                    return found
            except httpx.HTTPError:
                pass  # not listening yet, or not ready
            time.sleep(0.2)
        raise AssertionError(f"no answer to {expression}")


def ask(url: str, stop: threading.Event) -> None:
    """One client: single texts and small batches of different lengths."""
    texts = [" ".join(["good"] * words) for words in (1, 5, 20, 60)]
    with httpx.Client(base_url=url) as client:
        while not stop.is_set():
            for text in texts:
                client.post("/predict", json={"text": text}).raise_for_status()
            client.post("/predict/batch", json={"texts": texts}).raise_for_status()
            stop.wait(0.05)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped rules, after some scrapes of a server under load; labels as a PodMonitor gives."""
    binary = tool("prometheus", "apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    stop = threading.Event()
    with ServerProcess(text_model(reference=True)) as server:
        server.ready()
        labels = {"namespace": "sentiment-inference", "pod": "sentiment-inference-1", "track": "stable"}
        target = {"targets": [f"127.0.0.1:{server.port}"], "labels": labels}
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "pods", "static_configs": [target]}],
        }
        (folder / "rules.yaml").write_text(json.dumps({"groups": [*rules(), *rules(QUALITY_RULES)]}))
        (folder / "prometheus.yaml").write_text(json.dumps(configuration))
        port = free_port()
        process = start(binary, folder, port)
        clients = [threading.Thread(target=ask, args=(server.url, stop)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            api = Prometheus(f"http://127.0.0.1:{port}")
            # Recorded from rates, which need some scrapes under load.
            api.wait_for("count_over_time(namespace:inference_runner_busy:ratio_rate5m[1m]) > 5")
            yield api
        finally:
            stop.set()
            for client in clients:
                client.join()
            process.terminate()
            process.wait()


def start(binary: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )


def test_the_hpa_and_keda_see_the_same_load(prometheus: Prometheus) -> None:
    assert prometheus.query(hpa_metric())
    ((labels, of_pod),) = prometheus.query(
        adapter_query('namespace="sentiment-inference",pod=~"sentiment-inference-1|another"')
    )
    ((_, total),) = prometheus.query(keda_query())

    assert labels == {"pod": "sentiment-inference-1"}
    # One Pod: the mean over Pods and the sum over them are one number, but for a scrape between the two queries.
    assert 0 <= of_pod <= CLIENTS
    assert 0 <= total <= CLIENTS


@pytest.mark.parametrize("name", recorded())
def test_every_recording_rule_records(prometheus: Prometheus, name: str) -> None:
    if name.startswith("namespace_reason:"):
        values = [value for _, value in prometheus.wait_for(name)]
        assert values
        assert not any(values)
        return
    (found, *more) = prometheus.wait_for(f"{name} >= 0")
    for labels, value in (found, *more):
        assert labels["namespace"] == "sentiment-inference"
        assert 0 <= value <= 10


def test_the_queries_tell_the_load_that_was_sent(prometheus: Prometheus) -> None:
    ((_, errors),) = prometheus.query("namespace:inference_errors:ratio_rate5m")
    ((_, busy),) = prometheus.query("namespace:inference_runner_busy:ratio_rate5m")
    p95 = {
        labels["route"]: value
        for labels, value in prometheus.query("namespace_route:inference_request_duration_seconds:p95_5m >= 0")
    }

    assert errors == 0
    assert 0 < busy <= 1.1  # rates at the edges of a run are extrapolated
    assert p95.keys() == {"/predict", "/predict/batch"}
    assert all(0 < seconds <= 10 for seconds in p95.values())


@pytest.mark.parametrize(("title", "query"), dashboard_queries(), ids=[title for title, _ in dashboard_queries()])
def test_every_panel_shows_something(prometheus: Prometheus, title: str, query: str) -> None:
    if query.startswith("gpu_") or title in EMPTY_HERE:
        assert prometheus.query(query) == []
        return
    found = prometheus.wait_for(query)

    for _, value in found:
        # No number: a quantile of a route that nobody used.
        assert value != value or value >= 0
        if title in RATIOS:
            assert value <= 1.1
    assert any(value == value for _, value in found)


def test_a_service_that_does_well_raises_no_alarm(prometheus: Prometheus) -> None:
    prometheus.wait_for("model_ready == 1")

    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    names = {
        rule["name"]
        for group in httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
        for rule in group["rules"]
    }
    assert alerts().keys() <= names
