"""Who is refused at the door, and how late an event loop is: both on clocks that only move when a test moves them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from app.batching.admission import BEAT_SECONDS, LAG_WEIGHT, AdmissionPolicy, EventLoopLag, Limits, QueueState
from app.errors import TooManyRows, Unavailable

LIMITS = Limits(runners=1, batch_rows=4, batch_tokens=64, queue_rows=10, max_wait_seconds=5)
NOW = 1000.0


class Timer:
    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due, self.call, self.cancelled = due, call, False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Loop:
    """An event loop as far as timers go; its time passes by hand."""

    now: float = NOW
    timers: list[Timer] = field(default_factory=list)

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, callback: Callable[..., None], *args: Any) -> Timer:
        self.timers.append(Timer(due, lambda: callback(*args)))
        return self.timers[-1]

    def turn(self, late: float = 0.0) -> None:
        """Calls what is due next, that many seconds too late."""
        timer = self.timers.pop(0)
        self.now = timer.due + late
        if not timer.cancelled:
            timer.call()


@dataclass
class Door:
    """A policy, and the state and the lag that it is asked to judge. One token takes one second."""

    rows: int = 0
    tokens: int = 0
    late: float = 0.0
    run: float = 0.0
    limits: Limits = LIMITS

    def policy(self) -> AdmissionPolicy:
        lag = EventLoopLag()
        lag.seconds = self.late
        return AdmissionPolicy(self.limits, lambda: QueueState(self.rows, self.tokens, 1.0, self.run), lag)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are told by a clock that stands still."""
    monkeypatch.setattr(time, "monotonic", lambda: NOW)


def refusal(ask: Callable[[], None]) -> tuple[str | None, int | None]:
    with pytest.raises(Unavailable) as caught:
        ask()
    return caught.value.reason, caught.value.retry_after_seconds


# --- lag --------------------------------------------------------------------------------------------------------------


def test_a_loop_that_is_kept_busy_is_late_and_recovers() -> None:
    lag, loop = EventLoopLag(), Loop()
    lag.start(loop)  # type: ignore[arg-type]
    for _ in range(40):
        loop.turn(late=0.05)
    late = lag.seconds
    assert 0.02 < late <= 0.05
    for _ in range(20):
        loop.turn()
    assert lag.seconds < late / 2


def test_one_hiccup_is_not_overload() -> None:
    lag, loop = EventLoopLag(), Loop()
    lag.start(loop)  # type: ignore[arg-type]
    loop.turn(late=0.1)
    assert lag.seconds == pytest.approx(LAG_WEIGHT * 0.1)


def test_a_loop_in_time_has_no_lag_and_is_looked_at_again_a_beat_later() -> None:
    lag, loop = EventLoopLag(), Loop()
    lag.start(loop)  # type: ignore[arg-type]
    for beat in range(1, 5):
        assert [timer.due for timer in loop.timers] == [pytest.approx(NOW + beat * BEAT_SECONDS)]
        loop.turn()
        assert lag.seconds == 0


def test_a_timer_that_comes_early_is_not_late() -> None:
    lag, loop = EventLoopLag(), Loop()
    lag.start(loop)  # type: ignore[arg-type]
    loop.turn(late=-0.005)
    assert lag.seconds == 0


def test_stopped_it_measures_no_more() -> None:
    lag, loop = EventLoopLag(), Loop()
    lag.start(loop)  # type: ignore[arg-type]
    lag.stop()
    loop.turn(late=0.02)
    assert lag.seconds == 0
    assert not loop.timers


def test_one_that_never_started_may_be_stopped() -> None:
    EventLoopLag().stop()


# --- before the body is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0.0, 3600.0])
def test_with_nobody_waiting_it_is_always_worth_a_try(late: float) -> None:
    Door(rows=0, tokens=10**9, late=late).policy().admit()


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    Door(rows=9, tokens=3).policy().admit()
    assert refusal(Door(rows=10, tokens=3).policy().admit) == ("queue_full", 3)
    assert refusal(Door(rows=11, tokens=3).policy().admit) == ("queue_full", 3)


def test_an_estimated_wait_over_the_bound_refuses() -> None:
    Door(rows=1, tokens=5).policy().admit()
    assert refusal(Door(rows=1, tokens=6).policy().admit) == ("queue_full", 6)


def test_who_comes_back_too_early_needs_more_room() -> None:
    for tokens, refused in ((4, (False, False)), (5, (False, True)), (6, (True, True))):
        policy = Door(rows=1, tokens=tokens).policy()
        assert (policy.refusal() is not None, policy.refusal(early=True) is not None) == refused, tokens
    assert Door(tokens=10**9).policy().refusal(early=True) is None


def test_those_on_their_way_to_the_queue_count_as_if_they_were_in_it() -> None:
    # Two tokens each, five seconds at most, ten rows at most.
    for rows, coming, refused in ((2, 0, False), (1, 1, False), (1, 2, True), (0, 99, False)):
        policy = Door(rows=rows, tokens=2 * rows).policy()
        assert (policy.refusal(coming=coming) is not None) == refused, (rows, coming)
    empty = Door(rows=7, tokens=0).policy()
    assert (empty.refusal(coming=2) is None, empty.refusal(coming=3) is not None) == (True, True)


def test_the_loops_lag_counts_on_top_of_the_queues_wait_before_and_after_it() -> None:
    Door(rows=1, tokens=3, late=1.0).policy().admit()
    assert refusal(Door(rows=1, tokens=3, late=1.25).policy().admit) == ("queue_full", 6)


@pytest.mark.parametrize(
    ("run", "waits"),
    [(0.0, 5), (0.5, 5), (1.5, 4), (2.5, 3), (100.0, 2)],
    ids=["none", "a tenth of the wait", "1 s more", "2 s more", "never more than half of the wait"],
)
def test_what_a_run_takes_beyond_a_tenth_of_the_longest_wait_counts_as_waiting(run: float, waits: int) -> None:
    Door(rows=1, tokens=waits, run=run).policy().admit()
    assert refusal(Door(rows=1, tokens=waits + 1, run=run).policy().admit)[0] == "queue_full"


def test_without_a_bound_no_wait_is_too_long() -> None:
    limits = replace(LIMITS, max_wait_seconds=Limits(1, 4, 64, 10).max_wait_seconds)
    Door(rows=9, tokens=10**9, late=3600.0, limits=limits).policy().admit()


# --- once it is known what is in the request --------------------------------------------------------------------------


def test_more_rows_than_the_queue_can_ever_hold_are_refused_for_good() -> None:
    policy = Door().policy()
    policy.require_possible(10)
    with pytest.raises(TooManyRows, match="11 rows: the queue holds at most 10") as caught:
        policy.require_possible(11)
    assert caught.value.status == 429
    with pytest.raises(TooManyRows):
        policy.require_room(11, 0, NOW)


@pytest.mark.usefixtures("clock")
def test_all_rows_of_a_request_must_find_room() -> None:
    policy = Door(rows=7, tokens=4).policy()
    policy.require_room(3, 0, NOW + 60)
    assert refusal(lambda: policy.require_room(4, 0, NOW + 60)) == ("queue_full", 4)


@pytest.mark.usefixtures("clock")
def test_what_would_be_answered_after_its_deadline_is_refused_at_once() -> None:
    policy = Door(rows=1, tokens=50).policy()
    policy.require_room(1, 10, NOW + 60)
    assert refusal(lambda: policy.require_room(1, 11, NOW + 60)) == ("late", 61)


@pytest.mark.usefixtures("clock")
def test_with_nobody_waiting_a_deadline_is_always_worth_a_try() -> None:
    Door(rows=0, tokens=10**9).policy().require_room(10, 10**9, NOW - 1)


@pytest.mark.usefixtures("clock")
def test_who_was_admitted_is_not_asked_for_the_bound_on_waiting_again() -> None:
    Door(rows=1, tokens=10**6, late=3600.0).policy().require_room(1, 1, NOW + 10**7)
