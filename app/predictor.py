"""The one use case: inputs of a task in, its answer out, through the task and the batcher. Knows nothing of HTTP."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from app.artifact.datatypes import Tensors
from app.batching.batcher import Batcher
from app.batching.queue import PendingRequest
from app.errors import Invalid, NotFound
from app.runtime.session import Model
from app.runtime.tasks import Encoded, PredictTask
from app.runtime.tasks.answers import predicted
from app.telemetry.metrics import Metrics, PredictionCounter
from app.telemetry.tracing import Trace

# Joining results of that many bytes takes milliseconds.
QUICK_RESULT_BYTES = 1 << 20
P = ParamSpec("P")
T = TypeVar("T")


async def aside(slow: bool, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns; in a thread if it is slow, so that others are answered meanwhile."""
    return await asyncio.to_thread(work, *args, **kwargs) if slow else work(*args, **kwargs)


@dataclass(slots=True)
class Usage:
    """What one request cost: for its log line, its `Server-Timing` header and its trace. submitted: when it was queued,
    on the clock of `time.monotonic()`. client: who asked, where that is known."""

    trace: Trace | None = None
    client: str | None = None
    rows: int = 0
    tokens: int = 0
    submitted: float = 0.0
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0

    @property
    def trace_ids(self) -> dict[str, str]:
        """What its log lines say of its trace, if there is one."""
        return self.trace.ids if self.trace is not None else {}

    @property
    def parts(self) -> list[tuple[str, float, float]]:
        """Name, beginning and end of what became of it in the batcher."""
        if not self.inference_seconds:
            return []
        dispatched = self.submitted + self.queue_seconds
        return [("queue", self.submitted, dispatched), ("run", dispatched, dispatched + self.inference_seconds)]


class Predictor:
    """Of one model that passed the gate. deadline: on the clock of `time.monotonic()`, seconds."""

    def __init__(self, model: Model, batcher: Batcher, metrics: Metrics) -> None:
        self.model = model
        self.batcher = batcher
        self.prediction_counter = PredictionCounter(metrics, model.task.labels)
        self._statistics = metrics.statistics

    def named(self, name: str, version: str | None) -> Model:
        """The model, if it is called that. Raises NotFound otherwise."""
        manifest = self.model.artifact.manifest
        if name != manifest.name:
            raise NotFound(f"unknown model; this server has {manifest.name!r}")
        if version is not None and version != manifest.version:
            raise NotFound(f"unknown version; this server has {manifest.name!r} version {manifest.version!r}")
        return self.model

    async def infer(self, tensors: Tensors, deadline: float, usage: Usage) -> Tensors:
        """All outputs for one request's inputs, both as the task's `inputs` and `outputs` say. Raises as `run`."""
        task, started = self.model.task, time.monotonic()
        return await self.run(task.read(tensors), task.respond, deadline, usage, started=started)

    async def run(
        self,
        inputs: Any,
        answer: Callable[[Sequence[Encoded], Sequence[Any]], T],
        deadline: float,
        usage: Usage,
        *,
        truncate: bool = True,
        started: float | None = None,
    ) -> T:
        """What `answer` makes of one request's units of work and their results, both in order.

        inputs: as the task's `encode` takes them. truncate: whether what is longer than the model's window is cut.
        started: when the work on the request began, if that is not now. Raises Invalid (422), also for what may not be
        cut, TooManyRows, Unavailable, DeadlineExceeded, RunFailed.
        """
        task, started = self.model.task, started or time.monotonic()
        # Before the work of encoding them.
        self.batcher.admission.require_possible(task.rows(inputs))
        units = await aside(task.encodes_slowly(inputs), task.encode, inputs)
        if not truncate and any(unit.truncated for unit in units):
            raise Invalid("an input is longer than the model's window; shorten it, or send `truncate` true")
        usage.rows = sum(unit.rows for unit in units)
        usage.tokens = sum(unit.rows * unit.length for unit in units)
        pending = self.batcher.submit(units, deadline, usage.trace)
        usage.submitted = pending.submitted
        delivered = 0.0
        try:
            results = await pending.future
            delivered = time.monotonic()
            found = await aside(_are_large(results), answer, units, results)
            if task.labels:
                predictions = cast(PredictTask, task).predictions
                # Mostly they are what was asked for, and need not be made twice.
                made: Any = found if answer == predictions else predictions(units, results)
                self.prediction_counter.count(predicted(made))
            return found
        finally:
            usage.queue_seconds, usage.inference_seconds = pending.queue_seconds, pending.inference_seconds
            self._count(pending, usage, started, delivered)

    def _count(self, pending: PendingRequest, usage: Usage, started: float, delivered: float) -> None:
        statistics, now = self._statistics, time.monotonic()
        seconds = now - started
        statistics.last_unix_seconds = time.time()
        if not delivered:
            statistics.failed += 1
            statistics.failed_seconds += seconds
            return
        statistics.succeeded += 1
        statistics.succeeded_seconds += seconds
        statistics.input_seconds += pending.submitted - started
        statistics.queue_seconds += usage.queue_seconds
        statistics.inference_seconds += usage.inference_seconds
        statistics.output_seconds += now - delivered
        statistics.rows += usage.rows


def _are_large(results: Sequence[Any]) -> bool:
    tensors = (array for result in results if isinstance(result, dict) for array in result.values())
    return len(results) > 1 and sum(array.nbytes for array in tensors) > QUICK_RESULT_BYTES
