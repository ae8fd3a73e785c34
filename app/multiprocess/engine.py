"""The engine of a server with several HTTP processes: one queue, one session, and a channel to each HTTP worker.

Each worker listens on a socket of its own on the same address. If one ends unasked, the others drain and the whole
server ends with an error: whoever started it starts it again, whole.
"""

import asyncio
import os
import signal
import socket
import sys
import time
from functools import partial
from typing import NoReturn

import uvloop

from app import __version__
from app.batching.queue import PendingRequest
from app.errors import RequestError, StartupError
from app.http.server import BACKLOG, SWITCH_SECONDS, listen
from app.lifecycle import Lifecycle, exit_process, or_exit
from app.multiprocess.channel import (
    Ask,
    Cancel,
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
from app.multiprocess.metrics import Snapshot, add_up
from app.multiprocess.workers import Worker
from app.predictor import Predictor
from app.settings import Settings
from app.signals import STOP_SIGNALS, exit_before_start, on_stop
from app.telemetry import logging
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import Metrics

TICK_SECONDS = 0.01
SIGN_OF_LIFE_SECONDS = 1.0
# Beyond its own drain, a worker's last seconds.
GRACE_SECONDS = 3.0
EXIT_WORKER_LOST = 1


def serve_with_http_processes(settings: Settings) -> NoReturn:
    """Serves until a signal, then ends the process."""
    # Nothing was accepted yet, and the workers that are there end with the engine.
    on_stop(exit_before_start)
    metrics = Metrics(())
    logging.configure(settings.log_level, settings.log_format, metrics.log_lines_dropped)
    sockets = or_exit(_listen, settings)
    port = sockets[0].getsockname()[1]
    logging.logger().info("listening", host=settings.host, port=port, version=__version__)
    # As for the one process that does it all: a runner with a result must not wait long for a busy loop.
    sys.setswitchinterval(SWITCH_SECONDS)
    uvloop.run(Engine(settings, metrics).run(sockets))
    raise AssertionError("the engine ends the process")


def _listen(settings: Settings) -> list[socket.socket]:
    """A listening socket for each worker, all on one address; the kernel deals connections out to them."""
    # The address must be nobody else's, which those that share it would not notice.
    with listen(settings.host, settings.port) as first:
        family, address = first.family, first.getsockname()[:2]
    return [
        socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=True)
        for _ in range(settings.http_processes)
    ]


class Engine:
    """`run()` is its life."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._lifecycle = Lifecycle(settings, metrics)
        self._workers: list[Worker] = []
        # From when the model has passed the gate; it serves once every worker is ready.
        self._predictor: Predictor | None = None
        # An event loop alone would not keep them.
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._exit_code = 0

    async def run(self, sockets: list[socket.socket]) -> None:
        """Starts a worker for each listening socket, serves them, and ends the process after a signal."""
        try:
            for sock in sockets:
                self._workers.append(await Worker.start(sock, self._hear))
        except OSError as error:  # no more processes
            exit_process(StartupError(f"cannot start the HTTP processes: {error.strerror}"))
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is exit_before_start:
                asyncio.get_running_loop().add_signal_handler(number, self._stop)
        self._lifecycle.load(self._on_loaded)
        gpu = GpuSampler.start(self._metrics.registry) if self._settings.provider != "cpu" else None
        watching = [asyncio.create_task(self._watch(worker)) for worker in self._workers]
        self._tasks.update(asyncio.create_task(worker.require_answers()) for worker in self._workers)
        self._tasks.add(asyncio.create_task(self._tick()))
        await self._stopping.wait()
        await self._drain(watching)
        self._lifecycle.close()
        if gpu is not None:
            gpu.stop()
        logging.flush()
        # At once, while one more signal still finds its handler. And a model's run that never ends cannot be stopped,
        # and aborts the interpreter when that unwinds under it.
        os._exit(self._exit_code)

    def _stop(self) -> None:
        """The first signal: the workers drain, and then the engine. The second: all stop without waiting."""
        for worker in self._workers:
            if worker.process.returncode is None:
                worker.process.send_signal(signal.SIGKILL if self._stopping.is_set() else signal.SIGTERM)
        self._lifecycle.drain()
        self._stopping.set()

    async def _watch(self, worker: Worker) -> None:
        code = await worker.process.wait()
        worker.answers = False
        for pending in list(worker.pending.values()):
            pending.future.cancel()
        if self._stopping.is_set():
            return
        # Told to end before it served, by who tells all processes and began with it: the engine's own signal comes.
        if self._lifecycle.predictor is not None or (code and -code not in STOP_SIGNALS):
            logging.logger().error("an HTTP worker ended", process_id=worker.process.pid, code=code)
            self._exit_code = code if code > 0 else EXIT_WORKER_LOST
        self._stop()

    async def _drain(self, watching: list[asyncio.Task[None]]) -> None:
        seconds = self._settings.drain_delay_seconds + self._settings.drain_timeout_seconds + GRACE_SECONDS
        _, left = await asyncio.wait(watching, timeout=seconds)
        if left:
            logging.logger().warning("drain timeout", http_workers=len(left))
        for worker in self._workers:
            if worker.process.returncode is None:
                worker.process.kill()

    def _on_loaded(self, predictor: Predictor) -> None:
        self._predictor = predictor
        model = predictor.model
        self._tell(Serve(model.artifact.digest, model.provider, predictor.batcher.limits))

    def _tell(self, message: Message) -> None:
        for worker in self._workers:
            worker.channel.send(message)

    async def _tick(self) -> None:
        """Tells the workers what has changed."""
        lifecycle = self._lifecycle
        told_stage, told_state, told_at = "", None, 0.0
        while True:
            announced = lifecycle.predictor is not None or lifecycle.draining
            if self._predictor is not None and not announced and all(worker.ready for worker in self._workers):
                lifecycle.announce(self._predictor)
            # A worker drains when it is told to by signal, and not half before.
            if lifecycle.stage not in (told_stage, "draining"):
                told_stage = lifecycle.stage
                self._tell(Stage(told_stage))
            if self._predictor is not None:
                batcher, now = self._predictor.batcher, time.monotonic()
                state = State(batcher.state(), batcher.stuck())
                if state != told_state or now - told_at > SIGN_OF_LIFE_SECONDS:
                    told_state, told_at = state, now
                    self._tell(state)
            await asyncio.sleep(TICK_SECONDS)

    def _hear(self, worker: Worker, message: Message) -> None:
        match message:
            case Submit():
                self._submit(worker, message)
            case Cancel() if (pending := worker.pending.get(message.id)) is not None:
                pending.future.cancel()
            case Ready():
                worker.ready = True
            case Ask():
                task = asyncio.create_task(self._answer(worker, message.id))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _submit(self, worker: Worker, message: Submit) -> None:
        try:
            if self._predictor is None:
                raise self._lifecycle.unavailable()
            pending = self._predictor.batcher.submit(message.units, message.deadline)
        except RequestError as error:
            worker.channel.send(failure(message.id, error))
            return
        worker.pending[message.id] = pending
        pending.future.add_done_callback(partial(self._ended, worker, message.id, pending))

    def _ended(
        self, worker: Worker, number: int, pending: PendingRequest, future: "asyncio.Future[list[object]]"
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

    async def _answer(self, asking: Worker, number: int) -> None:
        """Sends what all processes counted. Of one that does not answer or has ended, what it last said: to whoever
        computes rates, a total that falls began anew."""
        await asyncio.gather(*(worker.refresh() for worker in self._workers))
        parts = [answer for worker in self._workers if (answer := worker.channel.last_answer) is not None]
        asking.channel.send(Part(number, add_up([Snapshot.of(self._metrics), *parts])))


def failure(number: int, error: RequestError) -> Failed:
    """The error as a message."""
    return Failed(number, type(error).__name__, str(error), error.reason, error.retry_after_seconds, error.close)
