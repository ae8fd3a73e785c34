"""From settings to a model that serves: the gate in a thread, then the runners; or the end of the process."""

import asyncio
import gc
import threading
from collections.abc import Callable
from contextlib import suppress

from app.batching.admission import Limits
from app.batching.batcher import Batcher
from app.errors import ArtifactError, ConfigError, StartupError
from app.predictor import Predictor
from app.runtime.loading import load_model
from app.runtime.model import Model
from app.settings import Settings, cpu_quota, unknown_variables
from app.telemetry import logging as logs

CUDA_RUNNERS = 2
OnFatal = Callable[[StartupError], None]


def start_loading(
    settings: Settings, predictor: Predictor, on_fatal: OnFatal, on_serving: Callable[[Model, Batcher], None]
) -> None:
    """Passes the gate in a thread, then serves on the running loop; a model that does not pass ends the process.

    on_fatal: called in that thread with what is wrong. on_serving: called on the loop once the runners have started.
    """
    for name in unknown_variables():
        logs.logger().warning("unknown setting", variable=name)
    loop = asyncio.get_running_loop()

    def at(stage: str) -> None:
        predictor.stage = stage

    def run() -> None:
        try:
            model = load_model(
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
            batcher = predictor.serve(model, limits_of(settings, model))
        except RuntimeError as error:  # no more threads
            on_fatal(ConfigError(f"APP_RUNNERS={settings.runners}: cannot start so many: {error}"))
            return
        if batcher is not None:
            # What is there now stays: the collector need not look at it again in the middle of a request.
            gc.freeze()
            on_serving(model, batcher)

    # A daemon: the process must not wait for it when it is told to end. The executor's threads would be waited for.
    threading.Thread(target=run, name="gate", daemon=True).start()


def log_ready(settings: Settings, model: Model) -> None:
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
