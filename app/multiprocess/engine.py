"""The engine of a server with several HTTP processes: one queue, one session, and a link to each front end.

Each worker end listens on a socket of its own on the same address. If one ends unasked, the others drain and the whole
server ends with an error: whoever started it starts it again, whole.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import uvloop

from app.batching.admission import PendingRequest
from app.batching.batcher import Batcher
from app.ending import exit_process
from app.errors import RequestError, StartupError
from app.http.server import SWITCH_SECONDS
from app.lifecycle import limits_of, log_ready, start_loading
from app.multiprocess.channel import (
    Ask,
    Cancel,
    Channel,
    Done,
    Failed,
    Message,
    Part,
    Ready,
    Serve,
    Stage,
    State,
    Submit,
)
from app.multiprocess.totals import MetricsSource, Snapshot, add_up
from app.predictor import Predictor
from app.runtime.model import Model
from app.settings import Settings
from app.telemetry import logging as logs
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import Metrics

TICK_SECONDS = 0.01
SIGN_OF_LIFE_SECONDS = 1.0
ASK_SECONDS = 2.0
# Beyond its own drain, a front end's last seconds.
GRACE_SECONDS = 3.0
EXIT_FRONT_LOST = 1


@dataclass(slots=True, eq=False)
class HttpWorker:
    """A front end as the engine sees it."""

    process: asyncio.subprocess.Process
    pending: dict[int, PendingRequest] = field(default_factory=dict)
    ready: bool = False
    channel: Channel = field(init=False)


class Engine:
    """`run()` is its life."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._predictor = Predictor(metrics := Metrics())
        self._totals = MetricsSource(metrics, self._predictor)
        self._workers: list[HttpWorker] = []
        self._batcher: Batcher | None = None
        self._model: Model | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._leaving = asyncio.Event()
        self._exit_code = 0

    async def run(self, sockets: list[socket.socket]) -> int:
        """Starts a front end for each listening socket, serves them, and returns the exit code after a signal."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        try:
            for sock in sockets:
                self._workers.append(await self._start(sock))
        except OSError as error:  # no more processes
            exit_process(StartupError(f"cannot start the HTTP processes: {error.strerror}"))
        start_loading(self._settings, self._predictor, exit_process, self._serve)
        gpu = GpuSampler.start(self._totals.metrics.registry) if self._settings.provider != "cpu" else None
        watching = [asyncio.create_task(self._watch(worker)) for worker in self._workers]
        ticking = asyncio.create_task(self._tick())
        await self._leaving.wait()
        await self._drain(watching)
        ticking.cancel()
        self._predictor.close()
        if gpu is not None:
            gpu.stop()
        return self._exit_code

    async def _start(self, listening: socket.socket) -> HttpWorker:
        ours, theirs = socket.socketpair()
        # A session of its own: Ctrl-C in a terminal is for the engine, which tells the front ends.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.multiprocess.http_worker", str(listening.fileno()), str(theirs.fileno()),
            pass_fds=(listening.fileno(), theirs.fileno()), start_new_session=True,
        )  # fmt: skip
        listening.close()
        theirs.close()
        worker = HttpWorker(process)
        # Its end is noticed by the end of its process.
        loop, hear = asyncio.get_running_loop(), partial(self._hear, worker)
        _, worker.channel = await loop.create_unix_connection(partial(Channel, hear, lambda: None), sock=ours)
        return worker

    def _leave(self) -> None:
        """The first signal: the front ends drain, and then the engine. The second: all stop without waiting."""
        for worker in self._workers:
            if worker.process.returncode is None:
                worker.process.send_signal(signal.SIGKILL if self._leaving.is_set() else signal.SIGTERM)
        self._predictor.leave()
        self._leaving.set()

    async def _watch(self, worker: HttpWorker) -> None:
        code = await worker.process.wait()
        for pending in worker.pending.values():
            pending.future.cancel()
        if not self._leaving.is_set():
            logs.logger().error("a worker end ended", process_id=worker.process.pid, code=code)
            self._exit_code = code if code > 0 else EXIT_FRONT_LOST
            self._leave()

    async def _drain(self, watching: list[asyncio.Task[None]]) -> None:
        seconds = self._settings.drain_delay_seconds + self._settings.drain_timeout_seconds + GRACE_SECONDS
        _, left = await asyncio.wait(watching, timeout=seconds)
        if left:
            logs.logger().warning("drain timeout", front_ends=len(left))
        for worker in self._workers:
            if worker.process.returncode is None:
                worker.process.kill()

    def _serve(self, model: Model, batcher: Batcher) -> None:
        """The model has passed the gate."""
        self._model, self._batcher = model, batcher
        limits = limits_of(self._settings, model)
        served = Serve(model.artifact.digest, model.session.provider, limits, model.batch_rows, model.batch_tokens)
        for worker in self._workers:
            worker.channel.send(served)

    async def _tick(self) -> None:
        """Tells the front ends what has changed."""
        told_stage, told_state, told_at = "", None, 0.0
        while True:
            ready = all(worker.ready for worker in self._workers)
            stage = self._predictor.stage
            # A front end drains when it is told to by signal, and not half before.
            if stage not in (told_stage, "draining") and (ready or stage != "ready"):
                told_stage = stage
                for worker in self._workers:
                    worker.channel.send(Stage(stage))
                if stage == "ready":
                    assert self._model is not None
                    log_ready(self._settings, self._model)
            if self._batcher is not None:
                state = State(self._batcher.waiting(), self._batcher.stuck())
                now = time.monotonic()
                if state != told_state or now - told_at > SIGN_OF_LIFE_SECONDS:
                    told_state, told_at = state, now
                    for worker in self._workers:
                        worker.channel.send(state)
            await asyncio.sleep(TICK_SECONDS)

    def _hear(self, worker: HttpWorker, message: Message) -> None:
        match message:
            case Submit():
                self._submit(worker, message)
            case Cancel() if (pending := worker.pending.get(message.id)) is not None:
                pending.future.cancel()
            case Ready():
                worker.ready = True
            case Ask():
                task = asyncio.create_task(self._answer(worker, message.id))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    def _submit(self, worker: HttpWorker, message: Submit) -> None:
        assert self._batcher is not None
        try:
            pending = self._batcher.submit(message.units, message.deadline)
        except RequestError as error:
            worker.channel.send(failure(message.id, error))
            return
        worker.pending[message.id] = pending
        pending.future.add_done_callback(partial(self._ended, worker, message.id, pending))

    def _ended(
        self, worker: HttpWorker, number: int, pending: PendingRequest, future: "asyncio.Future[list[object]]"
    ) -> None:
        worker.pending.pop(number, None)
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            worker.channel.send(Done(number, future.result(), pending.dispatched, pending.finished))
        else:
            assert isinstance(error, RequestError)
            worker.channel.send(failure(number, error))

    async def _answer(self, asking: HttpWorker, number: int) -> None:
        """Sends what all processes counted; without those that do not answer."""
        asked = [worker.channel.ask(ASK_SECONDS) for worker in self._workers if worker.process.returncode is None]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        parts = [answer for answer in answers if isinstance(answer, Snapshot)]
        if len(parts) < len(self._workers):
            logs.logger().warning("a worker end does not answer", answered=len(parts), front_ends=len(self._workers))
        asking.channel.send(Part(number, add_up([self._totals.snapshot(), *parts])))


def failure(number: int, error: RequestError) -> Failed:
    """The error as a message."""
    return Failed(number, type(error).__name__, str(error), error.reason, error.retry_after_seconds, error.close)


def serve_with_http_processes(settings: Settings, sockets: list[socket.socket]) -> NoReturn:
    """Serves until SIGTERM or SIGINT, then ends the process."""
    # As for the one process that does it all: a runner with a result must not wait long for a busy loop.
    sys.setswitchinterval(SWITCH_SECONDS)
    code = uvloop.run(Engine(settings).run(sockets))
    sys.stdout.flush()
    # A model's run that never ends cannot be stopped, and aborts the interpreter when that unwinds under it.
    os._exit(code)
