"""Takes jobs from the queue and answers them, those of several jobs in one batch. Knows neither Redis nor HTTP."""

import asyncio
import time
from typing import NamedTuple, cast

import msgspec

from app.errors import Invalid, RequestError, StartupError
from app.jobs.leases import BLOCK_SECONDS, Job, Leases
from app.jobs.queue import end
from app.lifecycle import Lifecycle, exit_process
from app.predictor import Predictor, Usage
from app.runtime.tasks import PredictTask
from app.settings import Settings
from app.telemetry.logging import logger, stack_of
from app.telemetry.metrics import JobMetrics

# Rows to hold, as full batches for each runner: one that runs, one that waits.
BATCHES_HELD = 2
# Of a job in the batcher, which wants one. What ends a run that hangs is `/live`.
DEADLINE_SECONDS = 86400
# The reason of a dead letter whose workers have ended without a word.
WORKER_LOST = "WorkerLost"


class Outcome(NamedTuple):
    """content: predictions as JSON, or why it failed. error: the class of that. dead: whether it is a dead letter."""

    status: str
    content: bytes
    error: str | None = None
    dead: bool = False


class Worker:
    """A job in hand is a request in flight to `lifecycle`, so that a drain waits for it."""

    def __init__(self, settings: Settings, leases: Leases, lifecycle: Lifecycle, metrics: JobMetrics) -> None:
        self._renew_seconds = settings.job_lease_seconds / 3
        self._max_deliveries = settings.job_max_deliveries
        self._leases = leases
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._held: dict[str, asyncio.Task[None]] = {}
        self._rows = 0
        self._room = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, predictor: Predictor) -> None:
        """Takes jobs from now on; ready once the queue has answered."""
        self._lifecycle.enter("connecting")
        self._tasks = [asyncio.create_task(self._take(predictor)), asyncio.create_task(self._renew())]
        for task in self._tasks:
            task.add_done_callback(_end_with)

    async def close(self) -> None:
        """Gives back what is left. The service must be draining."""
        self._room.set()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=2 * BLOCK_SECONDS)
            await end([*self._tasks, *self._held.values()])
        await self._leases.leave()

    async def _take(self, predictor: Predictor) -> None:
        await self._leases.join()
        self._lifecycle.announce(predictor)
        limits = predictor.batcher.limits
        enough = BATCHES_HELD * limits.runners * limits.batch_rows
        rows_per_job = float(enough)
        while not self._lifecycle.draining:
            if self._rows >= enough:
                self._room.clear()
                await self._room.wait()
                continue
            jobs = await self._leases.take(max(1, int((enough - self._rows) / rows_per_job)))
            for job in jobs:
                if job.entry not in self._held:  # a lease that ended, and is this worker's again
                    self._hold(job, predictor)
            if jobs:
                rows_per_job = sum(max(1, len(job.texts)) for job in jobs) / len(jobs)

    def _hold(self, job: Job, predictor: Predictor) -> None:
        self._lifecycle.in_flight += 1
        self._rows += len(job.texts)
        if job.deliveries > 1:
            self._metrics.redeliveries.inc()
        self._held[job.entry] = asyncio.create_task(self._answer(job, predictor))

    async def _answer(self, job: Job, predictor: Predictor) -> None:
        started, status, error = time.monotonic(), "given up", None
        tracing = self._lifecycle.tracing
        trace = tracing.begin("job", job.trace, started, from_queue=True) if tracing is not None else None
        usage = Usage(trace)
        try:
            outcome = await self._outcome(job, predictor, usage)
            status, error = outcome.status, outcome.error
            # One that is tried again is let go: the next delivery is when its lease ends.
            if status != "tried":
                dead_letter = outcome.error if outcome.dead else None
                seconds = await self._leases.finish(job, status, outcome.content, dead_letter or "")
                status = status if seconds is not None else "lease lost"
                self._count(outcome, seconds)
        finally:
            del self._held[job.entry]
            self._rows -= len(job.texts)
            self._room.set()
            self._lifecycle.request_ended()
            logger().info(
                "job",
                id=job.id,
                status=status,
                error=error,
                duration_ms=round((time.monotonic() - started) * 1000, 3),
                deliveries=job.deliveries,
                rows=usage.rows,
                tokens=usage.tokens,
                queue_ms=round(usage.queue_seconds * 1000, 3),
                inference_ms=round(usage.inference_seconds * 1000, 3),
                **usage.trace_ids,
            )
            if trace is not None:
                attributes: dict[str, str | int] = {"job.id": job.id, "job.status": status, "rows": usage.rows}
                attributes |= {"job.deliveries": job.deliveries, "tokens": usage.tokens}
                trace.end(attributes, usage.parts, error)

    async def _outcome(self, job: Job, predictor: Predictor, usage: Usage) -> Outcome:
        if job.deliveries > self._max_deliveries:
            lost = f"{self._max_deliveries} workers were lost while they had it"
            return Outcome("failed", lost.encode(), WORKER_LOST, dead=True)
        try:
            if not job.texts:
                raise Invalid("texts: expected at least one")
            task = cast(PredictTask, predictor.model.task)
            deadline = time.monotonic() + DEADLINE_SECONDS
            predictions = await predictor.run(job.texts, task.predictions, deadline, usage)
            return Outcome("done", msgspec.json.encode(predictions))
        # A bug, too, ends one job, with its place in the log and nothing of its content.
        except Exception as error:
            name, known = type(error).__name__, isinstance(error, RequestError)
            if not known:
                logger().error("unhandled", job=job.id, error_type=name, stack=stack_of(error))
            content = str(error).encode() if known else b"internal error"
            # What is wrong with a request is wrong every time.
            if isinstance(error, RequestError) and error.status < 500:
                return Outcome("failed", content, name)
            last = job.deliveries >= self._max_deliveries
            return Outcome("failed" if last else "tried", content, name, dead=last)

    def _count(self, outcome: Outcome, seconds: float | None) -> None:
        if seconds is None:
            return
        self._metrics.finished[outcome.status].inc()
        self._metrics.duration.observe(seconds)
        if outcome.dead:
            self._metrics.dead_letters.inc()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._renew_seconds)
            if self._held:
                await self._leases.renew(list(self._held))


def _end_with(task: asyncio.Task[None]) -> None:
    """A worker that takes no more must not look as if it did."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger().error("unhandled", error_type=type(error).__name__, stack=stack_of(error))
        exit_process(StartupError(f"the worker failed: {type(error).__name__}"))
