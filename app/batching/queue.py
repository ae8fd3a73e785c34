"""The queue behind the batcher: which waiting entries make the next batch. No threads, no clock but age.

A batch starts with the oldest live entry and grows by those closest to it in length: padding is what a batch costs on a
CPU. It grows only by the oldest that wait, the window: an entry of unusual length is passed over for as long as the
window takes to serve, not for as long as the queue does. Entries whose future is done are dead (answered, timed out,
abandoned): they are dropped when met.
"""

import asyncio
import time
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

from app.errors import DeadlineExceeded


class Unit(Protocol):
    """What the queue needs to know of a unit of work; `length` in tokens, `rows` along the first axis."""

    @property
    def payload(self) -> object: ...
    @property
    def length(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def key(self) -> Hashable: ...


@dataclass(slots=True, eq=False)
class PendingRequest:
    """One submitted request: its units, a future of their results, and how long they took. deadline: on the clock of
    `time.monotonic()`. trace: whatever its submitter wants to find again in a `Batch`."""

    units: Sequence[Unit]
    future: "asyncio.Future[list[object]]"
    deadline: float
    trace: Any = None
    entries: "list[QueueEntry]" = field(default_factory=list)
    results: list[object] = field(init=False)
    missing: int = field(init=False)
    slot: int = 0
    submitted: float = field(default_factory=time.monotonic)
    dispatched: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.missing = len(self.units)
        self.results = [None] * self.missing

    def expire(self) -> None:
        """The deadline has passed."""
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded("not answered before its deadline"))

    @property
    def queue_seconds(self) -> float:
        """From submission until its first unit was taken."""
        return max(0.0, self.dispatched - self.submitted) if self.dispatched else 0.0

    @property
    def inference_seconds(self) -> float:
        """From the first unit taken until the last result was there."""
        return max(0.0, self.finished - self.dispatched) if self.finished else 0.0


class QueueEntry:
    """A unit of work in the queue: the `index`th of its request. `order` is the queue's."""

    __slots__ = ("future", "index", "order", "request", "submitted", "unit")

    def __init__(self, unit: Unit, request: PendingRequest, index: int) -> None:
        self.unit = unit
        self.request = request
        self.index = index
        self.future = request.future
        self.submitted = request.submitted
        self.order = 0


class RowQueue:
    """Bounded by its user (see `rows`). Not safe for threads by itself.

    overhead_tokens: what a run costs beside its tokens, in tokens. A few on a CPU, where padding soon costs more than
    another run; thousands on a GPU, where it never does. So one policy makes small batches here and large ones there.
    """

    def __init__(self, batch_rows: int, batch_tokens: int, overhead_tokens: float = inf) -> None:
        self.batch_rows = batch_rows
        self.batch_tokens = batch_tokens
        self.overhead_tokens = overhead_tokens
        self._share: float = batch_tokens
        self.rows = 0
        self.tokens = 0
        # By `order`, so oldest first: the window, and those beyond it. Unlike a plain dict it finds its first entry at
        # once after any removals.
        self._window: OrderedDict[int, QueueEntry] = OrderedDict()
        self._beyond: OrderedDict[int, QueueEntry] = OrderedDict()
        self._window_tokens = 0
        # Of the window, for each key, (length, order, row) sorted: `order` is unique, so rows are never compared.
        self._lengths: dict[Hashable, list[tuple[int, int, QueueEntry]]] = {}
        self._pushed = 0

    def push(self, row: QueueEntry) -> None:
        """Adds a row as the youngest."""
        self._pushed += 1
        row.order = self._pushed
        self._beyond[row.order] = row
        self.rows += row.unit.rows
        self.tokens += row.unit.rows * row.unit.length

    def fill_delay(self, delay_seconds: float) -> float:
        """Seconds that a batch may still wait for more rows; 0 when the oldest has waited enough or one is full."""
        head = self._head()
        full = self.rows >= self.batch_rows or self.tokens >= self.batch_tokens
        if head is None or delay_seconds <= 0 or full:
            return 0.0
        return max(0.0, head.submitted + delay_seconds - time.monotonic())

    def take(self, idle: int = 0, window_tokens: float = inf) -> list[QueueEntry]:
        """Removes and returns the next batch; empty when no live row waits. idle: other runners that wait for work.
        window_tokens: of the oldest rows that a batch is chosen from; never fewer rows than a batch has.

        At least one row, however large; beyond that at most `batch_rows` rows and `batch_tokens` padded tokens, and
        no more than an equal share of what waits when that is worth a run of its own.
        """
        head = self._head()
        if head is None:
            return []
        self._share = self.batch_tokens
        if idle:
            self._share = min(self.batch_tokens, max(self.overhead_tokens, self.tokens / (idle + 1)))
        while self._beyond and (self._window_tokens < window_tokens or len(self._window) < self.batch_rows):
            self._admit(self._beyond.popitem(last=False)[1])
        batch = self._closest(head)
        for row in batch:
            self._forget(row)
        return [row for row in batch if not row.future.done()]

    def discard(self, row: QueueEntry) -> None:
        """Removes a row that nobody waits for any more, if it is still there: its place is free at once."""
        if row.order in self._window or row.order in self._beyond:
            self._forget(row)

    def clear(self) -> list[QueueEntry]:
        """Removes and returns all rows, oldest first."""
        left = [*self._window.values(), *self._beyond.values()]
        self._window.clear()
        self._beyond.clear()
        self._lengths.clear()
        self.rows = self.tokens = self._window_tokens = 0
        return left

    def _head(self) -> QueueEntry | None:
        while self._window or self._beyond:
            row = next(iter((self._window or self._beyond).values()))
            if not row.future.done():
                return row
            self._forget(row)
        return None

    def _admit(self, row: QueueEntry) -> None:
        """Into the window."""
        unit = row.unit
        self._window[row.order] = row
        self._window_tokens += unit.rows * unit.length
        insort(self._lengths.setdefault(unit.key, []), (unit.length, row.order, row))

    def _forget(self, row: QueueEntry) -> None:
        unit = row.unit
        self.rows -= unit.rows
        self.tokens -= unit.rows * unit.length
        if self._beyond.pop(row.order, None) is not None:
            return
        del self._window[row.order]
        self._window_tokens -= unit.rows * unit.length
        line = self._lengths[unit.key]
        del line[bisect_left(line, (unit.length, row.order))]
        if not line:
            del self._lengths[unit.key]

    def _fits(self, rows: int, longest: int) -> bool:
        return rows <= self.batch_rows and rows * longest <= self._share

    def _closest(self, head: QueueEntry) -> list[QueueEntry]:
        """The head and its neighbours by length, each the one that adds least padding, while that costs less than a
        run of its own would."""
        line = self._lengths[head.unit.key]
        low = bisect_left(line, (head.unit.length, head.order))
        high = low + 1
        rows, longest = head.unit.rows, head.unit.length
        while True:
            shorter = line[low - 1][2] if low > 0 else None
            longer = line[high][2] if high < len(line) else None
            below = shorter.unit.rows * (longest - shorter.unit.length) if shorter is not None else inf
            above = rows * (longer.unit.length - longest) if longer is not None else inf
            row = shorter if below <= above else longer
            if row is None:
                break
            if not row.future.done():
                more, length = rows + row.unit.rows, max(longest, row.unit.length)
                if min(below, above) > self.overhead_tokens or not self._fits(more, length):
                    break
                rows, longest = more, length
            low, high = (low - 1, high) if row is shorter else (low, high + 1)
        return [row for _, _, row in line[low:high]]
