"""Reads a server's `/metrics` and says what happened between two readings. Any server: what is not there is None."""

import asyncio
import time
import urllib.request
from dataclasses import dataclass

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
        values = [value for have, value in self.samples.get(name, ()) if labels.items() <= have.items()]
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


async def read(metrics_url: str | None) -> Reading:
    """Now. A server that has no metrics gives an empty reading, never an error: it may be refusing everything."""

    def get() -> Reading:
        try:
            with urllib.request.urlopen(metrics_url or "", timeout=SCRAPE_TIMEOUT_SECONDS) as answer:  # noqa: S310
                return parse(answer.read().decode(), time.perf_counter())
        except (OSError, ValueError):
            return Reading(time.perf_counter(), {})

    return await asyncio.to_thread(get)


def between(before: Reading, during: list[Reading], after: Reading) -> ServerSide:
    """What the server did between two readings, with the gauges averaged over the readings during the step."""
    elapsed = after.at - before.at

    def grown(name: str, **labels: str) -> float | None:
        now, then = after.total(name, **labels), before.total(name, **labels)
        return None if now is None else now - (then or 0.0)

    def ratio(over: float | None, under: float | None, scale: float = 1.0) -> float | None:
        return over / under * scale if over is not None and under else None

    def mean(name: str, scale: float = 1.0) -> float | None:
        return ratio(grown(f"{name}_sum"), grown(f"{name}_count"), scale)

    def gauge(name: str) -> float | None:
        values = [value for reading in during or [after] if (value := reading.total(name)) is not None]
        return ratio(sum(values), len(values))

    def rate(name: str) -> float | None:
        return ratio(grown(name), elapsed)

    padding = grown("inference_tokens_total", kind="padding")
    # Little's law: time spent on requests in a second is their number. A gauge read now and then only guesses at that.
    spent, runners = rate("inference_request_duration_seconds_sum"), after.total("inference_runners")
    return ServerSide(
        cpu_cores=rate("process_cpu_seconds_total"),
        memory_bytes=after.total("process_resident_memory_bytes"),
        in_flight=gauge("inference_requests_in_flight") if spent is None else spent,
        queue_wait_ms=mean("inference_queue_wait_seconds", 1e3),
        run_ms=mean("inference_run_seconds", 1e3),
        batch_rows=mean("inference_batch_rows"),
        padding_share=ratio(padding, grown("inference_tokens_total")),
        runner_busy_share=ratio(rate("inference_runner_busy_seconds_total"), runners),
        runners=runners,
        gpu_utilization=gauge("gpu_utilization_ratio"),
    )
