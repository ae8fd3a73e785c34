"""Deadlines of many waits on few timers: waits that end within one slot share the timer of that slot.

A timer for each wait, set and cancelled, costs more than most requests' whole way through this service.
"""

import asyncio
import time
from typing import Protocol

SLOT_SECONDS = 0.004


class Expiring(Protocol):
    """What waits; `slot` belongs to `Deadlines`."""

    slot: int

    def expire(self) -> None:
        """The deadline has passed."""


class Deadlines:
    """Calls `expire` at a deadline, or up to two `SLOT_SECONDS` later; never before. For one event loop."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[Expiring, None]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def add(self, loop: asyncio.AbstractEventLoop, wait: Expiring, deadline: float) -> None:
        """deadline: on the clock of `time.monotonic()`, seconds."""
        wait.slot = slot = int(deadline / SLOT_SECONDS) + 1
        waits = self._slots.get(slot)
        if waits is None:
            waits = self._slots[slot] = {}
            self._timers[slot] = loop.call_later(slot * SLOT_SECONDS - time.monotonic(), self._fire, slot)
        waits[wait] = None

    def discard(self, wait: Expiring) -> None:
        """Forgets a wait that has ended, and its slot with the last of them: a deadline may be hours away."""
        waits = self._slots.get(wait.slot)
        if waits is not None:
            waits.pop(wait, None)
            if not waits:
                del self._slots[wait.slot]
                self._timers.pop(wait.slot).cancel()

    def _fire(self, slot: int) -> None:
        del self._timers[slot]
        for wait in self._slots.pop(slot):
            wait.expire()
