"""What a connection waits for, and for how long. Knows nothing of HTTP."""

import asyncio
import time
from collections.abc import Callable

from app.batching.deadlines import Deadlines

# Of the first refusal that waits; twice as long with each that follows, up to the second.
FIRST_SECONDS, MAX_SECONDS = 0.025, 0.25


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
    """What a client pays that was told when to come back, and comes back before that to be refused again: its next
    refusal is held back, longer each time. Of one connection; `slot` belongs to `Deadlines`."""

    slot = 0

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._times = 0
        self._come_back = 0.0
        self._then: Callable[[], object] | None = None

    @property
    def holding(self) -> bool:
        """Whether a refusal is held back."""
        return self._then is not None

    @property
    def early(self) -> bool:
        """Whether a request that comes now comes earlier than the client was told to."""
        return self._times > 0 and time.monotonic() < self._come_back

    def answered(self, retry_after_seconds: float | None) -> None:
        """The client got what it asked for (None), or is told to come back after so long."""
        now = time.monotonic()
        if retry_after_seconds is None:
            self._times = 0
        else:
            self._times = self._times + 1 if now < self._come_back else 1
            self._come_back = now + retry_after_seconds

    def hold(self, loop: asyncio.AbstractEventLoop, then: Callable[[], object]) -> bool:
        """Calls `then`, which refuses, after a while if the client has come back too early; False if it has not."""
        if not self.early:
            return False
        self._then = then
        self._deadlines.add(loop, self, time.monotonic() + min(MAX_SECONDS, FIRST_SECONDS * 2.0 ** (self._times - 1)))
        return True

    def expire(self) -> None:
        """That while is over."""
        then, self._then = self._then, None
        if then is not None:
            then()

    def end(self) -> None:
        """The connection is gone."""
        self._deadlines.discard(self)
        self._then = None
