"""How long a refusal is held back, by a clock that the test sets."""

from collections.abc import Iterator

import pytest

from app.http.connection import timers
from app.http.connection.timers import FIRST_SECONDS, MAX_SECONDS, Backoff


class Clock:
    """The time, and the deadlines of what waits for it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def add(self, loop: object, wait: Backoff, deadline: float) -> None:
        self.waits.append(round(deadline - self.now, 6))

    def discard(self, wait: Backoff) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(timers, "time", clock)
    return clock


def asks(backoff: Backoff) -> bool:
    """Whether its refusal is held back."""
    return backoff.hold(None, lambda: None)  # type: ignore[arg-type]


def test_who_comes_back_too_early_waits_twice_as_long_each_time_up_to_a_bound(clock: Clock) -> None:
    backoff = Backoff(clock)  # type: ignore[arg-type]
    assert not asks(backoff), "it was never refused"
    for _ in range(7):
        backoff.answered(1)
        assert asks(backoff)
    assert clock.waits == [*(FIRST_SECONDS * factor for factor in (1, 2, 4, 8)), *[MAX_SECONDS] * 3]


def test_who_waits_as_it_was_told_is_not_held(clock: Clock) -> None:
    backoff = Backoff(clock)  # type: ignore[arg-type]
    for _ in range(5):
        backoff.answered(1)
        clock.now += 1
        assert not asks(backoff)


def test_who_gets_an_answer_begins_anew(clock: Clock) -> None:
    backoff = Backoff(clock)  # type: ignore[arg-type]
    for _ in range(5):
        backoff.answered(1)
    backoff.answered(None)
    assert not asks(backoff)
    backoff.answered(1)
    assert asks(backoff)
    assert clock.waits == [FIRST_SECONDS]


def test_what_was_held_goes_on_once(clock: Clock) -> None:
    gone_on: list[int] = []
    backoff = Backoff(clock)  # type: ignore[arg-type]
    backoff.answered(1)
    backoff.hold(None, lambda: gone_on.append(1))  # type: ignore[arg-type]
    assert backoff.holding
    backoff.expire()
    backoff.expire()
    assert gone_on == [1]
    assert not backoff.holding


def test_what_was_held_of_a_connection_that_is_gone_does_not_go_on(clock: Clock) -> None:
    gone_on: list[int] = []
    backoff = Backoff(clock)  # type: ignore[arg-type]
    backoff.answered(1)
    backoff.hold(None, lambda: gone_on.append(1))  # type: ignore[arg-type]
    backoff.end()
    backoff.expire()
    assert gone_on == []
