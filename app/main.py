"""Wires the service, and reads as its life: settings → verify → load → warm → serve → drain.

`python -m app` serves; `create_app(settings)` builds the application for any ASGI server.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app import __version__, logs
from app.edge import Edge, Traffic
from app.errors import ArtifactError, ConfigError, RequestError, StartupError
from app.exchange import error_answer
from app.gate import Model, pass_gate
from app.gpu import GpuSampler
from app.metrics import Metrics
from app.oip import infer_handler, protocol_router
from app.predictor import Predictor
from app.routes import service_handlers, service_router
from app.server import Server, listen, uvicorn_config
from app.settings import Settings, cpu_quota, read_settings, unknown_variables
from app.ticket import Limits

TERMINATION_LOG = Path("/dev/termination-log")
CUDA_RUNNERS = 2


def stop_process(error: StartupError) -> None:
    """Ends the process with the error's exit code; its one line goes to stderr and to the termination log."""
    line = f"sentiment-inference: {error}"
    print(line, file=sys.stderr, flush=True)
    if TERMINATION_LOG.exists():
        with suppress(OSError):  # a read-only file there must not hide the exit code
            # As stderr does: a path need not be UTF-8.
            TERMINATION_LOG.write_text(line, errors="backslashreplace")
    sys.stdout.flush()
    # Nothing was accepted yet, so there is nothing to unwind; the exit code survives whatever server runs us.
    os._exit(error.exit_code)


def create_app(settings: Settings | None = None, on_fatal: Callable[[StartupError], None] = stop_process) -> "Service":
    """The application. Its lifespan passes the gate in the background; `/ready` says when.

    settings: from the environment if None. on_fatal: called when the model does not pass the gate.
    """
    if settings is None:
        try:
            settings = read_settings()
        except ConfigError as error:
            stop_process(error)
            raise
    logs.configure(settings.log_level, settings.log_format)
    metrics = Metrics()
    predictor = Predictor(metrics)
    traffic = Traffic()
    handlers = {**service_handlers(predictor), "/v2/models/infer": infer_handler(predictor)}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for name in unknown_variables():
            logs.logger().warning("unknown setting", variable=name)
        _open(settings, predictor, on_fatal)
        gpu = GpuSampler.start(metrics.registry) if settings.provider != "cpu" else None
        yield
        predictor.close()
        if gpu is not None:
            gpu.stop()

    app = Service(title="sentiment-inference", version=__version__, lifespan=lifespan)
    app.include_router(service_router(predictor, metrics, handlers))
    app.include_router(protocol_router(predictor, handlers["/v2/models/infer"]))
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.predictor, app.traffic = predictor, traffic
    app.edge = Edge(super(Service, app).__call__, handlers, settings, metrics, predictor, traffic)
    return app


class Service(FastAPI):
    """FastAPI behind the edge, which answers inference requests before FastAPI sees them."""

    edge: Edge
    predictor: Predictor
    traffic: Traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        await self.edge(scope, receive, send)


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    answer = error_answer(error)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    return Response(answer.body, answer.status, headers, "application/json")


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _on_validation_error(_: Request, __: Exception) -> Response:
    # FastAPI's own answer would echo the input.
    return JSONResponse({"error": "invalid request"}, 422)


def _open(settings: Settings, predictor: Predictor, on_fatal: Callable[[StartupError], None]) -> None:
    """Passes the gate in a thread, then serves on the running loop; a model that does not pass ends the process."""
    loop = asyncio.get_running_loop()

    def at(stage: str) -> None:
        predictor.stage = stage

    def run() -> None:
        try:
            model = pass_gate(
                settings.model_dir,
                digest=settings.model_digest,
                provider=settings.provider,
                max_batch_rows=settings.max_batch_rows,
                max_batch_tokens=settings.max_batch_tokens,
                on_stage=at,
            )
        except StartupError as error:
            on_fatal(error)
        # Whatever the gate did not foresee: a process that cannot become ready must end, or nobody notices.
        except Exception as error:
            on_fatal(ArtifactError(f"{settings.model_dir}: the gate failed: {type(error).__name__}: {error}"))
        else:
            with suppress(RuntimeError):  # the loop has closed: the process is ending
                loop.call_soon_threadsafe(serve, model)

    def serve(model: Model) -> None:
        try:
            predictor.serve(model, limits_of(settings, model))
        except RuntimeError as error:  # no more threads
            on_fatal(ConfigError(f"APP_RUNNERS={settings.runners}: cannot start so many: {error}"))
        if predictor.ready:
            # What is there now stays: the collector need not look at it again in the middle of a request.
            gc.freeze()
            _log_ready(settings, model)

    # A daemon: the process must not wait for it when it is told to end. The executor's threads would be waited for.
    threading.Thread(target=run, name="gate", daemon=True).start()


def _log_ready(settings: Settings, model: Model) -> None:
    log = logs.logger()
    if settings.provider == "auto" and model.session.provider == "cpu":
        log.warning("APP_PROVIDER=auto: CUDA is not available, running on the CPU")
    manifest = model.artifact.manifest
    log.info(
        "ready",
        model=manifest.name,
        model_version=manifest.version,
        digest=model.artifact.digest,
        provider=model.session.provider,
        stage_seconds={stage: round(seconds, 3) for stage, seconds in model.stage_seconds.items()},
    )


def limits_of(settings: Settings, model: Model) -> Limits:
    """The batcher's bounds, with "auto" resolved for the provider that is truly in use."""
    runners = settings.runners
    if runners == "auto":
        runners = CUDA_RUNNERS if model.session.provider == "cuda" else cpu_quota()
    return Limits(
        runners,
        model.batch_rows,
        model.batch_tokens,
        settings.max_queue_rows,
        settings.batch_delay_ms / 1000,
        settings.runner_timeout_seconds,
        model.overhead_tokens,
        settings.max_queue_wait_ms / 1000,
    )


def main() -> None:
    """`python -m app`: serves until SIGTERM or SIGINT."""
    try:
        settings = read_settings()
        sock = listen(settings.host, settings.port)
    except StartupError as error:
        stop_process(error)
        raise
    app = create_app(settings)
    logs.logger().info("listening", host=settings.host, port=sock.getsockname()[1], version=__version__)
    server = Server(uvicorn_config(app), app.predictor, app.traffic, settings)
    server.run_and_exit(sock)
