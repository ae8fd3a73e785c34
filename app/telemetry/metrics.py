"""Every metric of the service, declared once; incremented where the thing happens. Base units throughout.

Knows nothing of what it counts: labels that come from routes are given.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from app.errors import REJECT_REASONS, SHED_REASONS, STATUSES

Encode = Callable[[Any], bytes]
STAGES = ("signature", "verifying", "loading", "warming")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_JOB_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14400)
# The likeliest of two labels has at least 0.5, of many it may have less; a sure model's are mostly near 1.
_SCORES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
# A label is a series of each replica: those of a manifest beyond so many are counted as one.
MOST_LABELS, OTHER_LABELS = 50, "_other"
_BYTES = (128, 512, 2048, 8192, 32768, 131072, 524288, 2097152, 8388608)


@dataclass(slots=True)
class Statistics:
    """Totals since start, for the Open Inference Protocol's statistics; times in seconds. Those of the parts are of
    requests that succeeded: making rows of what was asked, waiting, the model's run, making answers of its results."""

    succeeded: int = 0
    succeeded_seconds: float = 0.0
    failed: int = 0
    failed_seconds: float = 0.0
    input_seconds: float = 0.0
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0
    output_seconds: float = 0.0
    rows: int = 0
    runs: int = 0
    last_unix_seconds: float = 0.0


class Children(dict[Any, Any]):
    """A metric's children by their labels (a tuple, or the one value there is). Those of `known` are there from the
    start; another, as of a status that only a new route answers, comes when it is first counted."""

    def __init__(self, metric: Any, known: Sequence[tuple[object, ...]]) -> None:
        self._metric = metric
        for labels in known:
            self[labels if len(labels) > 1 else labels[0]]

    def __missing__(self, key: Any) -> Any:
        labels = key if isinstance(key, tuple) else (key,)
        child = self[key] = self._metric.labels(*map(str, labels))
        return child


class Metrics:
    """One registry per application, so that two applications in one process do not add up.

    routes: the labels of inference routes.
    """

    def __init__(self, routes: Sequence[str]) -> None:
        self.statistics = Statistics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        self.requests = counter("inference_requests_total", "Inference requests answered.", "route", "code")
        self.duration = histogram(
            "inference_request_duration_seconds", "From the request's first byte to its answer.", _SECONDS, "route"
        )
        self.in_flight = gauge("inference_requests_in_flight", "Inference requests not answered yet.")
        self.queue_rows = gauge("inference_queue_rows", "Rows that wait for a runner.")
        self.queue_wait = histogram("inference_queue_wait_seconds", "A row's wait for a runner.", _SECONDS)
        self.run = histogram("inference_run_seconds", "One run of the model on one batch.", _SECONDS)
        self.batch_rows = histogram("inference_batch_rows", "Rows in one run.", _ROWS)
        self.tokens = counter("inference_tokens_total", "Tokens the model computed.", "kind")
        self.runners = gauge("inference_runners", "Concurrent runs of the model.")
        self.runner_busy = counter("inference_runner_busy_seconds_total", "Time spent in runs, summed over runners.")
        self.rejected = counter("inference_rejected_total", "Requests refused or given up.", "reason")
        self.request_bytes = histogram("inference_request_bytes", "Size of request bodies that were read.", _BYTES)
        self.predictions = counter("inference_predictions_total", "Labels that were predicted.", "label")
        self.prediction_score = histogram(
            "inference_prediction_score", "The probability of each label that was predicted.", _SCORES
        )
        self.reference = gauge(
            "model_reference_prediction_ratio", "A label's share of predictions on reference inputs.", "label"
        )
        self.load = gauge("model_load_seconds", "Time each stage took before the model was ready.", "stage")
        self.ready = gauge("model_ready", "1 while the model may answer.")
        self.info = gauge(
            "model_info", "The model that is loaded.", "name", "version", "digest", "provider", "precision"
        )
        self.connections = gauge("http_connections", "Connections that are open.")
        self.connections_shed = counter(
            "http_connections_shed_total", "Connections that were ended because a limit was reached.", "reason"
        )
        self.log_lines_dropped = counter("log_lines_dropped_total", "Log lines that standard output did not take.")
        # Looking a child up by its labels costs more than counting on it.
        self.durations = Children(self.duration, [(route,) for route in routes])
        self.answered = Children(self.requests, [(route, status) for route in routes for status in STATUSES])
        self.rejections = Children(self.rejected, [(reason,) for reason in REJECT_REASONS])
        self.shed = Children(self.connections_shed, [(reason,) for reason in SHED_REASONS])
        self.tokens_real, self.tokens_padding = self.tokens.labels("real"), self.tokens.labels("padding")
        for stage in STAGES:
            self.load.labels(stage)


class PredictionCounter:
    """Counts what a model predicts. labels: that it may predict, in the manifest's order; one without has no series."""

    def __init__(self, metrics: Metrics, labels: Sequence[str]) -> None:
        self._shown = {label: label if place < MOST_LABELS else OTHER_LABELS for place, label in enumerate(labels)}
        self._children = Children(metrics.predictions, [(shown,) for shown in self._shown.values()])
        self._observe = metrics.prediction_score.observe
        self._reference = metrics.reference

    def count(self, found: Iterable[tuple[str, float]]) -> None:
        """Labels of one request's predictions, each with its score."""
        counts: dict[str, int] = {}
        for label, score in found:
            shown = self._shown.get(label, OTHER_LABELS)
            counts[shown] = counts.get(shown, 0) + 1
            self._observe(score)
        for shown, count in counts.items():
            self._children[shown].inc(count)

    def expect(self, ratios: Mapping[str, float]) -> None:
        """Shows a reference distribution beside the counts: the same labels, those that it lacks with 0."""
        sums = dict.fromkeys(self._children, 0.0)
        for label, ratio in ratios.items():
            sums[self._shown[label]] += ratio
        for shown, ratio in sums.items():
            self._reference.labels(shown).set(ratio)


class MetricsSource:
    """What a scrape and the protocol's statistics are answered from: this process."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    async def render(self, encode: Encode = generate_latest) -> bytes:
        """Prometheus text format, or another."""
        return encode(self.metrics.registry)

    async def statistics(self) -> Statistics:
        """Totals since start."""
        return self.metrics.statistics

    async def snapshot(self) -> tuple[Iterable[Metric], Statistics]:
        """Every metric, and totals since start."""
        return self.metrics.registry.collect(), self.metrics.statistics


class ClientMetrics:
    """Of who asks, where that is known by a key."""

    def __init__(self, registry: CollectorRegistry, names: Sequence[str]) -> None:
        requests = Counter(
            "inference_client_requests_total", "Inference requests answered.", ["client", "code"], registry=registry
        )
        self.answered = Children(requests, [(name, 200) for name in names])


class GpuMetrics:
    """Gauges of the GPUs this process can see; created only where there is one."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["gpu"], registry=registry)

        self.utilization = gauge("gpu_utilization_ratio", "Share of time that a kernel ran, 0 to 1.")
        self.memory_used = gauge("gpu_memory_used_bytes", "GPU memory in use.")
        self.memory_total = gauge("gpu_memory_total_bytes", "GPU memory there is.")
        self.power = gauge("gpu_power_watts", "Power draw.")


class ScoringMetrics:
    """Counters of a run of app.scoring."""

    def __init__(self, registry: CollectorRegistry) -> None:
        rows = Counter("scoring_rows_total", "Rows that were scored, or could not be.", ["outcome"], registry=registry)
        self.scored, self.bad = rows.labels("scored"), rows.labels("bad")
        self.shards = Counter("scoring_shards_total", "Shards that were committed.", registry=registry)


class JobMetrics:
    """Of a worker: what became of the jobs that it took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        jobs = Counter("jobs_total", "Jobs that were answered.", ["outcome"], registry=registry)
        self.finished = Children(jobs, [("done",), ("failed",)])
        self.redeliveries = Counter(
            "job_redeliveries_total", "Deliveries of a job beyond its first.", registry=registry
        )
        self.dead_letters = Counter(
            "job_dead_letters_total", "Jobs given up after too many deliveries.", registry=registry
        )
        self.duration = Histogram(
            "job_duration_seconds", "From a job's submission to its result.", buckets=_JOB_SECONDS, registry=registry
        )


class QueueMetrics:
    """Of a server with the routes of jobs: workers may be at zero. Every replica says the same, and NaN while the queue
    does not answer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.backlog = Gauge("jobs_backlog", "Jobs that wait or run.", registry=registry)
        self.oldest_age = Gauge("job_oldest_age_seconds", "Since the oldest of these was submitted.", registry=registry)
