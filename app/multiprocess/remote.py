"""The worker's side of the channel: a batcher whose queue is in the engine, a model that runs there, metrics of all."""

import time
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import NoReturn, cast

from prometheus_client import Metric, generate_latest

from app import errors
from app.artifact.integrity import verify_files
from app.artifact.manifest import read_artifact
from app.batching.admission import QueueState
from app.batching.batcher import Batcher
from app.batching.queue import PendingRequest
from app.errors import RequestError, Unavailable
from app.multiprocess.channel import MAX_UNREAD_BYTES, Cancel, Channel, Done, Failed, Serve, State, Submit, Unit
from app.multiprocess.metrics import Snapshot
from app.runtime.session import Model
from app.runtime.tasks import open_task
from app.settings import Settings
from app.telemetry.metrics import Encode, Metrics, MetricsSource, Statistics

# The engine says something each second, so after this long it says nothing any more.
SILENCE_SECONDS = 10.0
ASK_SECONDS = 5.0


def open_model(settings: Settings, served: Serve) -> Model:
    """What a worker needs of the model that the engine serves. Raises ArtifactError, also when the artifact is not the
    engine's any more."""
    artifact = read_artifact(settings.model_dir, served.digest)
    verify_files(artifact)
    limits = served.limits
    task = open_task(artifact, limits.batch_rows)
    return Model(artifact, task, served.provider, _engine_runs, limits.runners, limits.batch_rows, limits.batch_tokens)


def _engine_runs(_: object) -> NoReturn:
    raise NotImplementedError("the engine runs the model")


class RemoteBatcher(Batcher):
    """As `Batcher`, with queue and runners in the engine; its messages come in through `done`, `failed`, `heard`."""

    def __init__(self, channel: Channel, served: Serve) -> None:
        super().__init__(_engine_runs, served.limits, inf)
        self._channel = channel
        self._numbers: dict[PendingRequest, int] = {}
        self._waiting: dict[int, PendingRequest] = {}
        self._last_number = 0
        self._state = State(QueueState(0, 0, inf), None)
        self._heard = time.monotonic()
        self._runners = []

    def state(self) -> QueueState:
        """What the engine last said; it looks again itself. Full while it leaves half of what it may unread."""
        queue = self._state.queue
        full = self._channel.unread_bytes > MAX_UNREAD_BYTES // 2
        return replace(queue, rows=self.limits.queue_rows) if full else queue

    def stuck(self) -> str | None:
        """Why no progress can be made, or None: as the engine says, or because it does not."""
        silent = time.monotonic() - self._heard
        if silent > SILENCE_SECONDS:
            return f"the engine process has said nothing for {silent:.0f} s"
        return self._state.stuck

    def close(self, timeout_seconds: float = 0.0) -> None:
        """Fails what still waits."""
        super().close(timeout_seconds)
        for pending in list(self._waiting.values()):
            if not pending.future.done():
                pending.future.set_exception(Unavailable("shutting down", "draining", close=True))

    def _enqueue(self, pending: PendingRequest) -> None:
        self._last_number += 1
        self._numbers[pending], self._waiting[self._last_number] = self._last_number, pending
        self._channel.send(Submit(self._last_number, cast("list[Unit]", pending.units), pending.deadline))

    def _withdraw(self, pending: PendingRequest) -> None:
        number = self._numbers.pop(pending, None)
        if number is not None and self._waiting.pop(number, None) is not None:
            self._channel.send(Cancel(number))

    def heard(self, state: State) -> None:
        """The engine's state."""
        self._state, self._heard = state, time.monotonic()

    def done(self, message: Done) -> None:
        """A request's results."""
        pending = self._answered(message.id)
        if pending is not None:
            pending.dispatched, pending.finished, pending.missing = message.dispatched, message.finished, 0
            pending.future.set_result(message.results)

    def failed(self, message: Failed) -> None:
        """A request's error."""
        pending = self._answered(message.id)
        if pending is not None:
            pending.future.set_exception(rebuilt(message))

    def _answered(self, number: int) -> PendingRequest | None:
        pending = self._waiting.pop(number, None)
        if pending is None:
            return None
        self._numbers.pop(pending, None)
        return None if pending.future.done() else pending


def rebuilt(message: Failed) -> RequestError:
    """The error that the engine raised."""
    kind: type[RequestError] = getattr(errors, message.error)
    if issubclass(kind, Unavailable):
        return kind(message.message, message.reason or "", message.retry_after_seconds or 1, close=message.close)
    return kind(message.message)


class EngineMetrics(MetricsSource):
    """Of all processes, from the engine. All raise Unavailable if it does not answer."""

    def __init__(self, metrics: Metrics, channel: Channel) -> None:
        super().__init__(metrics)
        self._channel = channel

    async def render(self, encode: Encode = generate_latest) -> bytes:
        """Prometheus text format, or another."""
        return (await self._all()).render(encode)

    async def statistics(self) -> Statistics:
        """Totals since start."""
        return (await self._all()).statistics

    async def snapshot(self) -> tuple[Iterable[Metric], Statistics]:
        """Every metric, and totals since start."""
        found = await self._all()
        return found.collect(), found.statistics

    async def _all(self) -> Snapshot:
        try:
            return await self._channel.ask(ASK_SECONDS)
        except TimeoutError:
            raise Unavailable("the engine process does not answer", "not_ready") from None
