"""inference.GRPCInferenceService: each method's bytes in and bytes out, over the predictor that HTTP has.

ModelInfer is admitted, counted, timed and logged in one place, which turns whatever it raises into its one ending.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from app import NAME, __version__
from app.access import ApiKeys
from app.artifact.datatypes import Tensors
from app.errors import BodyTimeout, BodyTooLarge, ClientClosed, DeadlineExceeded, NotFound, RequestError, Unavailable
from app.grpc import LABEL
from app.grpc.codec import decode_request, encode_response, number, parse
from app.grpc.protocol import open_inference_pb2 as messages
from app.grpc.protocol.open_inference_pb2 import ModelInferRequest
from app.grpc.status import REQUEST_ID, Metadata, ending
from app.lifecycle import Lifecycle
from app.oip.outputs import MAX_ANSWER
from app.predictor import Predictor, Usage, aside
from app.request_log import RequestLog, request_id
from app.runtime.session import Model
from app.settings import Settings
from app.telemetry.logging import logger, stack_of
from app.telemetry.metrics import Metrics

SERVICE = "inference.GRPCInferenceService"
PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ["classification"]
# Beyond that, reading a request or making an answer may take longer than a thread does to start.
QUICK_BYTES = 32768
# A client's deadline began a little before the server heard of it.
EARLY_SECONDS = 0.05
Hook = Callable[[HTTPConnection], Awaitable[None]]


class Call:
    """One ModelInfer. deadline: the sooner of the client's and the server's, on the clock of `time.monotonic()`. usage:
    set by who serves it."""

    usage: Usage

    def __init__(self, context: Any, timeout_seconds: float) -> None:
        self.started = time.monotonic()
        left = context.time_remaining()
        self.deadline = self.started + (timeout_seconds if left is None else min(left, timeout_seconds))
        self.headers = headers_of(context)
        self.id = request_id(self.headers.get(REQUEST_ID.encode(), b"").decode("latin-1"))
        self.status = 0
        self.error: str | None = None
        self.body_bytes = 0


class InferenceService:
    """The service's methods. hooks: called before each but health, as over HTTP. keys: one of which these need."""

    def __init__(
        self,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
        hooks: Sequence[Hook],
        log: RequestLog,
        keys: ApiKeys | None,
    ) -> None:
        self._timeout_seconds = settings.request_timeout_ms / 1000
        self._max_body_bytes = settings.max_body_bytes
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._log = log
        self._hooks = hooks
        self._keys = keys

    def handlers(self) -> dict[str, Any]:
        """gRPC's handlers by method."""
        # As a stream, which a call with one message is as well on the wire: it is refused before its message is read.
        found = {f"/{SERVICE}/ModelInfer": grpc.stream_unary_rpc_method_handler(self.infer)}
        plain = [
            ("ServerLive", messages.ServerLiveRequest, self._server_live, True),
            ("ServerReady", messages.ServerReadyRequest, self._server_ready, True),
            ("ModelReady", messages.ModelReadyRequest, self._model_ready, False),
            ("ServerMetadata", messages.ServerMetadataRequest, self._server_metadata, False),
            ("ModelMetadata", messages.ModelMetadataRequest, self._model_metadata, False),
        ]
        for name, request, answer, exempt in plain:
            path = f"/{SERVICE}/{name}"
            handler = self._plain(path, request, answer, exempt=exempt)
            found[path] = grpc.unary_unary_rpc_method_handler(handler)
        return found

    async def infer(self, _: object, context: Any) -> bytes:
        """Answers one ModelInfer, whatever happens to it."""
        call = Call(context, self._timeout_seconds)
        call.usage = self._log.begin("POST", LABEL, call.headers, call.started)
        named = ((REQUEST_ID, call.id),)
        self._lifecycle.in_flight += 1
        try:
            try:
                answer = await self._answer(call, context)
                call.status = 200
                context.set_trailing_metadata(named)
                return answer
            except (RequestError, HTTPException) as error:
                code, message, metadata = self._refused(call, error)
            except asyncio.CancelledError:
                self._refused(call, self._why_cancelled(call))
                raise
            # The last line of defence: a bug ends one request, with its place in the log and nothing of its content.
            except Exception as error:
                call.status, call.error = 500, type(error).__name__
                logger().error("unhandled", request_id=call.id, error_type=call.error, stack=stack_of(error))
                code, message, metadata = grpc.StatusCode.INTERNAL, "internal error", ()
            await context.abort(code, message, (*metadata, *named))
            raise AssertionError("aborting raises")
        finally:
            self._lifecycle.request_ended()
            seconds = time.monotonic() - call.started
            self._log.record(call.id, LABEL, call.status, call.error, seconds, call.body_bytes, call.usage)

    async def _answer(self, call: Call, context: Any) -> bytes:
        call.usage.client = await self._ask(f"/{SERVICE}/ModelInfer", call.headers)
        # No look at whether the service ends: gRPC itself, told to stop, lets nothing more in.
        predictor = self._lifecycle.loaded()
        predictor.batcher.admission.admit()
        raw = await self._message(call, context)
        request, tensors = await aside(len(raw) > QUICK_BYTES, decode_request, raw)
        model = predictor.named(request.model_name, request.model_version or None)
        if timeout := number(request.parameters, "timeout"):
            call.deadline = min(call.deadline, call.started + timeout / 1e6)
        outputs = await predictor.infer(tensors, call.deadline, call.usage)
        long = sum(array.nbytes for array in outputs.values()) > QUICK_BYTES
        return await aside(long, self._encode, request, model, outputs)

    async def _message(self, call: Call, context: Any) -> bytes:
        try:
            async with asyncio.timeout(call.deadline - time.monotonic()):
                raw = await context.read()
        except TimeoutError:
            raise BodyTimeout("message: not received before the deadline") from None
        if not isinstance(raw, bytes):  # gRPC's core has refused it, and told the client so, or there was none
            raise BodyTooLarge(f"message: expected one of at most {self._max_body_bytes} bytes")
        call.body_bytes = len(raw)
        return raw

    def _encode(self, request: ModelInferRequest, model: Model, outputs: Tensors) -> bytes:
        manifest, most, by_rows = model.artifact.manifest, self._max_body_bytes * MAX_ANSWER, model.task.by_rows
        name = (manifest.name, manifest.version)
        return encode_response(request, name, outputs, manifest.labels, most, by_rows=by_rows)

    def _refused(self, call: Call, error: RequestError | HTTPException) -> tuple[grpc.StatusCode, str, Metadata]:
        call.error = type(error).__name__
        call.status = error.status if isinstance(error, RequestError) else error.status_code
        if isinstance(error, RequestError) and error.reason is not None:
            self._metrics.rejections[error.reason].inc()
        return ending(error)

    def _why_cancelled(self, call: Call) -> RequestError:
        """gRPC says only that a call is over: its client has left, its deadline has passed, or the server stops."""
        if time.monotonic() >= call.deadline - EARLY_SECONDS:
            return DeadlineExceeded("not answered before its deadline")
        if self._lifecycle.refusing:
            return Unavailable("not answered before the server stopped", "draining")
        return ClientClosed("the client left before it was answered")

    def _plain(
        self, path: str, kind: type[Message], answer: Callable[[Any], Message], *, exempt: bool
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handler(raw: bytes, context: Any) -> bytes:
            try:
                if not exempt:
                    await self._ask(path, headers_of(context))
                answered: bytes = answer(parse(kind, raw)).SerializeToString()
                return answered
            except (RequestError, HTTPException) as error:
                refused = ending(error)
            except Exception as error:
                logger().error("unhandled", error_type=type(error).__name__, stack=stack_of(error))
                refused = grpc.StatusCode.INTERNAL, "internal error", ()
            await context.abort(*refused)
            raise AssertionError("aborting raises")

        return handler

    async def _ask(self, path: str, headers: Mapping[bytes, bytes]) -> str | None:
        """Who asks, if a key says that; raises for who may not. Hooks get what they know of HTTP: gRPC is HTTP/2."""
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": list(headers.items())}
        for hook in self._hooks:
            await hook(HTTPConnection(scope))
        if self._keys is None:
            return None
        return self._keys.name_of(headers.get(b"authorization", b"").decode("latin-1"))

    def _server_live(self, _: Any) -> Message:
        return messages.ServerLiveResponse(live=self._lifecycle.stuck() is None)

    def _server_ready(self, _: Any) -> Message:
        return messages.ServerReadyResponse(ready=self._lifecycle.ready)

    def _model_ready(self, request: Any) -> Message:
        try:
            ready = self._lifecycle.ready and bool(self._named(request))
        except NotFound:
            ready = False
        return messages.ModelReadyResponse(ready=ready)

    def _server_metadata(self, _: Any) -> Message:
        return messages.ServerMetadataResponse(name=NAME, version=__version__, extensions=EXTENSIONS)

    def _model_metadata(self, request: Any) -> Message:
        model, tensor = self._named(request), messages.ModelMetadataResponse.TensorMetadata
        inputs, outputs = (
            [tensor(name=spec.name, datatype=spec.datatype, shape=spec.shape) for spec in specs]
            for specs in (model.task.inputs, model.task.outputs)
        )
        manifest = model.artifact.manifest
        return messages.ModelMetadataResponse(
            name=manifest.name, versions=[manifest.version], platform=PLATFORM, inputs=inputs, outputs=outputs
        )

    def _named(self, request: Any) -> Model:
        predictor: Predictor = self._lifecycle.loaded()
        return predictor.named(request.name, request.version or None)


def headers_of(context: Any) -> dict[bytes, bytes]:
    """A call's metadata, which are its headers."""
    metadata = context.invocation_metadata() or ()
    return {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in metadata}
