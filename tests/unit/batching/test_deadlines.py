"""Deadlines on shared timers: none early, none lost, none after its wait has ended."""

import asyncio
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from app.batching.deadlines import SLOT_SECONDS, Deadlines


class Wait:
    def __init__(self) -> None:
        self.slot = 0
        self.expired_at: list[float] = []

    def expire(self) -> None:
        self.expired_at.append(time.monotonic())


async def all_fired(deadlines: Deadlines) -> None:
    while deadlines._slots:
        await asyncio.sleep(SLOT_SECONDS)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-0.01, 0.05), st.booleans()), max_size=30))
def test_each_wait_expires_once_after_its_deadline_unless_it_has_ended(waits: list[tuple[float, bool]]) -> None:
    async def run() -> None:
        deadlines, loop, start = Deadlines(), asyncio.get_running_loop(), time.monotonic()
        made = [(Wait(), start + seconds, ends) for seconds, ends in waits]
        for wait, deadline, _ in made:
            deadlines.add(loop, wait, deadline)
        for wait, _, ends in made:
            if ends:
                deadlines.discard(wait)
                deadlines.discard(wait)
        await all_fired(deadlines)
        for wait, deadline, ends in made:
            assert len(wait.expired_at) == (0 if ends else 1)
            assert all(moment >= deadline for moment in wait.expired_at)

    asyncio.run(run())


async def test_waits_that_end_together_share_a_timer() -> None:
    deadlines, loop = Deadlines(), asyncio.get_running_loop()
    deadline = (int(time.monotonic() / SLOT_SECONDS) + 1000.5) * SLOT_SECONDS
    waits = [Wait() for _ in range(100)]
    for wait in waits:
        deadlines.add(loop, wait, deadline)
    assert len(deadlines._timers) == 1
    for wait in waits:
        deadlines.discard(wait)
    assert not deadlines._slots, "nothing is kept for waits that have ended"
    assert not deadlines._timers
