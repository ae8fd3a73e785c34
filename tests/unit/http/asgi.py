"""The application without a network, and clients of it that send in parts, stall and leave as a test says."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.batching.admission import Limits
from app.batching.batcher import Batcher
from app.lifecycle import count_batch
from app.main import create_app
from app.predictor import Predictor
from app.runtime.session import Model
from app.settings import Settings

# Only ends a test that hangs.
PATIENCE_SECONDS = 30
LIMITS = Limits(runners=1, batch_rows=4, batch_tokens=512, queue_rows=16)
PREDICT = json.dumps({"text": "the heron waits"}).encode()
Message = dict[str, Any]


class HeldModel(Model):
    """The model it was made of, whose runs wait until the test opens it."""

    def run(self, payloads: Sequence[Any]) -> list[Any]:
        self.entered = True
        asyncio.run_coroutine_threadsafe(self.opened.wait(), self.loop).result(PATIENCE_SECONDS)
        return Model.run(self, payloads)


def held(model: Model) -> HeldModel:
    copy = HeldModel(**{item.name: getattr(model, item.name) for item in fields(Model)})
    copy.entered, copy.opened, copy.loop = False, asyncio.Event(), asyncio.get_running_loop()
    return copy


class Client:
    """Sends its parts, then is silent until it leaves; keeps what it is sent."""

    def __init__(self, *parts: bytes, more: bool = False) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        for index, part in enumerate(parts, 1):
            self.send_part(part, more=more or index < len(parts))
        self.asked = 0
        self.sent: list[Message] = []

    def send_part(self, part: bytes, *, more: bool) -> None:
        self.messages.put_nowait({"type": "http.request", "body": part, "more_body": more})

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        self.asked += 1
        message = await self.messages.get()
        if message["type"] == "http.disconnect":
            self.leave()  # and stays away
        return message

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def _start(self) -> Message:
        (start,) = [message for message in self.sent if message["type"] == "http.response.start"]
        return start

    @property
    def status(self) -> int:
        return self._start()["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self._start()["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def body(self) -> Any:
        return json.loads(self.text)


class Served:
    """An application, serving `model` if there is one."""

    def __init__(self, model: Model | None = None, limits: Limits = LIMITS, **settings: Any) -> None:
        self.settings = Settings(provider="cpu", **settings)
        self.app = create_app(self.settings)
        self.lifecycle = self.app.state.lifecycle
        self._model, self._limits = model, limits

    async def __aenter__(self) -> "Served":
        if self._model is not None:
            serve(self.app, self._model, self._limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        if isinstance(self._model, HeldModel):
            self._model.opened.set()
        # In a thread: a run that is held needs this loop to end.
        await asyncio.to_thread(self.lifecycle.close)

    async def __call__(self, client: Client, path: str = "/predict", method: str = "POST", **headers: str) -> None:
        headers = {"content_type": "application/json"} | headers
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": raw,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.app(scope, client.receive, client.send)

    async def ask(self, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Client:
        """A client that was answered."""
        client = Client(body)
        await self(client, path, method, **headers)
        return client

    @property
    def metrics(self) -> str:
        return generate_latest(self.app.state.metrics_source.metrics.registry).decode()

    def sample(self, metric: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.metrics):
            for sample in family.samples:
                if sample.name == metric and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no sample {metric} {labels}")

    def requests(self, code: int, route: str = "/predict") -> float:
        return self.sample("inference_requests_total", route=route, code=str(code))

    def rejected(self, reason: str) -> float:
        return self.sample("inference_rejected_total", reason=reason)

    @property
    def in_flight(self) -> float:
        return self.sample("inference_requests_in_flight")


def serve(app: Any, model: Model, limits: Limits) -> None:
    """Lets the application answer with `model`, as its gate would."""
    metrics = app.state.metrics_source.metrics
    batcher = Batcher(model.run, limits, model.tokens_per_second, partial(count_batch, metrics))
    batcher.start()
    metrics.queue_rows.set_function(lambda: batcher.state().rows)
    app.state.lifecycle.serve(Predictor(model, batcher, metrics))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.001)
