"""What holds while a server has more to do than it can. What is measured, on whatever machine this is, belongs to
`make soak`; `make bench` has the numbers.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest.benchmark import free_model, server
from loadtest.benchmark.load import allow_connections, closed, opened
from loadtest.benchmark.server import Running, service, serving
from loadtest.client import Client
from loadtest.connection import Target
from loadtest.texts import sentences
from tests.process import ServerProcess
from tests.text_model import SLOW, text_model

SECONDS = 2.5
PATIENCE_SECONDS = 60
GROWTH_BYTES = 16 * 2**20
TEXTS = sentences(1024, seed=2)


def settled(url: str) -> dict[str, float]:
    """The server's own metrics, once nothing is in flight: what came before is then counted."""
    limit = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = {
            sample.name + "".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
            for sample in family.samples
            if family.name.startswith("inference_")
        }
        if found["inference_requests_in_flight"] == found["inference_queue_rows"] == 0:
            return found
        assert time.monotonic() < limit, "something is in flight for ever"
        time.sleep(0.05)


class Probes:
    """A kubelet and a Prometheus, in a thread: what they were answered."""

    def __init__(self, url: str) -> None:
        self.url = url
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


async def test_clients_that_do_not_wait_after_a_refusal_leave_nothing_behind() -> None:
    with ServerProcess(text_model(SLOW), max_queue_rows=8).ready() as process, Probes(process.url) as probes:
        target = Target.of(f"{process.url}/predict")
        client = Client(target, [target.post(b'{"text": "It rains."}')], back_off_seconds=0.0)
        client.hold(64)
        while len(client.answers.statuses) < 2000 or ("/metrics", 200) not in probes.statuses:
            await asyncio.sleep(0.01)
        client.hold(0)
        await client.drain(PATIENCE_SECONDS)
        await client.close()
        found = await asyncio.to_thread(settled, process.url)
        statuses = Counter(client.answers.statuses)
        # None was cut off (0) or failed, and every one was counted.
        assert set(statuses) == {200, 503}
        assert process.metric("inference_requests_total", route="/predict", code="200") == statuses[200]
        assert found["inference_batch_rows_sum"] == statuses[200]
    assert set(probes.statuses) == {("/live", 200), ("/metrics", 200)}


@pytest.fixture(scope="module")
def heavy() -> Iterator[Running]:
    with serving(service(text_model(SLOW), max_queue_wait_ms=600_000, request_timeout_ms=600_000)) as running:
        yield running


def under(running: Running, connections: int) -> tuple[dict[str, float], dict[str, float]]:
    """The client's summary of a closed loop, and what each metric gained by it."""
    before = settled(running.url)
    summary = closed(running, TEXTS, connections, SECONDS)
    gained = {name: value - before[name] for name, value in settled(running.url).items()}
    assert summary["refused_per_second"] == 0
    return summary, gained


@pytest.mark.soak
def test_a_crowd_shares_runs_and_rows_of_a_run_are_of_similar_length(heavy: Running) -> None:
    _, gained = under(heavy, 64)
    assert gained["inference_batch_rows_sum"] >= 4 * gained["inference_run_seconds_count"]
    real, padding = gained["inference_tokens_totalreal"], gained["inference_tokens_totalpadding"]
    assert padding <= 0.2 * (real + padding)
    # As they come, eight at a time, the same texts would be more than a third padding.
    lengths = [len(text) for text in TEXTS]
    eights = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
    assert sum(lengths) < 0.65 * sum(max(eight) * 8 for eight in eights)


@pytest.mark.soak
def test_a_client_alone_never_waits_for_company(heavy: Running) -> None:
    _, gained = under(heavy, 1)
    assert gained["inference_batch_rows_sum"] == gained["inference_run_seconds_count"] > 0
    assert gained["inference_queue_wait_seconds_sum"] < gained["inference_run_seconds_sum"]


@pytest.mark.soak
def test_a_crowd_costs_hardly_more_cpu_for_each_request_than_a_client_alone(heavy: Running) -> None:
    crowd, alone = under(heavy, 64)[0], under(heavy, 1)[0]
    # Less, as measured, where nobody else uses the machine.
    assert crowd["server_cpu_ms_per_request"] < 1.5 * alone["server_cpu_ms_per_request"]


@pytest.mark.soak
def test_all_but_the_model_costs_a_few_times_what_a_web_server_with_a_constant_answer_does(tmp_path: Path) -> None:
    with serving(service(free_model.write(tmp_path))) as running:
        ours, _ = under(running, 64)
    with serving(server.floor()) as running:
        least = closed(running, TEXTS, 64, SECONDS)
    # About six times as measured: tokens, queue, two threads, batch, metrics, a log line.
    assert ours["server_cpu_ms_per_request"] < 12 * least["server_cpu_ms_per_request"]


@pytest.mark.soak
def test_five_times_its_capacity_leaves_nothing_behind(request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--overload-seconds")
    allow_connections()
    with serving(service(text_model(SLOW), max_queue_wait_ms=100)) as running:
        capacity = closed(running, TEXTS, 16, SECONDS)["requests_per_second"]

        def overload() -> dict[str, float]:
            with Probes(running.url) as probes:
                # Few enough that their number does not show in memory.
                summary = opened(running, TEXTS, 5 * capacity, seconds, PATIENCE_SECONDS, max_connections=512)
            assert summary["unanswered"] == 0
            # None was cut off (0) or failed.
            statuses = {name for name in summary if name.startswith("status_")}
            assert {"status_200", "status_503"} <= statuses <= {"status_200", "status_503", "status_504"}
            assert set(probes.statuses) == {("/live", 200), ("/metrics", 200)}
            return summary

        overload()
        before = psutil.Process(running.pid).memory_info().rss
        summary = overload()
        grown = psutil.Process(running.pid).memory_info().rss - before
        assert grown <= GROWTH_BYTES, f"{grown / 2**20:.1f} MiB more"
        settled(running.url)
        # The load has left no trace in how it answers.
        again = closed(running, TEXTS, 16, SECONDS)
        assert again["refused_per_second"] == 0
        print(
            f"{seconds:g} s at 5 x {capacity:.0f} requests/s: goodput within 250 ms "
            f"{summary['goodput_250ms_per_second'] / capacity:.2f}, refusal p99 {summary['refusal_p99_ms']:.0f} ms, "
            f"{grown / 2**20:+.1f} MiB resident, then {again['requests_per_second'] / capacity:.2f} of capacity"
        )
