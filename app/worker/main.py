"""Wires a worker: the model behind the same gate and batcher as a server's, the queue in the place of its routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app import __version__
from app.errors import ConfigError
from app.http.app import build_app
from app.http.predict import predict_batch
from app.http.routes import OPERATIONAL, ROUTES
from app.http.server import Server, listen
from app.jobs import require_library
from app.lifecycle import Lifecycle, exit_process, or_exit
from app.predictor import Predictor
from app.settings import read_settings
from app.telemetry import logging
from app.telemetry.gpu import GpuSampler
from app.telemetry.metrics import JobMetrics, Metrics, MetricsSource
from app.telemetry.tracing import Tracing

DESCRIPTION = "Answers jobs from APP_QUEUE_URL with the model in APP_MODEL_DIR until SIGTERM; probes on APP_PORT."
TASKS = sorted({task for route in ROUTES if route.handler is predict_batch for task in route.tasks})
# The batcher's own bound would refuse; a worker has no more than it took.
UNBOUNDED = {"max_queue_rows": 1_000_000_000}


def main() -> None:
    """`python -m app.worker`: takes jobs until SIGTERM or SIGINT."""
    settings = or_exit(read_settings).model_copy(update=UNBOUNDED)
    metrics = Metrics(())
    logging.configure(settings.log_level, settings.log_format, metrics.log_lines_dropped)
    lifecycle = Lifecycle(settings, metrics)
    lifecycle.tracing = or_exit(Tracing.start)
    or_exit(require_library)
    from app.jobs.leases import Leases
    from app.worker.worker import Worker

    worker = Worker(settings, or_exit(Leases, settings), lifecycle, JobMetrics(metrics.registry))

    def start(predictor: Predictor) -> None:
        task = predictor.model.artifact.manifest.task
        if task not in TASKS:
            exit_process(ConfigError(f"APP_MODEL_DIR={settings.model_dir}: jobs take a model of {TASKS}, found {task}"))
        worker.start(predictor)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        lifecycle.load(start)
        gpu = GpuSampler.start(metrics.registry) if settings.provider != "cpu" else None
        yield
        await worker.close()
        lifecycle.close()
        if gpu is not None:
            gpu.stop()

    sock = or_exit(listen, settings.host, settings.port)
    app = build_app(settings, lifecycle, MetricsSource(metrics), lifespan, OPERATIONAL)
    logging.logger().info("listening", host=settings.host, port=sock.getsockname()[1], version=__version__)
    Server(app, lifecycle, settings, metrics).run_and_exit(sock)
