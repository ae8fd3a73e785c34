"""Relations that make the server fast, each within one run on whatever machine this is; `make bench` has numbers."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from loadtest.benchmark import bench
from loadtest.benchmark.bench import Running, closed, free_model, service, serving, uvicorn_command
from loadtest.client import open_loop
from loadtest.texts import sentences
from tests.process import BUNDLED

SECONDS = 2.5
PATIENCE_SECONDS = 60
GROWTH_BYTES = 16 * 2**20
TEXTS = sentences(1024, seed=2)


@pytest.fixture(scope="module")
def bundled() -> Iterator[Running]:
    with serving(*service(BUNDLED, max_queue_wait_ms=600_000, request_timeout_ms=600_000)) as running:
        yield running


def metrics_source(running: Running) -> dict[str, float]:
    text = httpx.get(f"http://{bench.HOST}:{running.port}/metrics").text
    return {
        sample.name + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if family.name.startswith("inference_")
    }


def under(running: Running, connections: int) -> tuple[dict[str, float], dict[str, float]]:
    """The client's summary of a closed loop, and what each metric gained by it."""
    before = metrics_source(running)
    summary = closed(running, running.requests(TEXTS), connections, SECONDS)
    gained = {name: value - before[name] for name, value in metrics_source(running).items()}
    assert summary["refused_per_second"] == summary["unanswered"] == 0
    return summary, gained


def test_a_crowd_shares_runs_and_rows_of_a_run_are_of_similar_length(bundled: Running) -> None:
    _, gained = under(bundled, 64)
    assert gained["inference_batch_rows_sum"] >= 4 * gained["inference_run_seconds_count"]
    real, padding = gained["inference_tokens_totalreal"], gained["inference_tokens_totalpadding"]
    assert padding <= 0.2 * (real + padding)
    # As they come, eight at a time, the same texts would be more than a third padding.
    lengths = [len(text) for text in TEXTS]
    eights = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
    assert sum(lengths) < 0.65 * sum(max(eight) * 8 for eight in eights)


def test_a_client_alone_never_waits_for_company(bundled: Running) -> None:
    _, gained = under(bundled, 1)
    assert gained["inference_batch_rows_sum"] == gained["inference_run_seconds_count"] > 0
    assert gained["inference_queue_wait_seconds_sum"] < gained["inference_run_seconds_sum"]


def test_a_crowd_costs_hardly_more_cpu_for_each_request_than_a_client_alone(bundled: Running) -> None:
    crowd, alone = under(bundled, 64)[0], under(bundled, 1)[0]
    # Less, as measured, where nobody else uses the machine.
    assert crowd["server_cpu_ms_per_request"] < 1.5 * alone["server_cpu_ms_per_request"]


def test_all_but_the_model_costs_a_few_times_what_a_web_server_with_a_constant_answer_does(tmp_path: Path) -> None:
    with serving(*service(free_model(tmp_path))) as running:
        ours, _ = under(running, 64)
    floor = uvicorn_command(
        "loadtest.benchmark.floor:app", 1, "--loop", "uvloop", "--http", "httptools", "--no-server-header"
    )
    with serving(floor, "/", {}) as running:
        least = closed(running, running.requests(TEXTS), 64, SECONDS)
    # About six times as measured: tokens, queue, two threads, batch, metrics, a log line.
    assert ours["server_cpu_ms_per_request"] < 12 * least["server_cpu_ms_per_request"]


class Probes:
    """A kubelet and a Prometheus, in a thread: what they were answered."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{bench.HOST}:{port}"
        self.statuses: Counter[tuple[str, int]] = Counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        # A connection for each probe, as the kubelet's.
        while not self._over.wait(0.2):
            for path in ("/live", "/metrics"):
                self.statuses[path, httpx.get(self.url + path, timeout=PATIENCE_SECONDS).status_code] += 1

    def __enter__(self) -> "Probes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_five_times_its_capacity_leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--overload-seconds")
    bench.allow_connections()
    with serving(*service(BUNDLED, max_queue_wait_ms=100)) as running:
        requests = running.requests(TEXTS)
        capacity = closed(running, requests, 16, SECONDS)["requests_per_second"]

        def overload() -> dict[str, float]:
            with Probes(running.port) as probes:
                # Few enough that their number does not show in memory.
                load = open_loop(bench.HOST, running.port, requests, 5 * capacity, seconds, PATIENCE_SECONDS, 512)
                outcome = uvloop.run(load)
            assert outcome.unanswered == 0
            # None was cut off (0) or failed.
            assert {200, 503} <= set(outcome.statuses) <= {200, 503, 504}
            assert set(probes.statuses) == {("/live", 200), ("/metrics", 200)}
            return outcome.summary()

        overload()
        before = running.resident_bytes()
        summary = overload()
        grown = running.resident_bytes() - before
        assert grown <= GROWTH_BYTES, f"{grown / 2**20:.1f} MiB more"
        after = metrics_source(running)
        assert after["inference_requests_in_flight"] == after["inference_queue_rows"] == 0
        # The load has left no trace in how it answers.
        again = closed(running, requests, 16, SECONDS)
        assert again["refused_per_second"] == 0
        print(
            f"{seconds:g} s at 5 x {capacity:.0f} requests/s: goodput within 250 ms "
            f"{summary['goodput_250ms_per_second'] / capacity:.2f}, refusal p99 {summary['refusal_p99_ms']:.0f} ms, "
            f"{grown / 2**20:+.1f} MiB resident, then {again['requests_per_second'] / capacity:.2f} of capacity"
        )
