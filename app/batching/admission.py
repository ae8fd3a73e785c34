"""What decides that a request is refused: the queue's bounds, and an estimate of how long it would wait there.

Asked once for each request, before its body is read; the rows that the body turns out to hold must then fit.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from app.errors import TooManyRows, Unavailable

BEAT_SECONDS = 0.01
# Share of a new measurement: one hiccup, even a long one, is not overload.
LAG_WEIGHT = 0.1
# Of the longest wait, for who comes back too early.
EARLY_RATIO = 0.9
# Of the longest wait: what a run may take besides. What it takes beyond counts as waiting, so that slow machines keep
# the time to an answer too; up to half of the longest wait, so that a batch of long runs can still come together.
RUN_RATIO, RUN_MOST_RATIO = 0.1, 0.5


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
    """What waits for a runner, the runners' speed together, and the mean time of a run."""

    rows: int
    tokens: int
    tokens_per_second: float
    run_seconds: float = 0.0

    def wait_seconds(self, cost: int = 0) -> float:
        """Estimated time until `cost` more tokens would be answered."""
        return (self.tokens + cost) / self.tokens_per_second


class EventLoopLag:
    """How late an event loop is, as a mean of recent delays in seconds: what is ready waits so long for its turn, and
    requests do before anybody has seen them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measures from now on, with a timer that comes later the more there is to do."""
        due = loop.time() + BEAT_SECONDS
        self._timer = loop.call_at(due, self._beat, loop, due)

    def stop(self) -> None:
        """Measures no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.seconds += LAG_WEIGHT * (max(0.0, loop.time() - due) - self.seconds)
        self.start(loop)


class AdmissionPolicy:
    """state: what waits now. lag: how long requests have waited before they came this far."""

    def __init__(self, limits: Limits, state: Callable[[], QueueState], lag: EventLoopLag) -> None:
        self._limits = limits
        self._state = state
        self._lag = lag

    def refusal(self, *, early: bool = False, coming: int = 0) -> Unavailable | None:
        """Why a request that comes now would have to wait too long, whatever is in it; or None. early: whether its
        client was told to come back later, and takes no room that others are on their way to. coming: requests that
        were let in and have not reached the queue yet; each is taken for a row of mean length."""
        state = self._state()
        # With nobody waiting it is always worth a try: only finished runs can correct a wrong estimate.
        if not state.rows:
            return None
        limits, wait = self._limits, state.wait_seconds(coming * state.tokens // state.rows)
        longest = limits.max_wait_seconds
        if state.rows + coming >= limits.queue_rows or wait > longest * (EARLY_RATIO if early else 1.0):
            return Unavailable("queue full", "queue_full", wait)
        # An event loop that is late is late twice: to see the request, and to hand out its answer.
        wait += 2 * self._lag.seconds
        wait += max(0.0, min(state.run_seconds - RUN_RATIO * longest, RUN_MOST_RATIO * longest))
        if wait > longest:
            return Unavailable("too many requests at once", "queue_full", wait)
        return None

    def admit(self) -> None:
        """Raises Unavailable if there is a refusal."""
        if (refusal := self.refusal()) is not None:
            raise refusal

    def require_possible(self, rows: int) -> None:
        """Raises TooManyRows if the queue could never hold that many rows."""
        if rows > self._limits.queue_rows:
            most = self._limits.queue_rows
            raise TooManyRows(f"{rows} rows: the queue holds at most {most}; send fewer per request")

    def require_room(self, rows: int, tokens: int, deadline: float) -> None:
        """Raises as `require_possible`, and Unavailable if the queue cannot take the rows now or they would be late.

        deadline: on the clock of `time.monotonic()`.
        """
        self.require_possible(rows)
        state = self._state()
        if not state.rows:
            return
        if state.rows + rows > self._limits.queue_rows:
            raise Unavailable("queue full", "queue_full", state.wait_seconds())
        wait = state.wait_seconds(tokens)
        if wait > deadline - time.monotonic():
            raise Unavailable("would not be answered before its deadline", "late", wait)
