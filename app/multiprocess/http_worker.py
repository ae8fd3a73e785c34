"""A front end: `python -m app.multiprocess.http_worker LISTENING_FD LINK_FD`, started by the engine.

HTTP, tokens and tensors here; queue, batches and the model there.
"""

import asyncio
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.ending import exit_process
from app.errors import StartupError
from app.http.app import assemble
from app.http.server import Server, uvicorn_config
from app.multiprocess.channel import Ask, Channel, Done, Failed, Message, Part, Ready, Serve, Stage, State
from app.multiprocess.remote import EngineMetrics, RemoteBatcher, open_remote
from app.predictor import Predictor
from app.settings import Settings, read_settings
from app.telemetry import logging as logs
from app.telemetry.metrics import Metrics

EXIT_WITHOUT_ENGINE = 1


class HttpWorker:
    """What the engine says, done."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.predictor = Predictor(metrics := Metrics())
        self.totals = EngineMetrics(metrics, self.predictor)
        self._batcher: RemoteBatcher | None = None
        self._opening: asyncio.Task[None] | None = None

    async def connect(self, sock: socket.socket) -> None:
        """Opens the link."""
        loop = asyncio.get_running_loop()
        _, self.totals.channel = await loop.create_unix_connection(
            lambda: Channel(self._on_message, self._on_lost), sock=sock
        )

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
                self.predictor.stage = message.name
            case Serve():
                self._opening = asyncio.create_task(self._open(message))
            case Ask():
                self.totals.channel.send(Part(message.id, self.totals.snapshot()))

    async def _open(self, served: Serve) -> None:
        try:
            model = await asyncio.to_thread(open_remote, self._settings, served)
        except StartupError as error:
            exit_process(error)
            raise
        self._batcher = RemoteBatcher(self.totals.channel, served.limits)
        self.predictor.use(model, served.limits, self._batcher)
        gc.freeze()
        self.totals.channel.send(Ready())

    def _on_lost(self) -> None:
        # Before it is ready the engine says itself why it ends.
        if self.predictor.ready:
            print("sentiment-inference: the engine process has ended", file=sys.stderr, flush=True)
        os._exit(EXIT_WITHOUT_ENGINE)


def main() -> None:
    """`python -m app.multiprocess.http_worker`: serves until SIGTERM, or until the engine ends."""
    listening, channel = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    settings = read_settings()
    logs.configure(settings.log_level, settings.log_format)
    worker = HttpWorker(settings)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        await worker.connect(channel)
        yield
        worker.predictor.close()

    app = assemble(settings, worker.totals, lifespan)
    # A second signal is the same one, sent by the engine and by who ends all of a service. The engine kills.
    Server(uvicorn_config(app), worker.predictor, app.in_flight, settings, insist=False).run_and_exit(listening)


if __name__ == "__main__":
    main()
