"""Wires the service, and reads as its life: settings → verify → load → warm → serve → drain.

`python -m app` serves; `create_app(settings)` builds the application for any ASGI server.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app import __version__
from app.ending import exit_process
from app.errors import ConfigError, StartupError
from app.http.app import Service, assemble
from app.http.server import Server, listen, uvicorn_config
from app.lifecycle import OnFatal, log_ready, start_loading
from app.multiprocess.engine import serve_with_http_processes
from app.multiprocess.totals import MetricsSource
from app.predictor import Predictor
from app.settings import Settings, read_settings
from app.telemetry import logging as logs
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import Metrics


def create_app(settings: Settings | None = None, on_fatal: OnFatal = exit_process) -> Service:
    """The application. Its lifespan passes the gate in the background; `/ready` says when.

    settings: from the environment if None. on_fatal: called when the model does not pass the gate.
    """
    if settings is None:
        try:
            settings = read_settings()
        except ConfigError as error:
            exit_process(error)
            raise
    logs.configure(settings.log_level, settings.log_format)
    predictor = Predictor(metrics := Metrics())

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        start_loading(settings, predictor, on_fatal, lambda model, _: log_ready(settings, model))
        gpu = GpuSampler.start(metrics.registry) if settings.provider != "cpu" else None
        yield
        predictor.close()
        if gpu is not None:
            gpu.stop()

    return assemble(settings, MetricsSource(metrics, predictor), lifespan)


def main() -> None:
    """`python -m app`: serves until SIGTERM or SIGINT."""
    try:
        settings = read_settings()
        sockets = listen(settings.host, settings.port, settings.http_processes)
    except StartupError as error:
        exit_process(error)
        raise
    logs.configure(settings.log_level, settings.log_format)
    logs.logger().info("listening", host=settings.host, port=sockets[0].getsockname()[1], version=__version__)
    if settings.http_processes > 1:
        serve_with_http_processes(settings, sockets)
    app = create_app(settings)
    Server(uvicorn_config(app), app.predictor, app.in_flight, settings).run_and_exit(sockets[0])
