"""What a collector is to the service, and a client that has begun a trace: doubles of both ends of tracing."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import uuid4

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PARENT_ID = "b7ad6b7169203331"
PATIENCE_SECONDS = 60


class ClientTrace:
    """One that a client has begun."""

    def __init__(self) -> None:
        self.id = uuid4().hex
        self.sampled = {"traceparent": f"00-{self.id}-{PARENT_ID}-01"}
        self.not_sampled = {"traceparent": f"00-{self.id}-{PARENT_ID}-00"}

    def has(self, span: Span) -> bool:
        return span.trace_id.hex() == self.id


class Receiver:
    """Takes POST /v1/traces on a port of its own. raw: all bodies."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []
        self.raw = b""
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.take(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "20",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(self, body: bytes) -> None:
        with self._changed:
            self.raw += body
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resources.append({pair.key: pair.value.string_value for pair in each.resource.attributes})
                self.spans += [span for scope in each.scope_spans for span in scope.spans]
            self._changed.notify_all()

    def named(self, name: str, trace: ClientTrace | None = None, count: int = 1) -> list[Span]:
        """Spans of that name (and trace), once there are so many."""

        def found() -> list[Span]:
            return [span for span in self.spans if span.name == name and (trace is None or trace.has(span))]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, PATIENCE_SECONDS), self.spans
            return found()
