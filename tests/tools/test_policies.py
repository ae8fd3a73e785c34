"""The queue's window, by simulation: what the server's choice must keep on machines of different speed."""

import pytest

from loadtest.texts import sentences
from tests.tools.policies import POLICIES, Outcome, lengths_of, simulate

WAIT_SECONDS, OBJECTIVE_MS = 0.16, 250


@pytest.fixture(scope="module")
def lengths() -> list[int]:
    return lengths_of(sentences(1000, seed=1))


def overloaded(policy: str, lengths: list[int], speed: float) -> tuple[Outcome, float]:
    """At twice the throughput of 64 connections, which is the second."""
    limits = {"speed": speed, "objective_ms": OBJECTIVE_MS, "seconds": 10.0}
    capacity = simulate(POLICIES["all that wait"], lengths, clients=64, wait_seconds=float("inf"), **limits).throughput
    found = simulate(POLICIES[policy], lengths, per_second=2 * capacity, wait_seconds=WAIT_SECONDS, **limits)
    return found, capacity


@pytest.mark.parametrize("speed", [9_000, 24_000])
def test_what_is_accepted_comes_in_time_on_slow_and_fast_machines(lengths: list[int], speed: float) -> None:
    found, capacity = overloaded("the server's", lengths, speed)
    assert found.p99 / found.p50 <= 1.4
    assert found.goodput / capacity >= 0.92


def test_neither_the_order_of_arrival_nor_the_whole_queue_does_as_well(lengths: list[int]) -> None:
    ours, _ = overloaded("the server's", lengths, 12_000)
    for other in ("first come, first served", "all that wait"):
        assert overloaded(other, lengths, 12_000)[0].goodput < 0.95 * ours.goodput
