"""The one use case: texts or tensors in, predictions out, through the gate's model and the batcher.

Knows nothing of HTTP. Also the one place that knows what stage the service is in.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import cast

from app.artifact.datatypes import Array, Tensors
from app.batching.admission import Batching, FinishedRun, Limits, PendingRequest
from app.batching.batcher import Batcher
from app.batching.lag import EventLoopLag
from app.errors import NotFound, Unavailable
from app.runtime.model import Model
from app.runtime.tasks.task import Encoded, TensorTask, TextTask
from app.telemetry import metrics as m

# Tokenising this many characters takes about a millisecond; more would hold up every other request.
MAX_INLINE_CHARACTERS = 8192


@dataclass(slots=True)
class Statistics:
    """Totals since start, for the protocol's statistics; times in seconds."""

    succeeded: int = 0
    succeeded_seconds: float = 0.0
    failed: int = 0
    failed_seconds: float = 0.0
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0
    rows: int = 0
    runs: int = 0
    last_unix_seconds: float = 0.0


@dataclass(slots=True)
class Usage:
    """What one request cost: for its log line and its `Server-Timing` header."""

    rows: int = 0
    tokens: int = 0
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The likeliest label, its probability, whether the text was cut to the model's window, all probabilities."""

    label: str
    score: float
    truncated: bool
    probabilities: Array


class Predictor:
    """Created before the model is there; `serve` or `use` gives it one. `stage` says what it is at until then."""

    def __init__(self, metrics: m.Metrics) -> None:
        self._stage = "verifying"
        # Told to end: not ready any more, and later refusing new work as well.
        self.leaving = False
        self.draining = False
        self.model: Model | None = None
        self._batcher: Batching | None = None
        self._metrics = metrics
        self._lag = EventLoopLag()
        self.statistics = Statistics()
        self.limits: Limits | None = None

    @property
    def stage(self) -> str:
        """`verifying`, `loading`, `warming`, `ready` or `draining`, which nothing leads out of."""
        return "draining" if self.leaving else self._stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self._stage = stage

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    def serve(self, model: Model, limits: Limits) -> Batcher | None:
        """Starts the runners and answers from now on, unless leaving. Call on the event loop."""
        if self.leaving:
            return None
        batcher = Batcher(model.run, limits, model.tokens_per_second, self._observe)
        batcher.start()
        manifest = model.artifact.manifest
        info = (manifest.name, manifest.version, model.artifact.digest, model.session.provider, manifest.precision)
        self._metrics.info.labels(*info).set(1)
        self._metrics.runners.set(limits.runners)
        self._metrics.watch_queue(lambda: batcher.waiting().rows)
        for stage, seconds in model.stage_seconds.items():
            self._metrics.load.labels(stage).set(seconds)
        self._metrics.ready.set(1)
        self.use(model, limits, batcher)
        self.stage = "ready"
        return batcher

    def use(self, model: Model, limits: Limits, batcher: Batching) -> None:
        """Answers through `batcher` from when `stage` is "ready"."""
        self.model, self._batcher, self.limits = model, batcher, limits
        self._lag.start(asyncio.get_running_loop())

    def leave(self) -> None:
        """Not ready from now on, but whoever comes all the same is answered."""
        self.leaving = True
        self._metrics.ready.set(0)

    def drain(self) -> None:
        """Refuses new work from now on; accepted work goes on."""
        self.leave()
        self.draining = True

    def close(self) -> None:
        """Ends the runners; whatever still waits fails with Unavailable."""
        self.drain()
        self._lag.stop()
        if self._batcher is not None:
            self._batcher.close()

    def stuck(self) -> str | None:
        """Why no progress can be made, or None."""
        return self._batcher.stuck() if self._batcher is not None else None

    def require_ready(self) -> None:
        """Raises Unavailable with the stage unless ready, which is what probes ask."""
        if not self.ready:
            raise self._unavailable()

    def admit(self) -> None:
        """Raises Unavailable if a request that comes now would be refused whatever is in it: reading it is work. What
        was admitted is not asked again."""
        if self.draining or self._stage != "ready":
            raise self._unavailable()
        # It has waited for the event loop, too, before anybody saw it.
        self._serving().admit(late_seconds=self._lag.seconds)

    def _unavailable(self) -> Unavailable:
        reason = "draining" if self.leaving else "not_ready"
        return Unavailable(f"not ready: {self.stage}", reason, close=self.leaving)

    def loaded(self) -> Model:
        """The model. Raises Unavailable before the gate has passed it."""
        if self.model is None:
            raise Unavailable(f"not ready: {self.stage}", "not_ready")
        return self.model

    def named(self, name: str, version: str | None) -> Model:
        """The model, if it is called that. Raises NotFound otherwise, Unavailable before there is one."""
        model = self.loaded()
        manifest = model.artifact.manifest
        if name != manifest.name:
            raise NotFound(f"unknown model; this server has {manifest.name!r}")
        if version is not None and version != manifest.version:
            raise NotFound(f"unknown version; this server has {manifest.name!r} version {manifest.version!r}")
        return model

    def _serving(self) -> Batching:
        self.loaded()
        assert self._batcher is not None
        return self._batcher

    async def classify(self, texts: list[str], deadline: float, usage: Usage) -> list[Prediction]:
        """One prediction per text, in order. deadline: on the clock of `time.monotonic()`.

        Raises Invalid (422), TooManyRows, Unavailable, DeadlineExceeded, RunFailed; NotFound for a tensor model.
        """
        task = self.loaded().task
        if not isinstance(task, TextTask):
            raise NotFound("this model takes tensors: use /v2/models/{model}/infer")
        # Before the work of tokenising them.
        self._serving().admit(len(texts), deadline=deadline)
        if sum(map(len, texts)) > MAX_INLINE_CHARACTERS:
            units = await asyncio.to_thread(task.encode, texts)
        else:
            units = task.encode(texts)
        results = cast("list[Array]", await self._answer(units, deadline, usage))
        labels = task.labels
        predictions = []
        for unit, row in zip(units, results, strict=True):
            best = int(row.argmax())
            predictions.append(Prediction(labels[best], round(float(row[best]), 6), unit.truncated, row))
        return predictions

    async def infer(self, tensors: Tensors, deadline: float, usage: Usage) -> Tensors:
        """All outputs for one request's inputs [rows, ...]. Raises as `classify`."""
        task = cast("TensorTask", self.loaded().task)
        results = cast("list[Tensors]", await self._answer(task.encode(tensors), deadline, usage))
        return task.join(results)

    async def _answer(self, units: list[Encoded], deadline: float, usage: Usage) -> list[object]:
        usage.rows = sum(unit.rows for unit in units)
        usage.tokens = sum(unit.rows * unit.length for unit in units)
        pending = self._serving().submit(units, deadline)
        try:
            return await pending.future
        finally:
            usage.queue_seconds, usage.inference_seconds = pending.queue_seconds, pending.inference_seconds
            self._count(pending, usage)

    def _count(self, pending: PendingRequest, usage: Usage) -> None:
        statistics, seconds = self.statistics, time.monotonic() - pending.submitted
        statistics.last_unix_seconds = time.time()
        if not pending.finished:
            statistics.failed += 1
            statistics.failed_seconds += seconds
            return
        statistics.succeeded += 1
        statistics.succeeded_seconds += seconds
        statistics.queue_seconds += usage.queue_seconds
        statistics.inference_seconds += usage.inference_seconds
        statistics.rows += usage.rows

    def _observe(self, ran: FinishedRun) -> None:
        metrics = self._metrics
        self.statistics.runs += 1
        metrics.run.observe(ran.run_seconds)
        metrics.runner_busy.inc(ran.run_seconds)
        metrics.batch_rows.observe(ran.rows)
        metrics.tokens.labels("real").inc(ran.real_tokens)
        metrics.tokens.labels("padding").inc(ran.padded_tokens - ran.real_tokens)
        for wait in ran.wait_seconds:
            metrics.queue_wait.observe(wait)
