"""An HTTP worker: `python -m app.multiprocess.http_worker LISTENING_FD CHANNEL_FD`, started by the engine.

HTTP, tokens and tensors here; queue, batches and the model there.
"""

import asyncio
import gc
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import FrameType

from app import NAME
from app.errors import ArtifactError, StartupError
from app.http.app import build_app
from app.http.routes import LABELS
from app.http.server import Server
from app.lifecycle import Lifecycle, exit_process, or_exit
from app.multiprocess.channel import Ask, Channel, Done, Failed, Message, Part, Ready, Serve, Stage, State
from app.multiprocess.metrics import Snapshot
from app.multiprocess.remote import EngineMetrics, RemoteBatcher, open_model
from app.predictor import Predictor
from app.runtime.session import Model
from app.settings import Settings, read_settings
from app.telemetry import logging
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing

EXIT_WITHOUT_ENGINE = 1


class HttpWorker:
    """What the engine says, done."""

    def __init__(self, settings: Settings, metrics: Metrics, lifecycle: Lifecycle) -> None:
        self._settings = settings
        self._metrics = metrics
        self._lifecycle = lifecycle
        self._batcher: RemoteBatcher | None = None
        self._predictor: Predictor | None = None
        self.channel = Channel(self._on_message, self._on_lost)

    def _on_message(self, message: Message) -> None:
        batcher = self._batcher
        match message:
            case Done() if batcher is not None:
                batcher.done(message)
            case Failed() if batcher is not None:
                batcher.failed(message)
            case State() if batcher is not None:
                batcher.heard(message)
            case Stage():
                self._lifecycle.enter(message.name)
                if message.name == "ready" and self._predictor is not None:
                    self._lifecycle.serve(self._predictor)
            case Serve():
                # A daemon, as the gate's thread is: the process must not wait for it when it is told to end.
                loop = asyncio.get_running_loop()
                threading.Thread(target=self._open, args=(message, loop), name="open", daemon=True).start()
            case Ask():
                self.channel.send(Part(message.id, Snapshot.of(self._metrics)))

    def _open(self, served: Serve, loop: asyncio.AbstractEventLoop) -> None:
        try:
            model = open_model(self._settings, served)
        except StartupError as error:
            exit_process(error)
        # Whatever was not foreseen: a worker that cannot become ready must end, or nobody notices.
        except Exception as error:
            exit_process(ArtifactError(f"{self._settings.model_dir}: not opened: {type(error).__name__}: {error}"))
        else:
            with suppress(RuntimeError):  # the loop has closed: the process is ending
                loop.call_soon_threadsafe(self._opened, served, model)

    def _opened(self, served: Serve, model: Model) -> None:
        self._batcher = RemoteBatcher(self.channel, served)
        self._batcher.start()
        self._predictor = Predictor(model, self._batcher, self._metrics)
        gc.freeze()
        self.channel.send(Ready())

    def _on_lost(self) -> None:
        # Before it is ready the engine says itself why it ends.
        if self._lifecycle.ready:
            print(f"{NAME}: the engine process has ended", file=sys.stderr, flush=True)
        os._exit(EXIT_WITHOUT_ENGINE)


class WorkerServer(Server):
    """A second signal is the same one, sent by the engine and by who ends all of a service. The engine kills."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains, however often it is told to."""
        if self._drain is None:
            super().handle_exit(sig, frame)


def main() -> None:
    """`python -m app.multiprocess.http_worker`: serves until SIGTERM, or until the engine ends."""
    listening, theirs = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    settings = read_settings()
    metrics = Metrics(LABELS)
    logging.configure(settings.log_level, settings.log_format, metrics.log_lines_dropped)
    lifecycle = Lifecycle(settings, metrics)
    lifecycle.tracing = or_exit(Tracing.start)
    worker = HttpWorker(settings, metrics, lifecycle)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await asyncio.get_running_loop().create_unix_connection(lambda: worker.channel, sock=theirs)
        yield
        lifecycle.close()

    app = build_app(settings, lifecycle, EngineMetrics(metrics, worker.channel), lifespan)
    WorkerServer(app, lifecycle, settings, metrics).run_and_exit(listening)


if __name__ == "__main__":
    main()
