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


class QueueMachine(RuleBasedStateMachine):
    """Pushes, deaths and takes in any order, checked against a plain list of what waits."""

    rows = Bundle("rows")

    @initialize(
        batch_rows=st.integers(1, 5),
        batch_tokens=st.integers(4, 60),
        overhead_tokens=st.sampled_from([0, 3, 10, inf]),
        window_tokens=st.sampled_from([0, 5, 20, 50, inf]),
    )
    def create(self, batch_rows: int, batch_tokens: int, overhead_tokens: float, window_tokens: float) -> None:
        self.queue = RowQueue(batch_rows, batch_tokens, overhead_tokens)
        self.window_tokens = window_tokens
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
        batch = self.queue.take(idle, self.window_tokens)
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
        assert all(self.in_window(row, live) for row in batch), "a row too young was taken"
        # The dead ones that were not met yet take their place in the window.
        inside = [row for row in live if self.in_window(row, [seen.row for seen in self.waiting])]
        left = [row for row in inside if row.unit.key == head.unit.key and row not in batch]
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

    def in_window(self, row: QueueEntry, rows: list[QueueEntry]) -> bool:
        """Whether those of `rows` that are older leave room for it in the window."""
        older = rows[: rows.index(row)]
        return size(older)[1] < self.window_tokens or len(older) < self.queue.batch_rows

    def settle(self, batch: list[QueueEntry]) -> None:
        left = []
        for seen in self.waiting:
            if seen.row in batch:
                assert seen.order not in self.returned
                self.returned.add(seen.order)
                continue
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
    queue = RowQueue(batch_rows, batch_tokens)
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
@given(st.lists(st.integers(1, 30), min_size=2, max_size=40))
def test_batches_of_one_come_in_order_of_age(lengths: list[int]) -> None:
    queue = RowQueue(1, 10_000)
    rows = fill(queue, *lengths)
    assert [queue.take() for _ in rows] == [[row] for row in rows]


@UNHURRIED
@given(st.integers(2, 6), st.integers(1, 40), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_stream_that_never_ends_passes_a_row_over_only_while_older_ones_are_served(
    batch_rows: int, ahead: int, steps: list[int]
) -> None:
    queue = RowQueue(batch_rows, 10**9)
    # Older rows, far from each other in length, each to find younger neighbours of just its own length.
    older = [100 * (index + 1) for index in range(ahead)]
    fill(queue, *older)
    (victim,) = fill(queue, 10**6)
    fill(queue, *[length for length in older for _ in range(batch_rows - 1)])
    served = 0
    while victim not in queue.take(window_tokens=sum(older)):
        served += 1
        fill(queue, *[steps[served % len(steps)] * 100] * batch_rows)
    assert served <= ahead


def test_a_batch_is_chosen_from_the_oldest_rows() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=10**9)
    rows = fill(queue, 10, 30, 50, 70, 11, 10)
    # The fifth would fit better, but 10 + 30 + 50 are as many tokens as the window has.
    assert queue.take(window_tokens=90) == rows[:2]
    # 50 + 70 are, too.
    assert queue.take(window_tokens=120) == rows[2:4]
    assert queue.take(window_tokens=120) == [rows[5], rows[4]]


def test_a_window_has_room_for_a_batch_whatever_its_tokens() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=10**9)
    rows = fill(queue, 50, 50, 50, 50, 50)
    assert queue.take(window_tokens=0) == rows[:4]


def test_the_head_takes_the_rows_closest_to_it_in_length() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=10_000)
    fill(queue, 50, 9, 48, 200, 53, 51, 90)
    assert lengths_of(queue.take()) == [48, 50, 51, 53]


def test_the_shorter_of_two_rows_equally_close_is_taken() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=10_000)
    fill(queue, 50, 52, 48)
    assert lengths_of(queue.take()) == [48, 50]


def test_a_row_that_would_pad_the_batch_beyond_its_token_limit_is_left() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=64)
    fill(queue, 16, 16, 16, 17, 17)
    assert lengths_of(queue.take()) == [16, 16, 16]


def test_a_batch_may_fill_its_limits_exactly() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=64)
    fill(queue, *[16] * 9)
    assert [len(queue.take()) for _ in range(3)] == [4, 4, 1]


@pytest.mark.parametrize(("length", "rows"), [(1000, 1), (1, 1000), (1000, 1000)])
def test_a_unit_larger_than_any_batch_runs_alone(length: int, rows: int) -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=64)
    small, large = row_of(1), row_of(length, rows)
    queue.push(large)
    queue.push(small)
    assert queue.take() == [large]
    assert queue.take() == [small]


def test_a_unit_of_several_rows_counts_as_many() -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=1000)
    for rows in (3, 2, 1):
        queue.push(row_of(1, rows))
    assert queue.rows == 6
    assert sum(row.unit.rows for row in queue.take()) <= 4


def test_rows_of_different_keys_never_share_a_batch() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=1000)
    for index in range(6):
        queue.push(row_of(5, key=("shape", index % 2)))
    assert [[row.unit.key[1] for row in queue.take()] for _ in range(2)] == [[0, 0, 0], [1, 1, 1]]


def test_dead_rows_take_no_room_in_a_batch() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000)
    rows = fill(queue, 5, 5, 5, 5)
    rows[1].future.ended = rows[2].future.ended = True
    assert queue.take() == [rows[0], rows[3]]


@UNHURRIED
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_discarded_rows_free_their_place_at_once_and_the_others_are_served(
    lengths: list[int], data: st.DataObject
) -> None:
    queue = RowQueue(batch_rows=4, batch_tokens=1000)
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
    queue = RowQueue(batch_rows=8, batch_tokens=1000, overhead_tokens=10)
    rows = fill(queue, 20, 40, 12, 22, 9)
    # 22 pads one row by 2, 12 is padded by 10; 9 would be by 13, and 40 would pad three rows by 18 each.
    assert sorted(row.unit.length for row in queue.take()) == [12, 20, 22]
    assert queue.take() == [rows[1]]
    assert queue.take() == [rows[4]]


def test_idle_runners_share_what_waits_when_a_share_is_worth_a_run() -> None:
    for overhead_tokens, expected in ((5, 2), (20, 2), (40, 4), (inf, 4)):
        queue = RowQueue(batch_rows=8, batch_tokens=1000, overhead_tokens=overhead_tokens)
        fill(queue, 10, 10, 10, 10)
        assert len(queue.take(idle=1)) == expected


def test_a_queue_of_the_dead_is_empty_once_looked_at() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000)
    for row in fill(queue, 1, 2, 3):
        row.future.ended = True
    assert queue.take() == []
    assert (queue.rows, queue.tokens) == (0, 0)


def test_a_full_batch_does_not_wait_for_more_rows() -> None:
    queue = RowQueue(batch_rows=2, batch_tokens=1000)
    now = 10.0**12  # far ahead of the clock: the rows have just come
    queue.push(row_of(1, submitted=now))
    assert queue.fill_delay(3600) > 0
    queue.push(row_of(1, submitted=now))
    assert queue.fill_delay(3600) == 0


def test_a_batch_that_is_full_by_tokens_does_not_wait_for_more_rows() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=512)
    now = 10.0**12
    queue.push(row_of(256, submitted=now))
    assert queue.fill_delay(3600) > 0
    queue.push(row_of(256, submitted=now))
    assert queue.fill_delay(3600) == 0


def test_a_row_that_has_waited_its_delay_is_taken_alone() -> None:
    queue = RowQueue(batch_rows=8, batch_tokens=512)
    queue.push(row_of(1, submitted=-(10.0**9)))
    assert queue.fill_delay(3600) == 0


def test_an_empty_queue_asks_for_no_delay() -> None:
    assert RowQueue(8, 512, 100).fill_delay(3600) == 0
