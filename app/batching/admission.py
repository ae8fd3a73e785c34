"""What the batcher and its users hand each other: limits and admission, a request's ticket, the account of a run."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol

from app.batching.queue import QueueEntry, Unit
from app.errors import DeadlineExceeded, TooManyRows, Unavailable


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one batcher. Cost of a batch: rows x longest row, in tokens, and `overhead_tokens` for the run."""

    runners: int
    batch_rows: int
    batch_tokens: int
    queue_rows: int
    delay_seconds: float = 0.0
    runner_timeout_seconds: float = 30.0
    overhead_tokens: float = inf
    max_wait_seconds: float = inf


@dataclass(slots=True)
class QueueState:
    """What waits for a runner, and the runners' speed together."""

    rows: int
    tokens: int
    tokens_per_second: float

    def wait_seconds(self, cost: int = 0) -> float:
        """Estimated time until `cost` more tokens would be answered."""
        return (self.tokens + cost) / self.tokens_per_second

    def admit(self, limits: Limits, rows: int, tokens: int, deadline: float, late_seconds: float) -> None:
        """Raises TooManyRows if the queue could never hold that many rows, Unavailable if it cannot now or they would
        wait too long. late_seconds: what they have waited already."""
        if rows > limits.queue_rows:
            raise TooManyRows(f"{rows} rows: the queue holds at most {limits.queue_rows}; send fewer per request")
        # With nobody waiting it is always worth a try: only finished runs can correct a wrong estimate.
        if not self.rows:
            return
        wait = self.wait_seconds()
        if self.rows + rows > limits.queue_rows or wait > limits.max_wait_seconds:
            raise Unavailable("queue full", "queue_full", wait)
        if late_seconds + wait > limits.max_wait_seconds:
            raise Unavailable("too many requests at once", "queue_full", late_seconds + wait)
        wait = self.wait_seconds(tokens)
        if wait > deadline - time.monotonic():
            raise Unavailable("would not be answered before its deadline", "late", wait)


@dataclass(slots=True)
class FinishedRun:
    """One finished run, for metrics. Times in seconds; `error` is the exception's type name, never its message."""

    rows: int
    real_tokens: int
    padded_tokens: int
    run_seconds: float
    wait_seconds: list[float]
    error: str | None = None


class PendingRequest:
    """One submitted request: a future of its results, and how long they took."""

    __slots__ = ("dispatched", "finished", "future", "missing", "results", "slot", "submitted")

    def __init__(self, units: int, future: "asyncio.Future[list[object]]") -> None:
        self.future = future
        self.slot = 0
        self.missing = units
        self.results: list[object] = [None] * units
        self.submitted = time.monotonic()
        self.dispatched = 0.0
        self.finished = 0.0

    def expire(self) -> None:
        """The deadline has passed."""
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded("not answered before its deadline"))

    @property
    def queue_seconds(self) -> float:
        """From submission until its first row was taken."""
        return max(0.0, self.dispatched - self.submitted) if self.dispatched else 0.0

    @property
    def inference_seconds(self) -> float:
        """From the first row taken until the last result was there."""
        return max(0.0, self.finished - self.dispatched) if self.finished else 0.0


def describe(batch: list[QueueEntry], started: float, finished: float, error: str | None) -> FinishedRun:
    """The account of a run that began and ended at these moments."""
    rows = sum(row.unit.rows for row in batch)
    longest = max(row.unit.length for row in batch)
    real = sum(row.unit.rows * row.unit.length for row in batch)
    waits = [started - row.submitted for row in batch]
    return FinishedRun(rows, real, rows * longest, finished - started, waits, error)


class Batching(Protocol):
    """A batcher as its user sees it, in this process or in another; see `app.batching.batcher.Batcher`."""

    def submit(self, units: Sequence[Unit], deadline: float) -> PendingRequest:
        """Queues one request's units."""

    def admit(self, rows: int = 1, tokens: int = 0, deadline: float = inf, late_seconds: float = 0.0) -> None:
        """Raises what `submit` would."""

    def stuck(self) -> str | None:
        """Why no progress can be made, or None."""

    def close(self) -> None:
        """Fails what still waits."""
