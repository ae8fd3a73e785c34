"""Wires the service: `python -m app` serves; `create_app(settings)` builds the application for any ASGI server."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from fastapi import FastAPI

from app import __version__, grpc
from app.errors import ConfigError
from app.http.app import build_app
from app.http.routes import HOOKS, LABELS
from app.http.server import Server, listen
from app.jobs import require_library
from app.lifecycle import Lifecycle, OnFatal, exit_process, or_exit
from app.settings import Settings, read_settings
from app.telemetry import logging
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import Metrics, MetricsSource, QueueMetrics
from app.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from app.grpc.server import GrpcServer
    from app.jobs.queue import JobQueue


def create_app(settings: Settings | None = None, on_fatal: OnFatal = exit_process) -> FastAPI:
    """The application. Its lifespan passes the gate in the background; `/ready` says when.

    settings: from the environment if None. on_fatal: called when the model does not pass the gate.
    """
    settings = settings or or_exit(read_settings)
    if settings.grpc_port:
        or_exit(grpc.require, settings)
    metrics = Metrics((*LABELS, grpc.LABEL) if settings.grpc_port else LABELS)
    logging.configure(settings.log_level, settings.log_format, metrics.log_lines_dropped)
    lifecycle = Lifecycle(settings, metrics, on_fatal)
    lifecycle.tracing = or_exit(Tracing.start)
    has_model = settings.role == "server"
    queue_metrics = None
    if settings.takes_jobs:
        lifecycle.jobs = or_exit(open_queue, settings)
        queue_metrics = QueueMetrics(metrics.registry)
        metrics.answered["/jobs", 202]  # there from the start, as all others

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if has_model:
            lifecycle.load(lifecycle.announce)
        gpu = GpuSampler.start(metrics.registry) if has_model and settings.provider != "cpu" else None
        grpc_server = await serve_grpc(settings, app, metrics) if settings.grpc_port else None
        async with lifecycle.jobs.watched(queue_metrics, lifecycle.heard) if queue_metrics else nullcontext():
            yield
        if grpc_server is not None:
            await grpc_server.stop()
        lifecycle.close()
        if gpu is not None:
            gpu.stop()

    return build_app(settings, lifecycle, MetricsSource(metrics), lifespan)


def open_queue(settings: Settings) -> "JobQueue":
    """The queue of jobs. Raises ConfigError."""
    if settings.http_processes > 1:
        raise ConfigError(f"APP_HTTP_PROCESSES={settings.http_processes}: expected 1 with APP_QUEUE_URL")
    require_library()
    from app.jobs.queue import JobQueue

    return JobQueue(settings)


async def serve_grpc(settings: Settings, app: FastAPI, metrics: Metrics) -> "GrpcServer":
    """Serves gRPC beside HTTP; ends the process if its port cannot be had."""
    # Its core writes to standard error by itself, which has the one line that says why the process ended.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from app.grpc.server import GrpcServer

    try:
        state = app.state
        return await GrpcServer.start(settings, state.lifecycle, metrics, HOOKS, state.request_log, state.keys)
    except ConfigError as error:
        exit_process(error)
        raise


def main() -> None:
    """`python -m app`: serves until SIGTERM or SIGINT."""
    settings = or_exit(read_settings)
    if settings.admin_port and settings.http_processes > 1:
        exit_process(ConfigError(f"APP_HTTP_PROCESSES={settings.http_processes}: expected 1 with APP_ADMIN_PORT"))
    if settings.grpc_port:
        or_exit(grpc.require, settings)
    if settings.http_processes > 1 and not settings.takes_jobs:
        from app.multiprocess.engine import serve_with_http_processes

        serve_with_http_processes(settings)
    sockets = [or_exit(listen, settings.host, settings.port)]
    if settings.admin_port:
        sockets.append(or_exit(listen, settings.host, settings.admin_port, "APP_ADMIN_PORT"))
    app = create_app(settings)
    logging.logger().info("listening", host=settings.host, port=sockets[0].getsockname()[1], version=__version__)
    Server(app, app.state.lifecycle, settings, app.state.metrics_source.metrics).run_and_exit(*sockets)
