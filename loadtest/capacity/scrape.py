"""Reads a server's `/metrics` and says what happened between two readings. Any server: what is not there is None."""

import asyncio
import os
import time
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.capacity.schema import ServerSide

SCRAPE_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class Reading:
    """All samples at one time, summed over the labels that are not asked for."""

    at: float
    samples: dict[str, list[tuple[dict[str, str], float]]]

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over the series with these labels; None if there is none."""
        values = [
            value
            for have, value in self.samples.get(name, ())
            if all(have.get(key) == want for key, want in labels.items())
        ]
        return sum(values) if values else None

    def labels(self, name: str) -> dict[str, str]:
        """Labels of the first series of that name."""
        series = self.samples.get(name)
        return series[0][0] if series else {}


def parse(text: str, at: float) -> Reading:
    """A reading from Prometheus text."""
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return Reading(at, samples)


class Scraper:
    """Readings of one server; for a local server without `process_*` metrics, CPU and memory from the system."""

    def __init__(self, metrics_url: str | None, url: str) -> None:
        self._url = metrics_url
        self._process = None if metrics_url is None else _listener(url)

    @staticmethod
    def default_url(url: str) -> str:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc}/metrics"

    async def read(self) -> Reading:
        """Now. A server that has no metrics gives an empty reading, never an error: it may be refusing everything."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> Reading:
        reading = Reading(time.perf_counter(), {})
        if self._url is not None:
            try:
                with urllib.request.urlopen(self._url, timeout=SCRAPE_TIMEOUT_SECONDS) as answer:  # noqa: S310
                    reading = parse(answer.read().decode(), time.perf_counter())
            except (OSError, ValueError):
                pass
        if self._process is not None and "process_cpu_seconds_total" not in reading.samples:
            try:
                times = self._process.cpu_times()
                reading.samples["process_cpu_seconds_total"] = [({}, times.user + times.system)]
                reading.samples["process_resident_memory_bytes"] = [({}, float(self._process.memory_info().rss))]
            except psutil.Error:
                pass
        return reading


def _listener(url: str) -> psutil.Process | None:
    """The process that listens on a loopback URL's port, if it can be seen and is not this one."""
    parts = urlsplit(url)
    if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        return None
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == parts.port and connection.pid:
                return psutil.Process(connection.pid) if connection.pid != os.getpid() else None
    except psutil.Error:
        pass
    return None


def between(before: Reading, during: list[Reading], after: Reading) -> ServerSide:
    """What the server did between two readings, with the gauges averaged over the readings during the step."""
    elapsed = after.at - before.at

    def grown(name: str, **labels: str) -> float | None:
        now, then = after.total(name, **labels), before.total(name, **labels)
        return None if now is None else now - (then or 0.0)

    def mean(name: str, scale: float = 1.0) -> float | None:
        total, count = grown(f"{name}_sum"), grown(f"{name}_count")
        return total / count * scale if total is not None and count else None

    def gauge(name: str) -> float | None:
        values = [value for reading in during or [after] if (value := reading.total(name)) is not None]
        return sum(values) / len(values) if values else None

    def rate(name: str) -> float | None:
        change = grown(name)
        return change / elapsed if change is not None and elapsed > 0 else None

    real, padding = grown("inference_tokens_total", kind="real"), grown("inference_tokens_total", kind="padding")
    # Little's law: time spent on requests in a second is their number. A gauge read now and then only guesses at that.
    spent = rate("inference_request_duration_seconds_sum")
    busy, runners = rate("inference_runner_busy_seconds_total"), after.total("inference_runners")
    return ServerSide(
        cpu_cores=rate("process_cpu_seconds_total"),
        memory_bytes=after.total("process_resident_memory_bytes"),
        in_flight=gauge("inference_requests_in_flight") if spent is None else spent,
        queue_rows=gauge("inference_queue_rows"),
        queue_wait_ms=mean("inference_queue_wait_seconds", 1e3),
        run_ms=mean("inference_run_seconds", 1e3),
        batch_rows=mean("inference_batch_rows"),
        padding_share=padding / (real + padding)
        if real is not None and padding is not None and real + padding
        else None,
        runner_busy_share=busy / runners if busy is not None and runners else None,
        runners=runners,
        rejected=grown("inference_rejected_total"),
        gpu_utilization=gauge("gpu_utilization_ratio"),
        gpu_memory_bytes=gauge("gpu_memory_used_bytes"),
    )
