"""A front end's side of the link: a batcher that is in another process, a model that is run there."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from math import inf
from typing import cast

from app import errors
from app.artifact.datatypes import Tensors
from app.artifact.manifest import read_artifact, verify_files
from app.batching import queue as rowqueue
from app.batching.admission import Limits, PendingRequest, QueueState
from app.batching.deadlines import Deadlines
from app.errors import RequestError, Unavailable
from app.multiprocess.channel import Cancel, Channel, Done, Failed, Serve, State, Submit, Unit
from app.multiprocess.totals import MetricsSource, Snapshot, render
from app.predictor import Statistics
from app.runtime.model import Model
from app.runtime.tasks.task import open_task
from app.settings import Settings

# The engine says something each second, so after this long it says nothing any more.
SILENCE_SECONDS = 10.0
ASK_SECONDS = 5.0


class Elsewhere:
    """A session in the engine. provider: "cpu" or "cuda", what is truly in use there."""

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def run(self, inputs: Tensors) -> Tensors:
        """Never: the engine runs."""
        raise NotImplementedError


def open_remote(settings: Settings, served: Serve) -> Model:
    """What a front end needs of the model that the engine serves. Raises ArtifactError, also when the artifact is not
    the engine's any more."""
    artifact = read_artifact(settings.model_dir, served.digest)
    verify_files(artifact)
    task = open_task(artifact, served.batch_rows)
    return Model(artifact, Elsewhere(served.provider), task, served.batch_rows, served.batch_tokens)


class RemoteBatcher:
    """As `Batcher`, for one event loop; the link's messages come in through `done`, `failed`, `heard`."""

    def __init__(self, channel: Channel, limits: Limits) -> None:
        self._link = channel
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._pending: dict[int, PendingRequest] = {}
        self._deadlines = Deadlines()
        self._state = State(QueueState(0, 0, inf), None)
        self._heard = time.monotonic()
        self._closed = False

    def submit(self, units: Sequence[rowqueue.Unit], deadline: float) -> PendingRequest:
        """As `Batcher.submit`; what only the engine can know ends the ticket's future."""
        self.admit(sum(unit.rows for unit in units), sum(unit.rows * unit.length for unit in units), deadline)
        pending, number = PendingRequest(len(units), self._loop.create_future()), next(self._ids)
        self._pending[number] = pending
        self._deadlines.add(self._loop, pending, deadline)

        def ended(_: object) -> None:
            self._deadlines.discard(pending)
            if self._pending.pop(number, None) is not None:
                self._link.send(Cancel(number))

        pending.future.add_done_callback(ended)
        self._link.send(Submit(number, cast("list[Unit]", units), deadline))
        return pending

    def admit(self, rows: int = 1, tokens: int = 0, deadline: float = inf, late_seconds: float = 0.0) -> None:
        """As `Batcher.admit`, by what the engine last said; it looks again itself."""
        if self._closed:
            raise Unavailable("shutting down", "draining", close=True)
        self._state.waiting.admit(self._limits, rows, tokens, deadline, late_seconds)

    def stuck(self) -> str | None:
        """Why no progress can be made, or None: as the engine says, or because it does not."""
        silent = time.monotonic() - self._heard
        if silent > SILENCE_SECONDS:
            return f"the engine process has said nothing for {silent:.0f} s"
        return self._state.stuck

    def close(self) -> None:
        """Fails what still waits."""
        self._closed = True
        for pending in list(self._pending.values()):
            if not pending.future.done():
                pending.future.set_exception(Unavailable("shutting down", "draining", close=True))

    def heard(self, state: State) -> None:
        """The engine's state."""
        self._state, self._heard = state, time.monotonic()

    def done(self, message: Done) -> None:
        """A request's results."""
        pending = self._pending.pop(message.id, None)
        if pending is not None and not pending.future.done():
            pending.dispatched, pending.finished, pending.missing = message.dispatched, message.finished, 0
            pending.future.set_result(message.results)

    def failed(self, message: Failed) -> None:
        """A request's error."""
        pending = self._pending.pop(message.id, None)
        if pending is not None and not pending.future.done():
            pending.future.set_exception(rebuilt(message))


def rebuilt(message: Failed) -> RequestError:
    """The error that the engine raised."""
    kind: type[RequestError] = getattr(errors, message.error)
    if issubclass(kind, Unavailable):
        return kind(message.message, message.reason or "", message.retry_after_seconds or 1, close=message.close)
    return kind(message.message)


class EngineMetrics(MetricsSource):
    """Of all processes, from the engine."""

    channel: Channel

    async def render(self) -> bytes:
        """Prometheus text. Raises Unavailable if the engine does not answer."""
        return render(await self._all())

    async def statistics(self) -> Statistics:
        """The protocol's. Raises Unavailable if the engine does not answer."""
        return (await self._all()).statistics

    async def _all(self) -> Snapshot:
        try:
            return await self.channel.ask(ASK_SECONDS)
        except TimeoutError:
            raise Unavailable("the engine process does not answer", "not_ready") from None
