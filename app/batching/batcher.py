"""Dynamic batching: rows wait in one queue, free runners take batches of similar length, futures get the results.

Knows neither ONNX Runtime nor the web: a model is a function from payloads to results. Submitting and delivering
happen on the event loop; taking and running happen in runner threads, so that a runner that finishes starts its next
batch without waiting for the loop.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf

from app.batching.admission import FinishedRun, Limits, PendingRequest, QueueState, describe
from app.batching.deadlines import Deadlines
from app.batching.queue import QueueEntry, RowQueue, Unit
from app.errors import RunFailed, Unavailable

Run = Callable[[Sequence[object]], Sequence[object]]
# Share of a new measurement in the running tokens-per-second estimate.
RATE_WEIGHT = 0.1
RUNNER_NICE = 5


class _Runner:
    """One thread's state. `since` is the start of the current run, 0 between runs; `free` when it last had nothing
    left to do but to take what waits."""

    def __init__(self) -> None:
        self.since = 0.0
        self.free = 0.0
        self.thread: threading.Thread | None = None


class Batcher:
    """Queue, runners and admission. Create, `start()` on the event loop, `submit()`, at the end `close()`."""

    def __init__(
        self,
        run: Run,
        limits: Limits,
        tokens_per_second: float,
        on_ran: Callable[[FinishedRun], None] = lambda ran: None,
    ) -> None:
        """tokens_per_second: one runner's first estimate, from warm-up; later runs refine it."""
        self._run = run
        self._limits = limits
        self._rate = tokens_per_second
        self._on_ran = on_ran
        self._queue = RowQueue(limits.batch_rows, limits.batch_tokens, limits.queue_rows, limits.overhead_tokens)
        self._wake = threading.Condition()
        self._runners = [_Runner() for _ in range(limits.runners)]
        self._deadlines = Deadlines()
        self._idle = 0
        self._closed = False

    def start(self) -> None:
        """Starts the runner threads; results are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        for index, runner in enumerate(self._runners):
            # Daemons: a run that never ends must not keep the process from ending.
            runner.thread = threading.Thread(target=self._turn, args=(runner,), name=f"runner-{index}", daemon=True)
            runner.thread.start()

    def submit(self, units: Sequence[Unit], deadline: float) -> PendingRequest:
        """Queues one request's units. Await `ticket.future` for their results in order; cancel it to give up.

        deadline: on the clock of `time.monotonic()`. The future ends in DeadlineExceeded when it passes, in RunFailed
        when the model fails on the units, in Unavailable when the batcher closes. Raises TooManyRows if the queue could
        never hold the units, Unavailable if it is full or they would wait beyond the deadline.
        """
        self.admit(sum(unit.rows for unit in units), sum(unit.rows * unit.length for unit in units), deadline)
        pending = PendingRequest(len(units), self._loop.create_future())
        rows = [
            QueueEntry(unit, pending.future, (pending, index), pending.submitted) for index, unit in enumerate(units)
        ]
        self._deadlines.add(self._loop, pending, deadline)

        def done(_: object) -> None:
            self._deadlines.discard(pending)
            # Not all results are there, so nobody waits for them any more.
            if pending.missing:
                with self._wake:
                    for row in rows:
                        self._queue.discard(row)

        pending.future.add_done_callback(done)
        with self._wake:
            for row in rows:
                self._queue.push(row)
            self._wake.notify(len(units))
        return pending

    def admit(self, rows: int = 1, tokens: int = 0, deadline: float = inf, late_seconds: float = 0.0) -> None:
        """Raises TooManyRows if the queue could never hold that many rows, Unavailable if it cannot now or they would
        wait too long. late_seconds: what they have waited already."""
        if self._closed:
            raise Unavailable("shutting down", "draining", close=True)
        self.waiting().admit(self._limits, rows, tokens, deadline, late_seconds)

    def waiting(self) -> QueueState:
        """What is in the queue, and the measured speed."""
        return QueueState(self._queue.rows, self._queue.tokens, self._rate * self._limits.runners)

    def stuck(self) -> str | None:
        """Why no progress can be made, or None: a runner died, or one has been in a run for too long."""
        for index, runner in enumerate(self._runners):
            if runner.thread is not None and not runner.thread.is_alive() and not self._closed:
                return f"runner {index} has ended"
            since = runner.since
            if since and time.monotonic() - since > self._limits.runner_timeout_seconds:
                return f"runner {index} has been in one run for over {self._limits.runner_timeout_seconds:g} s"
        return None

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Fails what still waits, lets running batches end for up to `timeout_seconds`, stops the threads."""
        with self._wake:
            self._closed = True
            left = self._queue.clear()
            self._wake.notify_all()
        for row in left:
            if not row.future.done():
                row.future.set_exception(Unavailable("shutting down", "draining", close=True))
        limit = time.monotonic() + timeout_seconds
        for runner in self._runners:
            if runner.thread is not None:
                runner.thread.join(max(0.0, limit - time.monotonic()))

    def _turn(self, runner: _Runner) -> None:
        """A runner's life: take, run, hand over, until closed."""
        # The event loop goes first: it must refuse and hand out what is done while every core computes.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), RUNNER_NICE)
        while (batch := self._take(runner)) is not None:
            started = runner.since = time.monotonic()
            for row in batch:
                pending = row.tag[0]
                pending.dispatched = pending.dispatched or started
            results, error = self._try(batch)
            finished = time.monotonic()
            runner.since = 0.0
            ran = describe(batch, started, finished, error)
            if error is None:
                # From when it could have started, not from when it did: getting there takes its time under load.
                measured = ran.padded_tokens / max(1e-6, finished - runner.free)
                self._rate += RATE_WEIGHT * (measured - self._rate)
            runner.free = finished
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch, results, ran, finished)
            except RuntimeError:
                return  # the loop has closed: nobody waits any more

    def _take(self, runner: _Runner) -> list[QueueEntry] | None:
        with self._wake:
            while not self._closed:
                if self._queue.rows:
                    delay = self._queue.fill_delay(self._limits.delay_seconds)
                    if delay > 0:
                        self._wake.wait(delay)
                        runner.free = time.monotonic()
                        continue
                    if batch := self._queue.take(self._idle):
                        return batch
                else:
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                    runner.free = time.monotonic()
            return None

    def _try(self, batch: list[QueueEntry]) -> tuple[list[object], str | None]:
        """Results in order, with RunFailed for rows the model fails on. A request whose rows fail takes no other
        request with it: when a shared run fails, each row runs once more by itself."""
        try:
            results = list(self._run([row.unit.payload for row in batch]))
            if len(results) != len(batch):
                raise ValueError("as many results as rows expected")
            return results, None
        # Whatever a model raises ends its rows, never the runner.
        except Exception as error:
            if len(batch) == 1:
                return [RunFailed("the model failed on this input")], type(error).__name__
            # Rows given up meanwhile get None, which nobody reads.
            alone = [None if row.future.done() else self._try([row])[0][0] for row in batch]
            return alone, type(error).__name__

    def _deliver(self, batch: list[QueueEntry], results: list[object], ran: FinishedRun, finished: float) -> None:
        """On the event loop: one call per batch, however many rows."""
        self._on_ran(ran)
        for row, result in zip(batch, results, strict=True):
            if row.future.done():
                continue
            pending, index = row.tag
            if isinstance(result, RunFailed):
                row.future.set_exception(result)
                continue
            pending.results[index] = result
            pending.missing -= 1
            if not pending.missing:
                pending.finished = finished
                row.future.set_result(pending.results)
