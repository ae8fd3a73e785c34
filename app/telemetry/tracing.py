"""Spans of requests, jobs and runs of the model, for an OTLP endpoint that OpenTelemetry's own `OTEL_*` variables name.

Knows no HTTP, and never what was asked. Nothing else here knows OpenTelemetry, and this imports its SDK only where
there is an endpoint.
"""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from app import NAME, __version__
from app.errors import ConfigError
from app.telemetry import logging

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanContext

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
KINDS = ("always_on", "always_off", "traceidratio")
SAMPLERS = (*(f"parentbased_{kind}" for kind in KINDS), *KINDS)
# The grace period of a Pod has two seconds for all that comes after the last answer.
FLUSH_SECONDS = 1.0
Attributes = Mapping[str, str | int | float]
# Name, beginning and end, on the clock of `time.monotonic()`, as all times here.
Part = tuple[str, float, float]


class Trace:
    """The span of one request or job."""

    __slots__ = ("_tracing", "runs", "span")

    def __init__(self, tracing: "Tracing", span: "Span") -> None:
        self._tracing = tracing
        self.span = span
        self.runs: list[SpanContext] = []
        """Of the model, that had a part in it."""

    @property
    def ids(self) -> dict[str, str]:
        """As a log line and an exemplar have them."""
        context = self.span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    @property
    def recorded(self) -> bool:
        """Whether it was sampled."""
        return self.span.is_recording()

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What leads from a histogram's bucket to this trace, if there will be one."""
        return self.ids if self.recorded else None

    @property
    def carrier(self) -> dict[str, str]:
        """What takes the trace further: to `Tracing.begin`, in another process."""
        headers: dict[str, str] = {}
        self._tracing.propagator.inject(headers, self._tracing.api.set_span_in_context(self.span))
        return headers

    def end(self, attributes: Attributes, parts: Sequence[Part] = (), error: str | None = None) -> None:
        """Now. parts: its children. error: a type's name, where it is the service's fault."""
        if not self.recorded:
            return
        api, tracer = self._tracing.api, self._tracing.tracer
        context = api.set_span_in_context(self.span)
        for name, since, until in parts:
            links = [api.Link(run) for run in self.runs] if name == "run" else None
            tracer.start_span(name, context, links=links, start_time=_unix_ns(since)).end(_unix_ns(until))
        self.span.set_attributes(attributes)
        if error is not None:
            self.span.set_status(api.StatusCode.ERROR, error)
        self.span.end()


class Tracing:
    """Of one process."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.api = trace
        self.propagator = TraceContextTextMapPropagator()
        self.tracer = provider.get_tracer(NAME, __version__)
        self._provider = provider

    @classmethod
    def start(cls) -> "Tracing | None":
        """None without an endpoint. Raises ConfigError for variables that OpenTelemetry would ignore or replace, and
        where the extra is not installed."""
        if not is_asked_for(os.environ):
            return None
        check(os.environ)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # What the variables say comes first.
        ours = Resource.create({"service.name": NAME, "service.version": __version__})
        resource = ours.merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        logging.logger().info("tracing", sampler=provider.sampler.get_description())
        return cls(provider)

    def begin(self, name: str, carrier: Mapping[str, str], started: float, *, from_queue: bool = False) -> Trace:
        """The span of a request, or of a job, since `started`. carrier: `traceparent`, `tracestate`."""
        kind = self.api.SpanKind.CONSUMER if from_queue else self.api.SpanKind.SERVER
        context = self.propagator.extract(carrier) if carrier else None
        return Trace(self, self.tracer.start_span(name, context, kind, start_time=_unix_ns(started)))

    def ran(self, traces: Iterable[Trace], started: float, finished: float, attributes: Attributes) -> None:
        """A run of the model, for these of its requests: in the first one's trace, linked to all of them."""
        recorded = [trace for trace in traces if trace.recorded]
        if not recorded:
            return
        span = self.tracer.start_span(
            "batch",
            self.api.set_span_in_context(recorded[0].span),
            links=[self.api.Link(trace.span.get_span_context()) for trace in recorded],
            attributes=attributes,
            start_time=_unix_ns(started),
        )
        span.end(_unix_ns(finished))
        for trace in recorded:
            trace.runs.append(span.get_span_context())

    def close(self) -> None:
        """Sends what is left, for a while: a collector that does not answer must not hold the process."""
        # In a thread, because OpenTelemetry's own flush knows no timeout.
        flush = threading.Thread(target=self._provider.force_flush, name="traces", daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


def is_asked_for(environment: Mapping[str, str]) -> bool:
    """Whether the variables name an endpoint, and do not turn tracing off."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environment.get(name) for name in ENDPOINTS)


def check(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for what OpenTelemetry would only warn of, and go on with something else."""
    if find_spec("opentelemetry.exporter") is None or find_spec("opentelemetry.sdk") is None:
        package = "opentelemetry-exporter-otlp-proto-http"
        raise ConfigError(f"{ENDPOINTS[1]}: the extra `tracing` is not installed; pip install {package}")
    for name in ENDPOINTS:
        # Not quoted: it may hold a token.
        if not environment.get(name, "http://").startswith(("http://", "https://")):
            raise ConfigError(f"{name}: expected http://HOST:4318 or https://…")
    for name in PROTOCOLS:
        if environment.get(name, "http/protobuf") != "http/protobuf":
            raise ConfigError(f"{name}={environment[name]}: expected http/protobuf")
    sampler = environment.get("OTEL_TRACES_SAMPLER", SAMPLERS[0])
    if sampler.lower() not in SAMPLERS:
        raise ConfigError(f"OTEL_TRACES_SAMPLER={sampler}: expected one of {', '.join(SAMPLERS)}")
    ratio = environment.get("OTEL_TRACES_SAMPLER_ARG", "1")
    with suppress(ValueError):
        if 0 <= float(ratio) <= 1:
            return
    raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG={ratio}: expected a ratio from 0 to 1")


def _unix_ns(monotonic: float) -> int:
    return time.time_ns() - time.monotonic_ns() + int(monotonic * 1e9)
