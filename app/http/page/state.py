"""/state: what the server is at, in one small JSON object, for the page. Reads what is counted anyway; of requests it
knows numbers only.
"""

import socket
import time
from collections.abc import Iterable

import msgspec
from fastapi import Request
from fastapi.responses import Response
from msgspec import Struct
from prometheus_client import Metric

from app import NAME, __version__
from app.lifecycle import Lifecycle
from app.predictor import Predictor
from app.telemetry.metrics import Statistics

# A model of thousands of labels must not make every answer long.
MOST_LABELS = 16
# Labels that totals are told apart by; they are sums over all others.
KEPT = ("code", "reason", "kind")


class ModelState(Struct):
    """labels: none if there are more than MOST_LABELS. max_tokens: of a text; None for other tasks."""

    name: str
    version: str
    digest: str
    task: str
    precision: str
    provider: str
    labels: list[str]
    max_tokens: int | None
    runners: int
    max_batch_rows: int
    max_queue_rows: int


class Totals(Struct):
    """Since start, over all routes; times in seconds. answered: requests that the model answered, which `seconds`,
    `queue_seconds` and `inference_seconds` are of. tokens: without `padding_tokens`."""

    requests: dict[str, int]
    rejected: dict[str, int]
    answered: int
    seconds: float
    queue_seconds: float
    inference_seconds: float
    rows: int
    runs: int
    tokens: int
    padding_tokens: int
    runner_busy_seconds: float


class State(Struct):
    """started_unix_seconds: with `replica`, says whose totals these are; 0 where the system does not tell.
    clock_seconds: what rates are differences by. model: None until it has passed the gate."""

    server: str
    server_version: str
    replica: str
    started_unix_seconds: float
    clock_seconds: float
    stage: str
    stuck: str | None
    model: ModelState | None
    queue_rows: int
    in_flight: int
    totals: Totals


async def state(request: Request) -> Response:
    """What the server is at. Totals are since start: a rate is the difference of two answers."""
    lifecycle: Lifecycle = request.app.state.lifecycle
    metrics, statistics = await request.app.state.metrics_source.snapshot()
    found = state_of(lifecycle, metrics, statistics)
    return Response(msgspec.json.encode(found), headers={"cache-control": "no-store"}, media_type="application/json")


def state_of(lifecycle: Lifecycle, metrics: Iterable[Metric], statistics: Statistics) -> State:
    """The state, from what all processes counted."""
    sums: dict[str, dict[str, float]] = {}
    for metric in metrics:
        for sample in metric.samples:
            label = next((sample.labels[name] for name in KEPT if name in sample.labels), "")
            by_label = sums.setdefault(sample.name, {})
            by_label[label] = by_label.get(label, 0) + sample.value

    def total(name: str, label: str = "") -> float:
        return sums.get(name, {}).get(label, 0)

    def counts(name: str) -> dict[str, int]:
        return {label: int(count) for label, count in sums.get(name, {}).items() if count}

    predictor = lifecycle.predictor
    return State(
        server=NAME,
        server_version=__version__,
        replica=socket.gethostname(),
        started_unix_seconds=total("process_start_time_seconds"),
        clock_seconds=time.monotonic(),
        stage=lifecycle.stage,
        stuck=lifecycle.stuck(),
        model=_model(predictor) if predictor is not None else None,
        queue_rows=int(total("inference_queue_rows")),
        in_flight=int(total("inference_requests_in_flight")),
        totals=Totals(
            requests=counts("inference_requests_total"),
            rejected=counts("inference_rejected_total"),
            answered=statistics.succeeded,
            seconds=statistics.succeeded_seconds,
            queue_seconds=statistics.queue_seconds,
            inference_seconds=statistics.inference_seconds,
            rows=int(total("inference_batch_rows_sum")),
            runs=int(total("inference_batch_rows_count")),
            tokens=int(total("inference_tokens_total", "real")),
            padding_tokens=int(total("inference_tokens_total", "padding")),
            runner_busy_seconds=total("inference_runner_busy_seconds_total"),
        ),
    )


def _model(predictor: Predictor) -> ModelState:
    model, manifest = predictor.model, predictor.model.artifact.manifest
    return ModelState(
        name=manifest.name,
        version=manifest.version,
        digest=model.artifact.digest,
        task=manifest.task,
        precision=manifest.precision,
        provider=model.provider,
        labels=manifest.labels if len(manifest.labels) <= MOST_LABELS else [],
        max_tokens=manifest.max_tokens,
        runners=model.runners,
        max_batch_rows=model.batch_rows,
        max_queue_rows=predictor.batcher.limits.queue_rows,
    )
