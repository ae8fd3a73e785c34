"""The batcher with plain functions as its model. Runs are held and let go by the test, so nothing depends on timing."""

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.batching.admission import Limits
from app.batching.batcher import Batch, Batcher
from app.batching.queue import PendingRequest
from app.errors import DeadlineExceeded, RunFailed, TooManyRows, Unavailable

# Only ends a test that hangs; nothing is measured against it.
PATIENCE_SECONDS = 60
HOUR = 3600.0
names = itertools.count()


@dataclass(frozen=True)
class Unit:
    """A unit of work; the payload is the unit itself, so that runs show which units they were given."""

    length: int = 1
    rows: int = 1
    key: Hashable = None
    bad: bool = False
    name: int = field(default_factory=lambda: next(names))

    @property
    def payload(self) -> "Unit":
        return self


def answer(unit: Any) -> str:
    return f"answer {unit.name}"


def answers(units: Sequence[Unit]) -> list[str]:
    return [answer(unit) for unit in units]


class HeldModel:
    """A model whose runs wait for the test: each `let_go()` ends one. Fails on bad units, quoting them."""

    def __init__(self) -> None:
        self.runs: list[list[Unit]] = []
        self.entered = 0
        self.left = 0
        self._permits = threading.Semaphore(0)
        self._open = False

    def __call__(self, units: Sequence[Any]) -> list[object]:
        self.runs.append(list(units))
        self.entered += 1
        if not self._open:
            self._permits.acquire()
        self.left += 1
        if any(unit.bad for unit in units):
            raise ValueError(f"cannot digest {units}")
        return [answer(unit) for unit in units]

    @property
    def held(self) -> int:
        return self.entered - self.left

    def let_go(self) -> None:
        self._permits.release()

    def open(self) -> None:
        """Holds no run any more."""
        self._open = True
        self._permits.release(1000)

    def units(self) -> list[Unit]:
        return [unit for run in self.runs for unit in run]


def instant(units: Sequence[Any]) -> list[object]:
    if any(unit.bad for unit in units):
        raise ValueError(f"cannot digest {units}")
    return [answer(unit) for unit in units]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.0005)


@asynccontextmanager
async def running(
    model: Callable[[Sequence[Any]], Sequence[Any]],
    tokens_per_second: float = 1e12,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    **limits: Any,
) -> AsyncIterator[Batcher]:
    """A started batcher; at the end it is closed, and nothing may have gone wrong behind the scenes."""
    chosen = {"runners": 1, "batch_rows": 4, "batch_tokens": 1000, "queue_rows": 100} | limits
    mishaps: list[dict[str, Any]] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Tests may leave a request without asking how it ended.
        if "never retrieved" not in context["message"]:
            mishaps.append(context)

    asyncio.get_running_loop().set_exception_handler(note)
    batcher = Batcher(model, Limits(**chosen), tokens_per_second, on_batch)
    batcher.start()
    try:
        yield batcher
    finally:
        if isinstance(model, HeldModel):
            model.open()
        batcher.close(PATIENCE_SECONDS)
        # What the last runs handed over is still to be delivered.
        await asyncio.sleep(0)
    assert mishaps == []


def later(seconds: float = HOUR) -> float:
    return time.monotonic() + seconds


async def hold(batcher: Batcher, model: HeldModel, runners: int = 1) -> list[PendingRequest]:
    """Keeps every runner in a run, so that what is submitted next must wait."""
    pending = []
    for _ in range(runners):
        pending.append(batcher.submit([Unit(key="held")], later()))
        await until(lambda: model.held == len(pending))
    return pending


async def result(pending: PendingRequest) -> list[object]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await pending.future


# --- any interleaving -------------------------------------------------------------------------------------------------

units_of_one_request = st.lists(
    st.builds(
        Unit,
        length=st.integers(1, 12),
        rows=st.sampled_from([1, 1, 1, 2, 7]),
        key=st.sampled_from(["a", "a", "b"]),
        bad=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=6,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), units_of_one_request),
        st.tuples(st.just("submit"), units_of_one_request),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("expire"), st.integers(0, 20)),
        st.tuples(st.just("let go"), st.integers(1, 3)),
    ),
    max_size=25,
)


@dataclass
class Sent:
    """A request that was accepted, and what the test did to it."""

    units: list[Unit]
    pending: PendingRequest
    cancelled: bool = False
    expired: bool = False
    # Units that no run had when the request was given up while every runner was busy: none may have them later.
    not_to_run: set[int] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.pending.future.done()


class Interleaving:
    """Carries out steps and keeps the books."""

    def __init__(self, batcher: Batcher, model: HeldModel, limits: dict[str, Any]) -> None:
        self.batcher, self.model, self.limits = batcher, model, limits
        self.sent: list[Sent] = []

    async def settle(self) -> None:
        """Waits until no runner is about to take anything: all are in a run, or nothing alive is left to take."""

        def settled() -> bool:
            if self.model.held == self.limits["runners"]:
                return True
            seen = {unit.name for unit in self.model.units()}
            return all(request.done or seen.issuperset(unit.name for unit in request.units) for request in self.sent)

        await until(settled)

    def gave_up(self, request: Sent) -> None:
        if self.model.held == self.limits["runners"]:
            seen = {unit.name for unit in self.model.units()}
            request.not_to_run = {unit.name for unit in request.units} - seen

    def submit(self, units: list[Unit]) -> None:
        rows, limit = sum(unit.rows for unit in units), self.limits["queue_rows"]
        waiting = self.batcher.state().rows
        if waiting + rows > limit:
            with pytest.raises(TooManyRows if rows > limit else Unavailable):
                self.batcher.submit(units, later())
            assert self.batcher.state().rows == waiting
            return
        self.sent.append(Sent(units, self.batcher.submit(units, later())))

    def cancel(self, request: Sent) -> None:
        if request.pending.future.cancel():
            request.cancelled = True
            self.gave_up(request)

    def expire(self, request: Sent) -> None:
        """Its deadline passes now."""
        if not request.done:
            request.pending.expire()
            request.expired = True
            self.gave_up(request)

    async def let_go(self, runs: int) -> None:
        left = self.model.left + min(runs, self.model.held)
        for _ in range(left - self.model.left):
            self.model.let_go()
        await until(lambda: self.model.left >= left)

    async def carry_out(self, what: str, argument: Any) -> None:
        if what == "submit":
            self.submit(argument)
        elif what == "let go":
            await self.let_go(argument)
        elif self.sent:
            give_up = self.cancel if what == "cancel" else self.expire
            give_up(self.sent[argument % len(self.sent)])
        await self.settle()
        assert self.batcher.state().rows <= self.limits["queue_rows"]

    def check_outcomes(self, *, closed: bool) -> None:
        for request in self.sent:
            future, bad = request.pending.future, any(unit.bad for unit in request.units)
            assert future.done()
            if request.cancelled:
                assert future.cancelled()
                continue
            error = future.exception()
            if request.expired:
                assert isinstance(error, DeadlineExceeded)
            elif error is None:
                assert not bad
                assert future.result() == answers(request.units)
            else:
                assert {RunFailed: bad, Unavailable: closed}[type(error)], error

    def check_runs(self) -> None:
        well = Counter(unit.name for run in self.model.runs if not any(unit.bad for unit in run) for unit in run)
        assert all(count == 1 for count in well.values()), "a row was answered twice"
        for run in self.model.runs:
            rows = sum(unit.rows for unit in run)
            assert len({unit.key for unit in run}) == 1
            assert len(run) == 1 or rows <= self.limits["batch_rows"]
            assert len(run) == 1 or rows * max(unit.length for unit in run) <= self.limits["batch_tokens"]
        seen = {unit.name for unit in self.model.units()}
        for request in self.sent:
            assert not request.not_to_run & seen, "a row nobody waited for was run"
            if not request.cancelled and request.pending.future.exception() is None:
                assert all(well[unit.name] for unit in request.units)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps,
    st.fixed_dictionaries(
        {
            "runners": st.integers(1, 3),
            "batch_rows": st.integers(1, 4),
            "batch_tokens": st.integers(5, 40),
            "queue_rows": st.integers(3, 12),
            "delay_seconds": st.sampled_from([0.0, 0.0, 0.001]),
        }
    ),
    st.booleans(),
)
def test_every_request_ends_once_with_its_own_results_or_the_right_error_under_any_interleaving(
    steps: list[tuple[str, Any]], limits: dict[str, Any], close: bool
) -> None:
    async def scenario() -> None:
        model = HeldModel()
        async with running(model, **limits) as batcher:
            books = Interleaving(batcher, model, limits)
            for what, argument in steps:
                await books.carry_out(what, argument)
            if close:
                batcher.close(0)
            model.open()
            if books.sent:
                await asyncio.wait([request.pending.future for request in books.sent], timeout=PATIENCE_SECONDS)
            books.check_outcomes(closed=close)
            if not close:
                await until(lambda: batcher.state().rows == 0)
                assert batcher.stuck() is None
        books.check_runs()
        assert batcher.state().rows == 0

    asyncio.run(scenario())


async def test_a_crowd_of_requests_over_several_runners_loses_and_mixes_nothing() -> None:
    chance = random.Random(5)
    outcomes: Counter[str] = Counter()

    async def accepted(batcher: Batcher, units: list[Unit]) -> PendingRequest:
        while True:
            try:
                return batcher.submit(units, later())
            except Unavailable:
                await asyncio.sleep(0.0005)

    async def client(batcher: Batcher) -> None:
        for _ in range(40):
            await asyncio.sleep(0)
            units = [Unit(chance.randint(1, 50), bad=chance.random() < 0.02) for _ in range(chance.randint(1, 5))]
            pending = await accepted(batcher, units)
            if chance.random() < 0.2:
                if chance.random() < 0.5:
                    await asyncio.sleep(0)
                outcomes["cancelled"] += pending.future.cancel()
            try:
                assert await result(pending) == answers(units)
                assert not any(unit.bad for unit in units)
                outcomes["answered"] += 1
            except RunFailed:
                assert any(unit.bad for unit in units)
                outcomes["failed"] += 1
            except asyncio.CancelledError:
                assert pending.future.cancelled()

    async with running(instant, runners=4, batch_rows=8, queue_rows=64) as batcher:
        await asyncio.gather(*[client(batcher) for _ in range(30)])
        await until(lambda: batcher.state().rows == 0)
        assert batcher.stuck() is None
    assert min(outcomes["answered"], outcomes["failed"], outcomes["cancelled"]) > 0, outcomes


# --- results ----------------------------------------------------------------------------------------------------------


async def test_results_come_in_the_order_of_the_request_although_rows_run_in_another() -> None:
    model = HeldModel()
    async with running(model, batch_rows=2) as batcher:
        await hold(batcher, model)
        units = [Unit(length) for length in (90, 5, 88, 6, 40)]
        pending = batcher.submit(units, later())
        model.open()
        assert await result(pending) == answers(units)
    assert [sorted(unit.length for unit in run) for run in model.runs[1:]] == [[88, 90], [5, 6], [40]]


async def test_rows_of_several_requests_share_a_run() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        units = [Unit() for _ in range(3)]
        pending = [batcher.submit([unit], later()) for unit in units]
        model.open()
        assert [await result(pending) for pending in pending] == [[answer(unit)] for unit in units]
    assert model.runs[1:] == [units]


async def test_a_free_runner_takes_what_is_queued_at_once() -> None:
    model = HeldModel()
    async with running(model, runners=2) as batcher:
        pending = [batcher.submit([unit], later()) for unit in (Unit(key="a"), Unit(key="b"))]
        await until(lambda: model.held == 2)
        assert batcher.state().rows == 0
        model.open()
        await asyncio.gather(*map(result, pending))


async def test_one_request_of_rows_that_may_not_share_a_run_uses_every_runner() -> None:
    model = HeldModel()
    async with running(model, runners=3) as batcher:
        units = [Unit(key=key) for key in "abc"]
        pending = batcher.submit(units, later())
        await until(lambda: model.held == 3)
        model.open()
        assert await result(pending) == answers(units)


async def test_a_request_knows_how_long_it_waited_and_ran() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        pending = batcher.submit([Unit()], later())
        assert (pending.queue_seconds, pending.inference_seconds) == (0, 0)
        model.open()
        await result(pending)
        assert pending.submitted < pending.dispatched <= pending.finished
        assert pending.queue_seconds == pending.dispatched - pending.submitted
        assert pending.inference_seconds == pending.finished - pending.dispatched


async def test_each_run_is_described_with_its_rows_tokens_and_waits() -> None:
    seen: list[Batch] = []
    model = HeldModel()
    async with running(model, on_batch=seen.append) as batcher:
        await hold(batcher, model)
        pending = batcher.submit([Unit(3), Unit(10, rows=2)], later())
        model.open()
        await result(pending)
        await until(lambda: len(seen) == 2)
    batch = seen[1]
    assert (batch.rows, batch.tokens, batch.padded_tokens, batch.error) == (3, 23, 30, None)
    assert len(batch.entries) == 2
    assert all(entry.submitted == pending.submitted < batch.started for entry in batch.entries)
    assert (batch.started, batch.finished) == (pending.dispatched, pending.finished)


async def test_a_request_that_has_ended_leaves_no_circle_for_the_garbage_collector() -> None:
    async with running(instant) as batcher:
        pending = batcher.submit([Unit(), Unit()], later())
        assert [entry.request for entry in pending.entries] == [pending, pending]
        await result(pending)
        await until(lambda: not pending.entries)


# --- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failing_run_fails_only_the_request_whose_row_is_bad() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        good, bad, also_good = Unit(), Unit(bad=True), Unit()
        pending = [batcher.submit([unit], later()) for unit in (good, bad, also_good)]
        model.open()
        assert await result(pending[0]) == answers([good])
        with pytest.raises(RunFailed):
            await result(pending[1])
        assert await result(pending[2]) == answers([also_good])
    assert model.runs[1] == [good, bad, also_good], "they were to share a run"


async def test_one_bad_row_fails_the_whole_of_its_request() -> None:
    async with running(instant) as batcher:
        pending = batcher.submit([Unit(), Unit(bad=True), Unit()], later())
        with pytest.raises(RunFailed):
            await result(pending)


async def test_a_failure_is_reported_by_its_type_and_never_by_its_words() -> None:
    seen: list[Batch] = []
    async with running(instant, on_batch=seen.append) as batcher:
        unit = Unit(bad=True)
        with pytest.raises(RunFailed) as caught:
            await result(batcher.submit([unit], later()))
        await until(lambda: bool(seen))
    assert seen[0].error == "ValueError"
    assert "digest" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_a_runner_goes_on_after_failures() -> None:
    async with running(instant) as batcher:
        for _ in range(5):
            with pytest.raises(RunFailed):
                await result(batcher.submit([Unit(bad=True)], later()))
        unit = Unit()
        assert await result(batcher.submit([unit], later())) == answers([unit])
        assert batcher.stuck() is None


@pytest.mark.parametrize("results", [[], ["one", "too many"], None], ids=["too few", "too many", "none at all"])
async def test_a_model_that_returns_another_number_of_results_fails_the_rows(results: Any) -> None:
    async with running(lambda units: results) as batcher:
        with pytest.raises(RunFailed):
            await result(batcher.submit([Unit()], later()))


async def test_a_row_that_nobody_waits_for_any_more_is_not_run_again_after_a_failed_run() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        bad, given_up, waiting = Unit(bad=True), Unit(), Unit()
        pending = [batcher.submit([unit], later()) for unit in (bad, given_up, waiting)]
        model.let_go()
        await until(lambda: len(model.runs) == 2)
        pending[1].future.cancel()
        model.open()
        assert await result(pending[2]) == answers([waiting])
    assert model.runs[1] == [bad, given_up, waiting]
    assert [given_up] not in model.runs[2:]


# --- giving up --------------------------------------------------------------------------------------------------------


async def test_a_cancelled_row_is_not_run() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        given_up, waiting = Unit(), Unit()
        pending = [batcher.submit([unit], later()) for unit in (given_up, waiting)]
        pending[0].future.cancel()
        model.open()
        assert await result(pending[1]) == answers([waiting])
    assert given_up not in model.units()


async def test_cancelling_during_the_run_harms_no_neighbour() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        await hold(batcher, model)
        units = [Unit(), Unit()]
        pending = [batcher.submit([unit], later()) for unit in units]
        model.let_go()
        await until(lambda: len(model.runs) == 2)
        pending[0].future.cancel()
        model.open()
        assert await result(pending[1]) == answers(units[1:])
        assert pending[0].future.cancelled()


async def test_the_queue_is_empty_again_when_all_that_waited_were_given_up() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        (held,) = await hold(batcher, model)
        pending = [batcher.submit([Unit()], later()) for _ in range(10)]
        assert batcher.state().rows == 10
        for each in pending:
            each.future.cancel()
        model.open()
        await result(held)
        await until(lambda: batcher.state().rows == 0)
    assert len(model.runs) == 1


async def test_a_request_that_waits_beyond_its_deadline_ends_then_and_is_not_run() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        (held,) = await hold(batcher, model)
        late = Unit()
        pending = batcher.submit([late], later(0.01))
        with pytest.raises(DeadlineExceeded):
            await result(pending)
        model.open()
        await result(held)
        await until(lambda: batcher.state().rows == 0)
    assert late not in model.units()


async def test_a_request_whose_run_outlasts_its_deadline_ends_at_the_deadline() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        pending = batcher.submit([Unit()], later(0.01))
        with pytest.raises(DeadlineExceeded):
            await result(pending)
        assert model.left == 0


async def test_a_deadline_already_passed_is_exceeded_at_once() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        with pytest.raises(DeadlineExceeded):
            await result(batcher.submit([Unit()], later(-1)))


async def test_a_result_in_time_stays_when_the_deadline_passes_afterwards() -> None:
    async with running(instant) as batcher:
        unit = Unit()
        pending = batcher.submit([unit], later())
        await result(pending)
        pending.expire()
        assert pending.future.result() == answers([unit])


# --- at the door ------------------------------------------------------------------------------------------------------


async def test_more_rows_than_the_queue_can_ever_hold_are_refused_for_good() -> None:
    async with running(instant, queue_rows=5) as batcher:
        with pytest.raises(TooManyRows, match=r"6 rows.* at most 5"):
            batcher.submit([Unit(rows=3), Unit(rows=3)], later())
        assert batcher.state().rows == 0
        units = [Unit(rows=3), Unit(rows=2)]
        assert await result(batcher.submit(units, later())) == answers(units)


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    model = HeldModel()
    async with running(model, tokens_per_second=1.0, queue_rows=5) as batcher:
        await hold(batcher, model)
        batcher.submit([Unit(length=3) for _ in range(4)], later())
        with pytest.raises(Unavailable) as caught:
            batcher.submit([Unit(), Unit()], later())
        assert caught.value.reason == "queue_full"
        assert caught.value.retry_after_seconds == 12, "12 tokens wait, at 1 token per second"
        assert batcher.state().rows == 4, "all rows of a request or none"
        batcher.submit([Unit()], later())


async def test_a_request_that_would_be_answered_too_late_is_refused_at_once() -> None:
    model = HeldModel()
    async with running(model, tokens_per_second=10.0) as batcher:
        await hold(batcher, model)
        batcher.submit([Unit(length=50)], later())
        with pytest.raises(Unavailable) as caught:
            batcher.submit([Unit(length=50)], later(9))
        assert caught.value.reason == "late"
        assert caught.value.retry_after_seconds == 10, "100 tokens, its own included, at 10 per second"
        batcher.submit([Unit(length=50)], later())


async def test_several_runners_shorten_the_expected_wait() -> None:
    model = HeldModel()
    async with running(model, tokens_per_second=10.0, runners=2) as batcher:
        await hold(batcher, model, runners=2)
        batcher.submit([Unit(length=15_000)], later())
        assert batcher.state().wait_seconds(15_000) == 1500
        # One runner alone would take 3000 seconds.
        batcher.submit([Unit(length=15_000)], later(2400))


async def test_with_nobody_waiting_a_request_is_tried_whatever_the_estimate_says() -> None:
    async with running(instant, tokens_per_second=1e-9) as batcher:
        unit = Unit(length=100)
        assert await result(batcher.submit([unit], later())) == answers([unit])


async def test_finished_runs_correct_the_estimate() -> None:
    async with running(instant, tokens_per_second=1e-9) as batcher:
        before = batcher.state().wait_seconds(1000)
        for _ in range(5):
            await result(batcher.submit([Unit(length=100)], later()))
        assert batcher.state().wait_seconds(1000) < before / 1e6


async def test_how_long_runs_take_is_measured() -> None:
    def slow(payloads: Sequence[object]) -> Sequence[object]:
        time.sleep(0.01)
        return instant(payloads)

    async with running(slow) as batcher:
        assert batcher.state().run_seconds == 0
        await result(batcher.submit([Unit()], later()))
        once = batcher.state().run_seconds
        assert once >= 0.001, "a tenth of the first"
        await result(batcher.submit([Unit()], later()))
        assert batcher.state().run_seconds >= 0.9 * once + 0.001, "and a tenth of the second"


async def test_who_comes_waits_for_a_late_loop_as_well_as_for_the_queue() -> None:
    model = HeldModel()
    async with running(model, max_wait_seconds=60) as batcher:
        batcher._lag.stop()
        batcher._lag.seconds = 61
        # Nobody waits: it is worth a try.
        batcher.admission.admit()
        await hold(batcher, model)
        batcher.admission.admit()
        batcher.submit([Unit()], later())
        with pytest.raises(Unavailable) as caught:
            batcher.admission.admit()
        assert caught.value.reason == "queue_full"
        assert caught.value.retry_after_seconds > 60
        # Who was admitted is not asked again.
        batcher.submit([Unit()], later())
        batcher._lag.seconds = 1
        batcher.admission.admit()


# --- batch delay ------------------------------------------------------------------------------------------------------


async def test_a_delay_fills_batches() -> None:
    model = HeldModel()
    async with running(model, delay_seconds=HOUR, batch_rows=3) as batcher:
        model.open()
        units = [Unit() for _ in range(6)]
        pending = []
        for unit in units:
            pending.append(batcher.submit([unit], later(2 * HOUR)))
            await asyncio.sleep(0.005)  # time enough to do it wrong
        await asyncio.gather(*map(result, pending))
    assert [len(run) for run in model.runs] == [3, 3]


async def test_a_batch_that_is_full_by_tokens_does_not_sit_out_the_delay() -> None:
    model = HeldModel()
    async with running(model, delay_seconds=HOUR, batch_rows=8, batch_tokens=512) as batcher:
        model.open()
        units = [Unit(length=256), Unit(length=256)]
        assert await result(batcher.submit(units, later(2 * HOUR))) == answers(units)


async def test_a_row_alone_runs_when_the_delay_is_over() -> None:
    async with running(instant, delay_seconds=0.01) as batcher:
        unit = Unit()
        assert await result(batcher.submit([unit], later())) == answers([unit])


async def test_closing_ends_what_a_delay_keeps_waiting() -> None:
    async with running(instant, delay_seconds=HOUR) as batcher:
        pending = batcher.submit([Unit()], later(2 * HOUR))
        batcher.close()
        with pytest.raises(Unavailable):
            await result(pending)


# --- supervision and the end ------------------------------------------------------------------------------------------


async def test_a_run_that_hangs_makes_the_batcher_stuck_until_it_ends() -> None:
    model = HeldModel()
    async with running(model, runners=2, runner_timeout_seconds=0.05) as batcher:
        assert batcher.stuck() is None
        (held,) = await hold(batcher, model)
        await until(lambda: batcher.stuck() is not None)
        assert "in one run for over 0.05 s" in str(batcher.stuck())
        model.open()
        await result(held)
        await until(lambda: batcher.stuck() is None)


async def test_a_run_within_its_time_is_not_stuck() -> None:
    model = HeldModel()
    async with running(model, runner_timeout_seconds=HOUR) as batcher:
        await hold(batcher, model)
        assert batcher.stuck() is None


async def test_idle_runners_are_never_stuck() -> None:
    async with running(instant, runner_timeout_seconds=0.001) as batcher:
        await result(batcher.submit([Unit()], later()))
        moment = time.monotonic()
        await until(lambda: time.monotonic() > moment + 0.01)
        assert batcher.stuck() is None


# pytest itself reports threads that die.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_runner_thread_that_dies_makes_the_batcher_stuck() -> None:
    def die(_: Sequence[object]) -> list[object]:
        raise SystemExit

    async with running(die, runners=2) as batcher:
        pending = batcher.submit([Unit()], later())
        await until(lambda: batcher.stuck() is not None)
        assert "has ended" in str(batcher.stuck())
        pending.future.cancel()


async def test_closing_fails_what_waits_and_answers_what_runs() -> None:
    model = HeldModel()
    async with running(model) as batcher:
        (held,) = await hold(batcher, model)
        waiting = batcher.submit([Unit(), Unit()], later())
        batcher.close(0)
        with pytest.raises(Unavailable) as caught:
            await result(waiting)
        assert (caught.value.reason, caught.value.close) == ("draining", True)
        model.open()
        assert len(await result(held)) == 1
    assert len(model.runs) == 1
    assert batcher.state().rows == 0


async def test_after_closing_nothing_is_accepted() -> None:
    async with running(instant) as batcher:
        batcher.close()
        with pytest.raises(Unavailable) as caught:
            batcher.submit([Unit()], later())
        assert (caught.value.reason, caught.value.close) == ("draining", True)


def runner_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("runner-")]


async def test_closing_ends_the_threads_and_is_not_mistaken_for_a_dead_runner() -> None:
    async with running(instant, runners=3) as batcher:
        assert len(runner_threads()) == 3
        await result(batcher.submit([Unit()], later()))
        batcher.close(PATIENCE_SECONDS)
        assert runner_threads() == []
        assert batcher.stuck() is None
        batcher.close()


async def test_the_loop_is_watched_from_the_start_until_closing() -> None:
    async with running(instant) as batcher:
        timer = batcher._lag._timer
        assert timer is not None
        assert not timer.cancelled()
        batcher.close()
        assert timer.cancelled()


def test_a_loop_that_is_gone_ends_the_runner_quietly() -> None:
    model = HeldModel()

    async def leave_while_running() -> Batcher:
        batcher = Batcher(model, Limits(1, 4, 100, 10), 1e12)
        batcher.start()
        batcher.submit([Unit()], later())
        await until(lambda: model.held == 1)
        return batcher

    batcher = asyncio.run(leave_while_running())
    model.open()
    # A thread that raises would be reported by pytest as an error.
    batcher.close(PATIENCE_SECONDS)
    assert runner_threads() == []
