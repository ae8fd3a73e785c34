"""What a connection waits for, and for how long. Knows nothing of HTTP."""

import asyncio
import time
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl

from app.batching.deadlines import Deadlines

# After the first refusal, which whoever waits does not notice. Twice as long with each that follows.
FIRST_SECONDS = 0.05


class Wait:
    """A timer that runs or does not."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def begin(self, seconds: float, callback: Callable[[], object]) -> None:
        """Calls `callback` then, if it does not run already."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, callback)

    def end(self) -> None:
        """Calls nothing."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Backoff:
    """What a client pays that was told when to come back and does not wait: its connection is not read for a while,
    longer each time. That costs microseconds, where one more refusal costs what answers need. `slot` belongs to
    `Deadlines`."""

    slot = 0

    def __init__(self, flow: FlowControl, deadlines: Deadlines) -> None:
        self._flow = flow
        self._deadlines = deadlines
        self._times = 0
        self._come_back = 0.0
        self._seconds = 0.0

    def refused(self, retry_after_seconds: float) -> None:
        """The client is told to come back after so long."""
        now = time.monotonic()
        self._times = self._times + 1 if now < self._come_back else 0
        self._come_back = now + retry_after_seconds
        self._seconds = min(retry_after_seconds, FIRST_SECONDS * 2.0**self._times)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """The answer that says so is sent: reads nothing for a while."""
        if self._seconds:
            self._flow.pause_reading()
            self._deadlines.add(loop, self, time.monotonic() + self._seconds)
            self._seconds = 0.0

    def expire(self) -> None:
        """That while is over."""
        self._flow.resume_reading()

    def end(self) -> None:
        """The connection is gone."""
        self._deadlines.discard(self)
