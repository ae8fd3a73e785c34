"""Which waiting rows make the next batch: properties under any interleaving, and the cases that show why."""

from collections.abc import Hashable
from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from app.batching.queue import PendingRequest, QueueEntry, RowQueue

# However slow the machine is.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Unit:
    """A unit of work as the queue sees one."""

    length: int
    rows: int = 1
    key: Hashable = None
    payload: object = None


@dataclass
class Waiter:
    """The part of a future that the queue asks."""

    ended: bool = False

    def done(self) -> bool:
        return self.ended


def row_of(length: int, rows: int = 1, key: Hashable = None, submitted: float = 0.0) -> QueueEntry:
    unit = Unit(length, rows, key)
    request = PendingRequest([unit], Waiter(), inf)  # type: ignore[arg-type]
    request.submitted = submitted
    return QueueEntry(unit, request, 0)


def fill(queue: RowQueue, *lengths: int) -> list[QueueEntry]:
    rows = [row_of(length) for length in lengths]
    for row in rows:
        queue.push(row)
    return rows


def lengths_of(batch: list[QueueEntry]) -> list[int]:
    return sorted(row.unit.length for row in batch)


def fits(batch: list[QueueEntry], queue: RowQueue, share: float = inf) -> bool:
    rows = sum(row.unit.rows for row in batch)
    return rows <= queue.batch_rows and rows * max(row.unit.length for row in batch) <= min(queue.batch_tokens, share)


def size(rows: list[QueueEntry]) -> tuple[int, int]:
    return sum(row.unit.rows for row in rows), sum(row.unit.rows * row.unit.length for row in rows)


@dataclass
class Seen:
    """What the test knows of a row that waits."""

    row: QueueEntry
    # Place in the order of arrival.
    order: int
    # Batches formed since it came, and those of them that held a younger row: those passed it over.
    batches: int = 0
    passed: int = 0


class QueueMachine(RuleBasedStateMachine):
    """Pushes, deaths and takes in any order, checked against a plain list of what waits."""

    rows = Bundle("rows")

    @initialize(
        batch_rows=st.integers(1, 5),
        batch_tokens=st.integers(4, 60),
        queue_rows=st.integers(1, 6),
        overhead_tokens=st.sampled_from([0, 3, 10, inf]),
    )
    def create(self, batch_rows: int, batch_tokens: int, queue_rows: int, overhead_tokens: float) -> None:
        self.queue = RowQueue(batch_rows, batch_tokens, queue_rows, overhead_tokens)
        self.waiting: list[Seen] = []
        self.pushed = 0
        self.returned: set[int] = set()
        self.deaths = 0

    def live(self) -> list[QueueEntry]:
        return [seen.row for seen in self.waiting if not seen.row.future.done()]

    @rule(
        target=rows,
        length=st.integers(1, 20),
        rows=st.sampled_from([1, 1, 1, 2, 3, 9]),
        key=st.sampled_from(["a", "a", "b"]),
    )
    def push(self, length: int, rows: int, key: str) -> QueueEntry:
        row = row_of(length, rows, key)
        self.queue.push(row)
        self.waiting.append(Seen(row, self.pushed))
        self.pushed += 1
        return row

    @rule(row=consumes(rows))
    def die(self, row: QueueEntry) -> None:
        self.deaths += any(seen.row is row for seen in self.waiting)
        row.future.ended = True

    @rule()
    def look_at_the_delay(self) -> None:
        assert self.queue.fill_delay(0.0) == 0.0

    @precondition(lambda self: self.waiting)
    @rule(idle=st.integers(0, 2))
    def take(self, idle: int) -> None:
        live = self.live()
        waiting = self.queue.tokens
        batch = self.queue.take(idle)
        if not live:
            assert batch == []
            self.waiting = []
            return
        head = live[0]
        assert len({id(row) for row in batch}) == len(batch)
        assert all(any(row is other for other in live) for row in batch), "taken twice, or dead"
        assert head in batch, "the oldest live row was left"
        assert {row.unit.key for row in batch} == {head.unit.key}
        # Rows found dead on the way may have counted.
        share = max(self.queue.overhead_tokens, waiting / (idle + 1)) if idle else inf
        assert len(batch) == 1 or fits(batch, self.queue, share)
        share = max(self.queue.overhead_tokens, size(live)[1] / (idle + 1)) if idle else inf
        self.check_choice(head, batch, live, share)
        self.settle(batch)

    def check_choice(self, head: QueueEntry, batch: list[QueueEntry], live: list[QueueEntry], share: float) -> None:
        waited = next(seen.batches for seen in self.waiting if seen.row is head)
        left = [row for row in live if row.unit.key == head.unit.key and row not in batch]
        if waited >= self.queue.max_passed and batch == live[: len(batch)]:
            return  # in order of age, as it may be when the oldest has waited that long

        shortest, longest = min(row.unit.length for row in batch), max(row.unit.length for row in batch)
        rows = size(batch)[0]
        assert not any(shortest < row.unit.length < longest for row in left), "a row closer in length was left"
        # What each neighbour would add in padding: one of them does not fit, or costs more than a run of its own.
        shorter = [row for row in left if row.unit.length <= shortest]
        longer = [row for row in left if row.unit.length >= longest]
        neighbours = [
            (row.unit.rows * (longest - row.unit.length), row)
            for row in shorter
            if row.unit.length == max(other.unit.length for other in shorter)
        ]
        neighbours += [
            (rows * (row.unit.length - longest), row)
            for row in longer
            if row.unit.length == min(other.unit.length for other in longer)
        ]
        assert not neighbours or not all(
            cost <= self.queue.overhead_tokens and fits([*batch, row], self.queue, share) for cost, row in neighbours
        ), "room was left in the batch"

    def settle(self, batch: list[QueueEntry]) -> None:
        youngest = max(seen.order for seen in self.waiting if seen.row in batch)
        left = []
        for seen in self.waiting:
            if seen.row in batch:
                assert seen.order not in self.returned
                self.returned.add(seen.order)
                continue
            seen.batches += 1
            seen.passed += seen.order < youngest
            left.append(seen)
        self.waiting = left

    @rule()
    def clear(self) -> None:
        live = self.live()
        left = self.queue.clear()
        assert [row for row in left if not row.future.done()] == live, "not all, or not oldest first"
        self.waiting = []
        assert (self.queue.rows, self.queue.tokens) == (0, 0)

    @invariant()
    def counts_cover_what_waits(self) -> None:
        if not hasattr(self, "queue"):
            return
        rows, tokens = size(self.live())
        assert self.queue.rows >= rows
        assert self.queue.tokens >= tokens
        # Dead rows may be counted until they are met; nothing else may.
        rows, tokens = size([seen.row for seen in self.waiting])
        assert self.queue.rows <= rows
        assert self.queue.tokens <= tokens
        if not self.deaths:
            assert (self.queue.rows, self.queue.tokens) == (rows, tokens)

    @invariant()
    def nobody_is_passed_over_for_ever(self) -> None:
        if hasattr(self, "queue"):
            live = [seen for seen in self.waiting if not seen.row.future.done()]
            assert all(seen.passed <= self.queue.max_passed for seen in live)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        for _ in range(len(self.waiting) + 1):
            self.take(0)
        assert self.live() == [], "a row was lost"
        assert self.queue.take() == []
        assert (self.queue.rows, self.queue.tokens) == (0, 0)


TestAnyInterleaving = QueueMachine.TestCase
TestAnyInterleaving.settings = settings(UNHURRIED, max_examples=200, stateful_step_count=40)


@UNHURRIED
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 200),
    st.data(),
)
def test_emptying_a_queue_returns_every_live_row_once_and_no_dead_one(
    lengths: list[int], batch_rows: int, batch_tokens: int, data: st.DataObject
) -> None:
    queue = RowQueue(batch_rows, batch_tokens, len(lengths))
    rows = fill(queue, *lengths)
    dead = data.draw(st.sets(st.sampled_from(range(len(rows)))))
    for index in dead:
        rows[index].future.ended = True
    taken: list[QueueEntry] = []
    while batch := queue.take():
        taken += batch
    expected = {id(row) for index, row in enumerate(rows) if index not in dead}
    assert {id(row) for row in taken} == expected
    assert len(taken) == len(expected)
    assert (queue.rows, queue.tokens) == (0, 0)


@UNHURRIED
@given(st.lists(st.integers(1, 30), min_size=2, max_size=40), st.integers(1, 5))
def test_batches_of_one_come_in_order_of_age(lengths: list[int], queue_rows: int) -> None:
    queue = RowQueue(1, 10_000, queue_rows)
    rows = fill(queue, *lengths)
    assert [queue.take() for _ in rows] == [[row] for row in rows]


@UNHURRIED
@given(st.integers(2, 6), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_row_is_passed_over_a_bounded_number_of_times_by_a_stream_that_never_ends(
    batch_rows: int, queue_rows: int, steps: list[int]
) -> None:
    queue = RowQueue(batch_rows, 10**9, queue_rows)
    # Older rows, far from each other in length, each to find younger neighbours of just its own length.
    older = [100 * (index + 1) for index in range(queue.max_passed + 10)]
    fill(queue, *older)
    (victim,) = fill(queue, 10**6)
    youngest = fill(queue, *[length for length in older for _ in range(batch_rows - 1)])
    passed = taken = 0
    waits = True
    while waits:
        batch = queue.take()
        waits = victim not in batch
        taken += 1
        if waits:
            passed += any(row in youngest for row in batch)
        # The stream goes on.
        youngest += fill(queue, *[steps[taken % len(steps)] * 100] * batch_rows)
    assert passed <= queue.max_passed


def test_a_stream_of_close_neighbours_passes_a_row_over_exactly_as_often_as_is_allowed() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=10**9, queue_rows=8)
    assert queue.max_passed == 8
    lengths = [100 * (index + 1) for index in range(20)]
    older = fill(queue, *lengths)
    fill(queue, 1)
    younger = fill(queue, *lengths)
    pairs = [queue.take() for _ in range(queue.max_passed)]
    assert pairs == [[older[index], younger[index]] for index in range(queue.max_passed)]
    # From here on by age alone: the oldest two, although a younger one is closer.
    assert queue.take() == older[8:10]


@pytest.mark.parametrize(("key", "length"), [("same", 30), ("another", 10)], ids=["too long", "another key"])
def test_in_order_of_age_nobody_passes_the_first_row_that_may_not_share_the_run(key: str, length: int) -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=40, queue_rows=1)
    queue.max_passed = 0
    old, odd, young = row_of(10, key="same"), row_of(length, key=key), row_of(10, key="same")
    for row in (old, odd, young):
        queue.push(row)
    assert queue.take() == [old]
    assert odd in queue.take()


def test_in_order_of_age_dead_rows_take_no_room() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=40, queue_rows=1)
    queue.max_passed = 0
    rows = fill(queue, 10, 30, 30, 10)
    rows[1].future.ended = rows[2].future.ended = True
    assert queue.take() == [rows[0], rows[3]]


def test_the_head_takes_the_rows_closest_to_it_in_length() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=10_000, queue_rows=100)
    fill(queue, 50, 9, 48, 200, 53, 51, 90)
    assert lengths_of(queue.take()) == [48, 50, 51, 53]


def test_the_shorter_of_two_rows_equally_close_is_taken() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=10_000, queue_rows=100)
    fill(queue, 50, 52, 48)
    assert lengths_of(queue.take()) == [48, 50]


def test_a_row_that_would_pad_the_batch_beyond_its_token_limit_is_left() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=64, queue_rows=100)
    fill(queue, 16, 16, 16, 17, 17)
    assert lengths_of(queue.take()) == [16, 16, 16]


def test_a_batch_may_fill_its_limits_exactly() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=64, queue_rows=100)
    fill(queue, *[16] * 9)
    assert [len(queue.take()) for _ in range(3)] == [4, 4, 1]


@pytest.mark.parametrize(("length", "rows"), [(1000, 1), (1, 1000), (1000, 1000)])
def test_a_unit_larger_than_any_batch_runs_alone(length: int, rows: int) -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=64, queue_rows=2000)
    small, large = row_of(1), row_of(length, rows)
    queue.push(large)
    queue.push(small)
    assert queue.take() == [large]
    assert queue.take() == [small]


def test_a_unit_of_several_rows_counts_as_many() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=1000, queue_rows=100)
    for rows in (3, 2, 1):
        queue.push(row_of(1, rows))
    assert queue.rows == 6
    assert sum(row.unit.rows for row in queue.take()) <= 4


def test_rows_of_different_keys_never_share_a_batch() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=1000, queue_rows=100)
    for index in range(6):
        queue.push(row_of(5, key=("shape", index % 2)))
    assert [[row.unit.key[1] for row in queue.take()] for _ in range(2)] == [[0, 0, 0], [1, 1, 1]]


def test_dead_rows_take_no_room_in_a_batch() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000, queue_rows=100)
    rows = fill(queue, 5, 5, 5, 5)
    rows[1].future.ended = rows[2].future.ended = True
    assert queue.take() == [rows[0], rows[3]]


@UNHURRIED
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_discarded_rows_free_their_place_at_once_and_the_others_are_served(
    lengths: list[int], data: st.DataObject
) -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=1000, queue_rows=100)
    rows = fill(queue, *lengths)
    batch = queue.take()
    gone = data.draw(st.lists(st.sampled_from(rows)))
    for row in gone:  # some of them taken already, some twice
        queue.discard(row)
    left = [row for row in rows if row not in batch and row not in gone]
    assert (queue.rows, queue.tokens) == (len(left), sum(row.unit.length for row in left))
    taken: list[QueueEntry] = []
    while batch := queue.take():
        taken += batch
    assert sorted(row.order for row in taken) == [row.order for row in left]


def test_a_row_joins_while_its_padding_costs_less_than_a_run_of_its_own() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=1000, queue_rows=100, overhead_tokens=10)
    rows = fill(queue, 20, 40, 12, 22, 9)
    # 22 pads one row by 2, 12 is padded by 10; 9 would be by 13, and 40 would pad three rows by 18 each.
    assert sorted(row.unit.length for row in queue.take()) == [12, 20, 22]
    assert queue.take() == [rows[1]]
    assert queue.take() == [rows[4]]


def test_idle_runners_share_what_waits_when_a_share_is_worth_a_run() -> None:
    for overhead_tokens, expected in ((5, 2), (20, 2), (40, 4), (inf, 4)):
        queue = RowQueue(batch_rows=8, batch_tokens=1000, queue_rows=100, overhead_tokens=overhead_tokens)
        fill(queue, 10, 10, 10, 10)
        assert len(queue.take(idle=1)) == expected


def test_a_queue_of_the_dead_is_empty_once_looked_at() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000, queue_rows=100)
    for row in fill(queue, 1, 2, 3):
        row.future.ended = True
    assert queue.take() == []
    assert (queue.rows, queue.tokens) == (0, 0)


def test_a_full_batch_does_not_wait_for_more_rows() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000, queue_rows=100)
    now = 10.0**12  # far ahead of the clock: the rows have just come
    queue.push(row_of(1, submitted=now))
    assert queue.fill_delay(3600) > 0
    queue.push(row_of(1, submitted=now))
    assert queue.fill_delay(3600) == 0


def test_a_batch_that_is_full_by_tokens_does_not_wait_for_more_rows() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=512, queue_rows=100)
    now = 10.0**12
    queue.push(row_of(256, submitted=now))
    assert queue.fill_delay(3600) > 0
    queue.push(row_of(256, submitted=now))
    assert queue.fill_delay(3600) == 0


def test_a_row_that_has_waited_its_delay_is_taken_alone() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=512, queue_rows=100)
    queue.push(row_of(1, submitted=-(10.0**9)))
    assert queue.fill_delay(3600) == 0


def test_an_empty_queue_asks_for_no_delay() -> None:
    assert RowQueue(8, 512, 100).fill_delay(3600) == 0
