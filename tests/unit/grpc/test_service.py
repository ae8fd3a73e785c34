"""The service's methods, over a real model and without a socket: hooks, bugs, statuses, what is logged and counted."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from starlette.requests import HTTPConnection

from app.access import ApiKeys
from app.batching.admission import Limits
from app.batching.batcher import Batcher
from app.errors import Unauthorized
from app.grpc import LABEL
from app.grpc.protocol import open_inference_pb2 as messages
from app.grpc.service import SERVICE, Hook, InferenceService
from app.lifecycle import Lifecycle
from app.predictor import Predictor
from app.request_log import RequestLog
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.settings import Settings
from app.telemetry import logging
from app.telemetry.metrics import Metrics
from tests.text_model import NAME, text_model

SECRET = "secret words of a client"


class Aborted(Exception):
    """As gRPC ends a call."""


class Context:
    """What gRPC tells of a call with one message."""

    def __init__(self, message: bytes = b"", left: float | None = None, **metadata: str) -> None:
        self.message, self.left = message, left
        self.metadata = tuple(metadata.items())
        self.reads = 0
        self.ended: tuple[grpc.StatusCode, str] | None = None
        self.trailing: dict[str, str] = {}

    def time_remaining(self) -> float | None:
        return self.left

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    async def read(self) -> bytes:
        self.reads += 1
        return self.message

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailing = dict(metadata)

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Any = ()) -> None:
        self.ended, self.trailing = (code, details), dict(trailing)
        raise Aborted


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(text_model())


class Service:
    """One over that model, once `async with` has begun."""

    def __init__(self, model: Model | None, *hooks: Hook, keys: ApiKeys | None = None) -> None:
        self.metrics = Metrics((LABEL,))
        logging.configure("info", "json")
        settings = Settings(max_queue_rows=64, request_timeout_ms=600_000)
        self.lifecycle = Lifecycle(settings, self.metrics)
        self.service = InferenceService(
            settings, self.lifecycle, self.metrics, hooks, RequestLog(self.lifecycle, self.metrics), keys
        )
        self._model = model

    async def __aenter__(self) -> "Service":
        if self._model is not None:
            batcher = Batcher(self._model.run, Limits(1, 8, 8192, 64), 1e9)
            batcher.start()
            self.lifecycle.serve(Predictor(self._model, batcher, self.metrics))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.lifecycle.close()

    async def infer(self, context: Context) -> messages.ModelInferResponse | None:
        """The answer, or None for a call that was ended."""
        try:
            return messages.ModelInferResponse.FromString(await self.service.infer(None, context))
        except Aborted:
            return None

    async def ask(self, method: str, context: Context) -> bytes | None:
        """What another method answers to the context's message."""
        handler = self.service.handlers()[f"/{SERVICE}/{method}"]
        try:
            return bytes(await handler.unary_unary(context.message, context))
        except Aborted:
            return None

    def counted(self, code: int) -> float:
        return float(self.metrics.registry.get_sample_value(
            "inference_requests_total", {"route": LABEL, "code": str(code)}
        ) or 0)  # fmt: skip


def asking(text: str = "fine") -> bytes:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [text.encode()]}}
    return messages.ModelInferRequest(model_name=NAME, inputs=[tensor]).SerializeToString()


async def test_a_call_is_answered_counted_and_named(model: Model) -> None:
    async with Service(model) as served:
        context = Context(asking(), **{"x-request-id": "order-17"})
        answer = await served.infer(context)
    assert answer is not None
    assert answer.outputs
    assert context.trailing == {"x-request-id": "order-17"}
    assert (served.counted(200), served.lifecycle.in_flight) == (1, 0)


async def test_before_the_model_is_ready_a_call_is_refused_without_being_read() -> None:
    async with Service(None) as served:
        context = Context(asking())
        assert await served.infer(context) is None
    assert context.ended is not None
    assert (context.ended[0], context.reads) == (grpc.StatusCode.UNAVAILABLE, 0)
    assert context.trailing["retry-after"] == "1"
    assert served.counted(503) == 1
    assert served.metrics.registry.get_sample_value("inference_rejected_total", {"reason": "not_ready"}) == 1


async def test_a_deadline_that_has_passed_ends_the_call(model: Model) -> None:
    async with Service(model) as served:
        context = Context(asking(), left=0.0)
        context.read = lambda: asyncio.sleep(60)  # type: ignore[method-assign]
        assert await served.infer(context) is None
    assert context.ended is not None
    assert context.ended[0] == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_bug_is_internal_and_says_nothing_of_the_request(
    model: Model, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def buggy(raw: bytes) -> Any:
        raise KeyError(raw)

    monkeypatch.setattr("app.grpc.service.decode_request", buggy)
    monkeypatch.setattr(InferenceService, "_named", lambda self, request: buggy(SECRET.encode()))
    async with Service(model) as served:
        context = Context(asking(SECRET))
        assert await served.infer(context) is None
        other = Context()
        assert await served.ask("ModelMetadata", other) is None
    assert context.ended == other.ended == (grpc.StatusCode.INTERNAL, "internal error")
    assert served.counted(500) == 1
    logging.flush()
    written = "".join(capfd.readouterr())
    assert "unhandled" in written
    assert SECRET not in written


async def require_key(connection: HTTPConnection) -> None:
    if connection.headers.get("authorization") != "Bearer key":
        raise Unauthorized("expected an API key")


async def test_hooks_hold_for_grpc_as_well_but_not_for_probes(model: Model) -> None:
    async with Service(model, require_key) as served:
        stranger = Context(asking())
        assert await served.infer(stranger) is None
        assert stranger.ended == (grpc.StatusCode.UNAUTHENTICATED, "expected an API key")
        assert stranger.reads == 0
        assert await served.infer(Context(asking(), authorization="Bearer key")) is not None
        for method, open_to_all in {"ServerLive": True, "ServerReady": True, "ServerMetadata": False}.items():
            assert (await served.ask(method, Context()) is not None) is open_to_all
    assert served.counted(401) == 1


async def test_keys_hold_for_grpc_as_well_and_say_who_asks(model: Model, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("shop:the-key-of-the-shop\n")
    async with Service(model, keys=ApiKeys(tmp_path / "keys")) as served:
        stranger = Context(asking(), authorization="Bearer the-key-of-nobody")
        assert await served.infer(stranger) is None
        assert stranger.ended is not None
        assert stranger.ended[0] == grpc.StatusCode.UNAUTHENTICATED
        assert await served.infer(Context(asking(), authorization="Bearer the-key-of-the-shop")) is not None
        assert await served.ask("ServerMetadata", Context()) is None
        assert await served.ask("ServerLive", Context()) is not None


async def test_a_call_that_is_cancelled_counts_as_a_client_that_left(model: Model) -> None:
    async with Service(model) as served:
        context = Context()
        context.read = lambda: asyncio.sleep(60)  # type: ignore[method-assign]
        task = asyncio.create_task(served.infer(context))
        await asyncio.sleep(0)
        assert served.lifecycle.in_flight == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (served.counted(499), served.lifecycle.in_flight, context.ended) == (1, 0, None)
