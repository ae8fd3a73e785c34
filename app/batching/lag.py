"""How late an event loop is: what is ready waits so long for its turn, requests too, before anybody sees them."""

import asyncio

BEAT_SECONDS = 0.01
# Share of a new measurement: one hiccup, even a long one, is not overload.
WEIGHT = 0.1


class EventLoopLag:
    """A mean of recent delays; `seconds` is 0 until started."""

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
        self.seconds += WEIGHT * (max(0.0, loop.time() - due) - self.seconds)
        self.start(loop)
