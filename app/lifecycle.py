"""The service's life: verifying → loading → warming → ready → draining; requests in flight; start-up and exit.

The one place that knows what stage the service is in. Knows nothing of HTTP.
"""

import asyncio
import gc
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from app import NAME
from app.batching.admission import Limits
from app.batching.batcher import Batch, Batcher
from app.errors import ArtifactError, ConfigError, StartupError, Unavailable
from app.predictor import Predictor
from app.runtime.loading import load_configured
from app.runtime.session import Model
from app.settings import Settings, unknown_variables
from app.telemetry import logging
from app.telemetry.metrics import Metrics
from app.telemetry.tracing import Tracing

if TYPE_CHECKING:
    from app.jobs.queue import JobQueue

TERMINATION_LOG = Path("/dev/termination-log")
OnFatal = Callable[[StartupError], None]
P = ParamSpec("P")
T = TypeVar("T")


def exit_process(error: StartupError) -> None:
    """Ends the process with the error's exit code; its one line goes to stderr and to the termination log."""
    line = f"{NAME}: {error}"
    with suppress(OSError):  # nobody reads it, which must not hide the exit code
        print(line, file=sys.stderr, flush=True)
    if TERMINATION_LOG.exists():
        with suppress(OSError):  # a read-only file there
            # As stderr does: a path need not be UTF-8.
            TERMINATION_LOG.write_text(line, errors="backslashreplace")
    logging.flush()
    # Nothing was accepted yet, so there is nothing to unwind; the exit code survives whatever server runs us.
    os._exit(error.exit_code)


def or_exit(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns; a StartupError from it ends the process."""
    try:
        return work(*args, **kwargs)
    except StartupError as error:
        exit_process(error)
        raise


class Lifecycle:
    """predictor: what answers, from when the model has passed every check. jobs: the queue of jobs, where the settings
    name one. tracing: where an endpoint for traces is set. refusing: whether new requests are refused because the
    service ends. in_flight: inference requests that are not answered yet, and jobs that a worker has. on_change: called
    on the event loop when it becomes ready, drains, or refuses."""

    jobs: "JobQueue"
    tracing: Tracing | None = None

    def __init__(self, settings: Settings, metrics: Metrics, on_fatal: OnFatal = exit_process) -> None:
        """on_fatal: called with what keeps the service from ever being ready."""
        self.predictor: Predictor | None = None
        self.refusing = False
        self.draining = False
        self.in_flight = 0
        self.on_change: list[Callable[[], None]] = []
        self._settings = settings
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._stage = "verifying" if settings.role == "server" else "connecting"
        self._idle: asyncio.Future[None] | None = None
        metrics.in_flight.set_function(lambda: self.in_flight)

    @property
    def stage(self) -> str:
        """`signature` (with public keys), `verifying`, `loading`, `warming`, `connecting` (to the queue of jobs),
        `ready` or `draining`, which nothing leads out of."""
        return "draining" if self.draining else self._stage

    def enter(self, stage: str) -> None:
        """Says what the service is at."""
        self._stage = stage

    def heard(self, answers: bool) -> None:
        """Whether the queue of jobs answers: all that a gateway needs."""
        if self._settings.role == "gateway":
            self.enter("ready" if answers else "connecting")

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    def unavailable(self) -> Unavailable:
        """Why requests are refused now."""
        reason = "draining" if self.draining else "not_ready"
        return Unavailable(f"not ready: {self.stage}", reason, close=self.draining)

    def loaded(self) -> Predictor:
        """The predictor. Raises Unavailable before there is one."""
        if self.predictor is None:
            raise self.unavailable()
        return self.predictor

    def stuck(self) -> str | None:
        """Why no progress can be made, or None."""
        return self.predictor.batcher.stuck() if self.predictor is not None else None

    def load(self, on_loaded: Callable[[Predictor], None]) -> None:
        """Passes the gate in a thread and starts the runners; then calls `on_loaded` on the running event loop."""
        for name in unknown_variables():
            logging.logger().warning("unknown setting", variable=name)
        loop = asyncio.get_running_loop()
        # A daemon: the process must not wait for it when it is told to end. The executor's threads would be waited for.
        threading.Thread(target=self._pass_gate, args=(loop, on_loaded), name="gate", daemon=True).start()

    def _pass_gate(self, loop: asyncio.AbstractEventLoop, on_loaded: Callable[[Predictor], None]) -> None:
        settings = self._settings
        try:
            model = load_configured(settings, on_stage=self.enter)
        except StartupError as error:
            self._on_fatal(error)
        # Whatever the gate did not foresee: a process that cannot become ready must end, or nobody notices.
        except Exception as error:
            self._on_fatal(ArtifactError(f"{settings.model_dir}: the gate failed: {type(error).__name__}: {error}"))
        else:
            with suppress(RuntimeError):  # the loop has closed: the process is ending
                loop.call_soon_threadsafe(self._start, model, on_loaded)

    def _start(self, model: Model, on_loaded: Callable[[Predictor], None]) -> None:
        if self.draining:
            return
        settings, metrics = self._settings, self._metrics
        limits = Limits(
            model.runners,
            model.batch_rows,
            model.batch_tokens,
            settings.max_queue_rows,
            settings.batch_delay_ms / 1000,
            settings.runner_timeout_seconds,
            model.overhead_tokens,
            settings.max_queue_wait_ms / 1000,
        )
        batcher = Batcher(
            model.run, limits, model.tokens_per_second, partial(count_batch, metrics, tracing=self.tracing)
        )
        try:
            batcher.start()
        except RuntimeError as error:  # no more threads
            self._on_fatal(ConfigError(f"APP_RUNNERS={settings.runners}: cannot start so many: {error}"))
            return
        metrics.runners.set(limits.runners)
        metrics.queue_rows.set_function(lambda: batcher.state().rows)
        # What is there now stays: the collector need not look at it again in the middle of a request.
        gc.freeze()
        on_loaded(Predictor(model, batcher, metrics))

    def serve(self, predictor: Predictor) -> None:
        """Answers with `predictor` from now on."""
        self.predictor = predictor
        self.enter("ready")
        self._tell()

    def announce(self, predictor: Predictor) -> None:
        """Serves, and says so in the log and the metrics."""
        self.serve(predictor)
        model, metrics, log = predictor.model, self._metrics, logging.logger()
        manifest = model.artifact.manifest
        info = (manifest.name, manifest.version, model.artifact.digest, model.provider, manifest.precision)
        metrics.info.labels(*info).set(1)
        for stage, seconds in model.stage_seconds.items():
            metrics.load.labels(stage).set(seconds)
        if manifest.reference_distribution is not None:
            predictor.prediction_counter.expect(manifest.reference_distribution.ratios)
        metrics.ready.set(1)
        if self._settings.provider == "auto" and model.provider == "cpu":
            log.warning("APP_PROVIDER=auto: CUDA is not available, running on the CPU")
        log.info(
            "ready",
            model=manifest.name,
            model_version=manifest.version,
            digest=model.artifact.digest,
            provider=model.provider,
            stage_seconds={stage: round(seconds, 3) for stage, seconds in model.stage_seconds.items()},
        )

    def request_ended(self) -> None:
        """Counts one request less in flight."""
        self.in_flight -= 1
        if not self.in_flight and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing is in flight; False if that took longer than `timeout_seconds`."""
        if not self.in_flight:
            return True
        self._idle = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait([self._idle], timeout=timeout_seconds)
        return bool(done)

    def drain(self) -> None:
        """Not ready from now on, but whoever comes all the same is answered."""
        self.draining = True
        self._metrics.ready.set(0)
        self._tell()

    def refuse(self) -> None:
        """Refuses new requests from now on; accepted ones go on."""
        self.refusing = True
        self.drain()

    def _tell(self) -> None:
        for listener in self.on_change:
            listener()

    def close(self) -> None:
        """Ends the runners; whatever still waits fails with Unavailable. Sends the traces that are left."""
        self.refuse()
        if self.predictor is not None:
            self.predictor.batcher.close()
        if self.tracing is not None:
            self.tracing.close()


def count_batch(metrics: Metrics, batch: Batch, tracing: Tracing | None = None) -> None:
    """Counts a finished run, and traces it; the batcher's `on_batch`."""
    rows, tokens, run_seconds = batch.rows, batch.tokens, batch.finished - batch.started
    metrics.statistics.runs += 1
    metrics.run.observe(run_seconds)
    metrics.runner_busy.inc(run_seconds)
    metrics.batch_rows.observe(rows)
    metrics.tokens_real.inc(tokens)
    metrics.tokens_padding.inc(batch.padded_tokens - tokens)
    for entry in batch.entries:
        metrics.queue_wait.observe(batch.started - entry.submitted)
    if tracing is not None:
        traces = dict.fromkeys(entry.request.trace for entry in batch.entries if entry.request.trace is not None)
        attributes = {"rows": rows, "tokens": tokens, "padded_tokens": batch.padded_tokens}
        tracing.ran(traces, batch.started, batch.finished, attributes)
