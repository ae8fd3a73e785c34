"""Wires the service: `python -m app` serves; `create_app(settings)` builds the application for any ASGI server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from app import __version__
from app.http.app import build_app
from app.http.routes import LABELS
from app.http.server import Server, listen
from app.lifecycle import Lifecycle, OnFatal, exit_process, or_exit
from app.settings import Settings, read_settings
from app.telemetry import logging
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import Metrics, MetricsSource


def create_app(settings: Settings | None = None, on_fatal: OnFatal = exit_process) -> FastAPI:
    """The application. Its lifespan passes the gate in the background; `/ready` says when.

    settings: from the environment if None. on_fatal: called when the model does not pass the gate.
    """
    settings = settings or or_exit(read_settings)
    metrics = Metrics(LABELS)
    logging.configure(settings.log_level, settings.log_format, metrics.log_lines_dropped)
    lifecycle = Lifecycle(settings, metrics, on_fatal)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        lifecycle.load(lifecycle.announce)
        gpu = GpuSampler.start(metrics.registry) if settings.provider != "cpu" else None
        yield
        lifecycle.close()
        if gpu is not None:
            gpu.stop()

    return build_app(settings, lifecycle, MetricsSource(metrics), lifespan)


def main() -> None:
    """`python -m app`: serves until SIGTERM or SIGINT."""
    settings = or_exit(read_settings)
    if settings.http_processes > 1:
        from app.multiprocess.engine import serve_with_http_processes

        serve_with_http_processes(settings)
    sock = or_exit(listen, settings.host, settings.port)
    app = create_app(settings)
    logging.logger().info("listening", host=settings.host, port=sock.getsockname()[1], version=__version__)
    Server(app, app.state.lifecycle, settings, app.state.metrics_source.metrics).run_and_exit(sock)
