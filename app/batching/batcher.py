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
from dataclasses import dataclass
from functools import partial

from app.batching.admission import AdmissionPolicy, EventLoopLag, Limits, QueueState
from app.batching.deadlines import Deadlines
from app.batching.queue import PendingRequest, QueueEntry, RowQueue, Unit
from app.errors import RunFailed, Unavailable

Run = Callable[[Sequence[object]], Sequence[object]]
# Share of a new measurement in the running estimates of tokens per second and of a run's time.
RATE_WEIGHT = 0.1
RUNNER_NICE = 5
# Of the longest wait: how long a row may be passed over by younger ones that pad a batch less. A smaller one costs
# throughput, a larger one makes the slowest answers slower (tests/tools/policies.py compares).
WINDOW_RATIO = 1 / 4


@dataclass(slots=True)
class Batch:
    """The entries of one run and, for metrics, when it began and ended. `error`: an exception's type name."""

    entries: list[QueueEntry]
    started: float
    finished: float
    error: str | None

    @property
    def rows(self) -> int:
        return sum(entry.unit.rows for entry in self.entries)

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(entry.unit.rows * entry.unit.length for entry in self.entries)

    @property
    def padded_tokens(self) -> int:
        return self.rows * max(entry.unit.length for entry in self.entries)


class _Runner:
    """One thread's state. `since` is the start of the current run, 0 between runs; `free` when it last had nothing
    left to do but to take what waits."""

    def __init__(self) -> None:
        self.since = 0.0
        self.free = 0.0
        self.thread: threading.Thread | None = None


class Batcher:
    """Queue, runners and `admission`. Create, `start()` on the event loop, `submit()`, at the end `close()`."""

    def __init__(
        self,
        run: Run,
        limits: Limits,
        tokens_per_second: float,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        """tokens_per_second: one runner's first estimate, from warm-up; later runs refine it."""
        self.limits = limits
        self._lag = EventLoopLag()
        self.admission = AdmissionPolicy(limits, self.state, self._lag)
        self._run = run
        self._rate = tokens_per_second
        self._run_seconds = 0.0
        self._on_batch = on_batch
        self._queue = RowQueue(limits.batch_rows, limits.batch_tokens, limits.overhead_tokens)
        self._wake = threading.Condition()
        self._runners = [_Runner() for _ in range(limits.runners)]
        self._deadlines = Deadlines()
        self._idle = 0
        self._closed = False

    def start(self) -> None:
        """Starts the runner threads; results are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._lag.start(self._loop)
        for index, runner in enumerate(self._runners):
            # Daemons: a run that never ends must not keep the process from ending.
            runner.thread = threading.Thread(target=self._work, args=(runner,), name=f"runner-{index}", daemon=True)
            runner.thread.start()

    def submit(self, units: Sequence[Unit], deadline: float, trace: object = None) -> PendingRequest:
        """Queues one request's units. Await its `future` for their results in order; cancel it to give up.

        deadline: on the clock of `time.monotonic()`. trace: kept for `on_batch`. The future ends in DeadlineExceeded
        when that passes, in RunFailed when the model fails on the units, in Unavailable when the batcher closes.
        Raises TooManyRows if the queue could never hold the units, Unavailable if it cannot now or they would wait
        beyond the deadline.
        """
        if self._closed:
            raise Unavailable("shutting down", "draining", close=True)
        tokens = sum(unit.rows * unit.length for unit in units)
        self.admission.require_room(sum(unit.rows for unit in units), tokens, deadline)
        pending = PendingRequest(units, self._loop.create_future(), deadline, trace)
        self._deadlines.add(self._loop, pending, deadline)
        pending.future.add_done_callback(partial(self._ended, pending))
        self._enqueue(pending)
        return pending

    def state(self) -> QueueState:
        """What is in the queue, and the measured speed."""
        rate = self._rate * self.limits.runners
        return QueueState(self._queue.rows, self._queue.tokens, rate, self._run_seconds)

    def stuck(self) -> str | None:
        """Why no progress can be made, or None: a runner died, or one has been in a run for too long."""
        for index, runner in enumerate(self._runners):
            if runner.thread is not None and not runner.thread.is_alive() and not self._closed:
                return f"runner {index} has ended"
            since = runner.since
            if since and time.monotonic() - since > self.limits.runner_timeout_seconds:
                return f"runner {index} has been in one run for over {self.limits.runner_timeout_seconds:g} s"
        return None

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Fails what still waits, lets running batches end for up to `timeout_seconds`, stops the threads."""
        with self._wake:
            self._closed = True
            left = self._queue.clear()
            self._wake.notify_all()
        self._lag.stop()
        for entry in left:
            if not entry.future.done():
                entry.future.set_exception(Unavailable("shutting down", "draining", close=True))
        limit = time.monotonic() + timeout_seconds
        for runner in self._runners:
            if runner.thread is not None:
                runner.thread.join(max(0.0, limit - time.monotonic()))

    def _enqueue(self, pending: PendingRequest) -> None:
        pending.entries = [QueueEntry(unit, pending, index) for index, unit in enumerate(pending.units)]
        with self._wake:
            for entry in pending.entries:
                self._queue.push(entry)
            self._wake.notify(len(pending.entries))

    def _ended(self, pending: PendingRequest, _: object) -> None:
        self._deadlines.discard(pending)
        if pending.missing:  # some results will never be waited for
            self._withdraw(pending)
        # They know their request, and that would be left for the garbage collector.
        pending.entries.clear()

    def _withdraw(self, pending: PendingRequest) -> None:
        with self._wake:
            for entry in pending.entries:
                self._queue.discard(entry)

    def _work(self, runner: _Runner) -> None:
        """A runner's life: take, run, hand over, until closed."""
        # The event loop goes first: it must refuse and hand out what is done while every core computes.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), RUNNER_NICE)
        runner.free = time.monotonic()
        while entries := self._take(runner):
            started = runner.since = time.monotonic()
            for entry in entries:
                entry.request.dispatched = entry.request.dispatched or started
            results, error = self._try(entries)
            finished = time.monotonic()
            runner.since = 0.0
            self._run_seconds += RATE_WEIGHT * (finished - started - self._run_seconds)
            batch = Batch(entries, started, finished, error)
            if error is None:
                # From when it could have started, not from when it did: getting there takes its time under load.
                # Without padding, as what waits is counted: that a queue will be padded is part of its speed.
                measured = batch.tokens / max(1e-6, finished - runner.free)
                self._rate += RATE_WEIGHT * (measured - self._rate)
            runner.free = finished
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch, results)
            except RuntimeError:
                return  # the loop has closed: nobody waits any more

    def _take(self, runner: _Runner) -> list[QueueEntry]:
        """The next batch's entries; none when closed."""
        with self._wake:
            while not self._closed:
                if self._queue.rows:
                    delay = self._queue.fill_delay(self.limits.delay_seconds)
                    if delay > 0:
                        self._wake.wait(delay)
                        runner.free = time.monotonic()
                        continue
                    if entries := self._queue.take(self._idle, self._window_tokens()):
                        return entries
                else:
                    self._idle += 1
                    self._wake.wait()
                    self._idle -= 1
                    runner.free = time.monotonic()
            return []

    def _window_tokens(self) -> float:
        """What is served within the window's share of the longest wait."""
        limits = self.limits
        return limits.max_wait_seconds * WINDOW_RATIO * self._rate * limits.runners

    def _try(self, entries: list[QueueEntry]) -> tuple[list[object], str | None]:
        """Results in order, with RunFailed for rows the model fails on. A request whose rows fail takes no other
        request with it: when a shared run fails, each row runs once more by itself."""
        try:
            results = list(self._run([entry.unit.payload for entry in entries]))
            if len(results) != len(entries):
                raise ValueError("as many results as rows expected")
            return results, None
        # Whatever a model raises ends its rows, never the runner.
        except Exception as error:
            if len(entries) == 1:
                return [RunFailed("the model failed on this input")], type(error).__name__
            # Rows given up meanwhile get None, which nobody reads.
            alone = [None if entry.future.done() else self._try([entry])[0][0] for entry in entries]
            return alone, type(error).__name__

    def _deliver(self, batch: Batch, results: list[object]) -> None:
        """On the event loop: one call per batch, however many rows."""
        for entry, result in zip(batch.entries, results, strict=True):
            if entry.future.done():
                continue
            if isinstance(result, RunFailed):
                entry.future.set_exception(result)
                continue
            pending = entry.request
            pending.results[entry.index] = result
            pending.missing -= 1
            if not pending.missing:
                pending.finished = batch.finished
                entry.future.set_result(pending.results)
        self._on_batch(batch)
