"""A real Prometheus scrapes a real server under load; what HPA, KEDA, dashboard and alerts ask gets sane answers."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from app import NAME
from loadtest.benchmark.server import free_port
from tests.deploy.alerts.cluster import KUBE_STATE_METRICS, Autoscaler, Pod, Workload, selector
from tests.deploy.test_k8s_rules import (
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
CLUSTER = list(Workload([Pod()], namespace=NAME, autoscaler=Autoscaler(desired=1, current=1)).series())
# Its one Pod, as podmonitor.yaml labels it.
(TARGET,) = (labels for name, labels, _ in CLUSTER if name == "up")
# What kube-state-metrics tells of it at first.
TOLD = [
    f"{selector(name, labels)} {float(now)}\n"
    for name, labels, (now, *_) in CLUSTER
    if name in KUBE_STATE_METRICS and now is not None
]
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


class KubeStateMetrics(BaseHTTPRequestHandler):
    """Answers a scrape with what kube-state-metrics would tell of the cluster."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write("".join(TOLD).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def kube_state_metrics() -> Iterator[str]:
    """Its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), KubeStateMetrics)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with the shipped rules, after some scrapes of a server under load; labels as a PodMonitor gives."""
    binary = tool("prometheus", "apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    stop = threading.Event()
    with ServerProcess(text_model(reference=True)) as server, kube_state_metrics() as cluster:
        server.ready()
        target = {"targets": [f"127.0.0.1:{server.port}"], "labels": TARGET}
        configuration = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {"job_name": "pods", "static_configs": [target]},
                {"job_name": "cluster", "honor_labels": True, "static_configs": [{"targets": [cluster]}]},
            ],
        }
        (folder / "rules.yaml").write_text(json.dumps({"groups": rules()}))
        (folder / "prometheus.yaml").write_text(json.dumps(configuration))
        port = free_port()
        process = start(binary, folder, port)
        clients = [threading.Thread(target=ask, args=(server.url, stop)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            api = Prometheus(f"http://127.0.0.1:{port}")
            # Recorded from rates, which need some scrapes under load.
            api.wait_for("count_over_time(namespace_track:inference_runner_busy:ratio_rate5m[1m]) > 5")
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
    ((labels, of_pod),) = prometheus.query(adapter_query(f'namespace="{NAME}",pod=~"{TARGET["pod"]}|another"'))
    ((_, total),) = prometheus.query(keda_query())

    assert labels == {"pod": TARGET["pod"]}
    # One Pod: the mean over Pods and the sum over them are one number, but for a scrape between the two queries.
    assert 0 <= of_pod <= CLIENTS
    assert 0 <= total <= CLIENTS


@pytest.mark.parametrize("name", recorded())
def test_every_recording_rule_records(prometheus: Prometheus, name: str) -> None:
    for labels, value in prometheus.wait_for(f"{name} >= 0"):
        # What holds for all namespaces has none.
        assert labels.get("namespace", NAME) == NAME
        assert value >= 0
        assert value <= 1.1 or ":ratio" not in name


def test_the_queries_tell_the_load_that_was_sent(prometheus: Prometheus) -> None:
    ((_, errors),) = prometheus.query("namespace_track:inference_errors:ratio_rate5m")
    ((_, busy),) = prometheus.query("namespace_track:inference_runner_busy:ratio_rate5m")
    p95 = {
        labels["route"]: value
        for labels, value in prometheus.query("namespace_track_route:inference_request_duration_seconds:p95_5m >= 0")
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
