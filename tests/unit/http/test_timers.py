"""How long a connection waits, by a clock that the test sets."""

from app.http.connection import timers
from app.http.connection.timers import FIRST_SECONDS, Backoff


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Recorded:
    """Flow and deadlines in one: what they were asked."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waits: list[float] = []
        self.paused = False

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def add(self, loop: object, wait: Backoff, deadline: float) -> None:
        self.waits.append(round(deadline - self.clock.now, 6))


def refuse(backoff: Backoff, flow: Recorded, *, retry_after_seconds: float, after: float = 0.0) -> None:
    """As the connection does; then the wait passes, and `after` seconds more."""
    backoff.refused(retry_after_seconds)
    backoff.begin(None)  # type: ignore[arg-type]
    assert flow.paused
    flow.clock.now += flow.waits[-1]
    backoff.expire()
    assert not flow.paused
    flow.clock.now += after


def test_who_comes_back_too_early_waits_twice_as_long_each_time_until_as_long_as_it_was_told(monkeypatch):
    monkeypatch.setattr(timers, "time", clock := Clock())
    flow = Recorded(clock)
    backoff = Backoff(flow, flow)  # type: ignore[arg-type]
    for _ in range(8):
        refuse(backoff, flow, retry_after_seconds=2)
    # And then it has waited.
    assert flow.waits == [*(FIRST_SECONDS * factor for factor in (1, 2, 4, 8, 16, 32)), 2, FIRST_SECONDS]


def test_who_waits_as_it_was_told_is_not_made_to_wait_longer(monkeypatch):
    monkeypatch.setattr(timers, "time", clock := Clock())
    flow = Recorded(clock)
    backoff = Backoff(flow, flow)  # type: ignore[arg-type]
    for _ in range(5):
        refuse(backoff, flow, retry_after_seconds=1, after=1)
    assert flow.waits == [FIRST_SECONDS] * 5


def test_an_answer_that_refuses_nothing_is_followed_by_no_wait(monkeypatch):
    monkeypatch.setattr(timers, "time", clock := Clock())
    flow = Recorded(clock)
    backoff = Backoff(flow, flow)  # type: ignore[arg-type]
    refuse(backoff, flow, retry_after_seconds=1)
    backoff.begin(None)  # type: ignore[arg-type]
    assert not flow.paused
    assert len(flow.waits) == 1
