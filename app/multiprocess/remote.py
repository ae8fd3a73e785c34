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
from app.batching.admission import Limits, Ticket, Waiting
from app.batching.deadlines import Deadlines
from app.errors import RequestError, Unavailable
from app.multiprocess.channel import Cancel, Done, Failed, Link, Serve, State, Submit, Unit
from app.multiprocess.totals import Snapshot, Totals, render
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

    def __init__(self, link: Link, limits: Limits) -> None:
        self._link = link
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._ids = itertools.count()
        self._tickets: dict[int, Ticket] = {}
        self._deadlines = Deadlines()
        self._state = State(Waiting(0, 0, inf), None)
        self._heard = time.monotonic()
        self._closed = False

    def submit(self, units: Sequence[rowqueue.Unit], deadline: float) -> Ticket:
        """As `Batcher.submit`; what only the engine can know ends the ticket's future."""
        self.admit(sum(unit.rows for unit in units), sum(unit.rows * unit.length for unit in units), deadline)
        ticket, number = Ticket(len(units), self._loop.create_future()), next(self._ids)
        self._tickets[number] = ticket
        self._deadlines.add(self._loop, ticket, deadline)

        def ended(_: object) -> None:
            self._deadlines.discard(ticket)
            if self._tickets.pop(number, None) is not None:
                self._link.send(Cancel(number))

        ticket.future.add_done_callback(ended)
        self._link.send(Submit(number, cast("list[Unit]", units), deadline))
        return ticket

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
        for ticket in list(self._tickets.values()):
            if not ticket.future.done():
                ticket.future.set_exception(Unavailable("shutting down", "draining", close=True))

    def heard(self, state: State) -> None:
        """The engine's state."""
        self._state, self._heard = state, time.monotonic()

    def done(self, message: Done) -> None:
        """A request's results."""
        ticket = self._tickets.pop(message.id, None)
        if ticket is not None and not ticket.future.done():
            ticket.dispatched, ticket.finished, ticket.missing = message.dispatched, message.finished, 0
            ticket.future.set_result(message.results)

    def failed(self, message: Failed) -> None:
        """A request's error."""
        ticket = self._tickets.pop(message.id, None)
        if ticket is not None and not ticket.future.done():
            ticket.future.set_exception(rebuilt(message))


def rebuilt(message: Failed) -> RequestError:
    """The error that the engine raised."""
    kind: type[RequestError] = getattr(errors, message.error)
    if issubclass(kind, Unavailable):
        return kind(message.message, message.reason or "", message.retry_after_seconds or 1, close=message.close)
    return kind(message.message)


class RemoteTotals(Totals):
    """Of all processes, from the engine."""

    link: Link

    async def render(self) -> bytes:
        """Prometheus text. Raises Unavailable if the engine does not answer."""
        return render(await self._all())

    async def statistics(self) -> Statistics:
        """The protocol's. Raises Unavailable if the engine does not answer."""
        return (await self._all()).statistics

    async def _all(self) -> Snapshot:
        try:
            return await self.link.ask(ASK_SECONDS)
        except TimeoutError:
            raise Unavailable("the engine process does not answer", "not_ready") from None
