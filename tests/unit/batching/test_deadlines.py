"""Deadlines on shared timers: none early, none lost, none late, none after its wait has ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.batching.deadlines import SLOT_SECONDS, Deadlines

START = 1000.0


class Loop:
    """An event loop as far as timers go, and the clock they go by, which stands still in between."""

    def __init__(self) -> None:
        self.now = START
        self.timers: list[Timer] = []

    def call_later(self, delay: float, callback: Callable[..., None], *args: Any) -> "Timer":
        timer = Timer(self, max(self.now, self.now + delay), lambda: callback(*args))
        self.timers.append(timer)
        return timer

    def run(self) -> None:
        """Lets time pass until no timer is left."""
        while self.timers:
            timer = min(self.timers, key=lambda timer: timer.due)
            self.timers.remove(timer)
            self.now = timer.due
            timer.call()


class Timer:
    def __init__(self, loop: Loop, due: float, call: Callable[[], None]) -> None:
        self.loop, self.due, self.call = loop, due, call

    def cancel(self) -> None:
        self.loop.timers.remove(self)


class Wait:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.slot = 0
        self.expired_at: list[float] = []

    def expire(self) -> None:
        self.expired_at.append(self.loop.now)


@contextmanager
def clock() -> Iterator[Any]:
    """A loop whose clock is everybody's."""
    loop = Loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: loop.now)
        yield loop


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.floats(-0.01, 0.05), st.booleans()), max_size=30))
def test_each_wait_expires_once_after_its_deadline_unless_it_has_ended(waits: list[tuple[float, bool]]) -> None:
    with clock() as loop:
        deadlines = Deadlines()
        made = [(Wait(loop), START + seconds, ends) for seconds, ends in waits]
        for wait, deadline, _ in made:
            deadlines.add(loop, wait, deadline)
        for wait, _, ends in made:
            if ends:
                deadlines.discard(wait)
                deadlines.discard(wait)
        loop.run()
        for wait, deadline, ends in made:
            assert len(wait.expired_at) == (0 if ends else 1)
            for moment in wait.expired_at:
                assert deadline <= moment <= max(START, deadline + 2 * SLOT_SECONDS)


def test_waits_that_end_together_share_a_timer() -> None:
    with clock() as loop:
        deadlines = Deadlines()
        deadline = (int(START / SLOT_SECONDS) + 1000.5) * SLOT_SECONDS
        waits = [Wait(loop) for _ in range(100)]
        for wait in waits:
            deadlines.add(loop, wait, deadline)
        assert len(loop.timers) == 1
        for wait in waits:
            deadlines.discard(wait)
        assert not deadlines._slots, "nothing is kept for waits that have ended"
        assert not deadlines._timers
        assert not loop.timers
