"""Scores shards of a plan: rows are read and encoded, run, and answered in their order. Knows no command line."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from app.errors import ConfigError, Invalid, ProviderError
from app.runtime.loading import batches
from app.runtime.session import Model
from app.runtime.tasks import Encoded
from app.scoring.commit import BadRow, Marker, ShardOutput, marker_path
from app.scoring.formats import Bad, Row, open_format
from app.scoring.plan import Plan, Shard
from app.scoring.storage import Storage, storage_errors
from app.scoring.table import Table

# Windows that are read and encoded while another runs.
WINDOWS_AHEAD = 2
# Called with how many more rows were scored, or could not be.
Count = Callable[[int, int], None]


class Place(NamedTuple):
    """A row's number among all, its input's, and its own in that."""

    row: int
    input: int
    row_of_input: int


@dataclass(slots=True)
class _Window:
    """Rows of a shard that are being scored: good ones with their unit of work, and the runs that these share, as
    places in `rows` and what will be their results."""

    output: ShardOutput
    last: bool
    bad: int = 0
    rows: list[tuple[Place, Any, Encoded]] = field(default_factory=list)
    runs: list[tuple[list[int], Future[list[Any]]]] = field(default_factory=list)


class Scorer:
    """Of one plan, with one model that passed the gate."""

    def __init__(
        self, model: Model, table: Table, plan: Plan, source: Storage, output: Storage, max_bad_rows: int, count: Count
    ) -> None:
        """max_bad_rows: of one shard."""
        self.plan, self.output = plan, output
        self._model, self._table, self._source, self._max_bad_rows = model, table, source, max_bad_rows
        self._count = count
        self._unfinished = set[ShardOutput]()
        self._format = open_format(plan.work.file_format, plan.work.max_row_bytes)
        self._fields = dict(table.fields)
        if plan.work.id_column and plan.work.file_format == "parquet":
            self._fields["id"] = plan.headers[0][-1]

    def score(self, shards: Iterable[int]) -> Iterator[Marker]:
        """Scores them in this order, unless they are done meanwhile; yields each when it counts.

        Raises TooManyBadRows, StorageError, ConfigError for inputs that changed, and ProviderError for a device that
        fails.
        """
        pool, ahead = ThreadPoolExecutor(self._model.runners), deque[_Window]()
        self._unfinished.clear()
        try:
            for window in self._windows(shards, pool):
                ahead.append(window)
                if len(ahead) > WINDOWS_AHEAD:
                    yield from self._finish(ahead.popleft())
            while ahead:
                yield from self._finish(ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for output in self._unfinished:
                output.close()

    def _windows(self, shards: Iterable[int], pool: ThreadPoolExecutor) -> Iterator[_Window]:
        work = self.plan.work
        for index in shards:
            if self.output.exists(marker_path(index)):
                continue
            shard = self.plan.shards[index]
            output = ShardOutput(self.output, index, work.file_format, self._format, self._fields, self._max_bad_rows)
            self._unfinished.add(output)
            rows, left = self._read(shard), shard.rows
            while True:
                part = list(islice(rows, work.window_rows))
                left -= len(part)
                if not left or not part:
                    self._require_unchanged(shard)
                if left and not part:
                    raise ConfigError(f"{self._source}: {left} rows fewer than planned")
                yield self._begin(_Window(output, last=not left), part, pool)
                if not left:
                    break

    def _read(self, shard: Shard) -> Iterator[tuple[Place, Row]]:
        work, number = self.plan.work, shard.first
        for part in shard.slices:
            path = work.inputs[part.input].path
            with storage_errors(path), self._source.open(path) as file:
                rows = self._format.read(file, work.columns, self.plan.headers[part.input], part.place, part.skip)
                for row_of_input, row in enumerate(islice(rows, part.rows), part.first):
                    yield Place(number, part.input, row_of_input), row
                    number += 1

    def _require_unchanged(self, shard: Shard) -> None:
        """Raises ConfigError if a file is not the one that was planned: it was read while it changed, or after."""
        for planned in (self.plan.work.inputs[part.input] for part in shard.slices):
            if self._source.version(planned.path) != planned.version:
                raise ConfigError(f"{planned.path}: has changed since the run began: score into another OUTPUT")

    def _begin(self, window: _Window, rows: Sequence[tuple[Place, Row]], pool: ThreadPoolExecutor) -> _Window:
        """Encodes the rows and submits their runs. Which rows share one depends on nothing but the plan."""
        taken, inputs = [], []
        for place, row in rows:
            try:
                identity, value = self._table.take(row)
            except Invalid as error:
                self._refuse(window, place, str(error))
                continue
            taken.append((place, place.row if identity is None else identity))
            inputs.append(value)
        for (place, identity), unit in zip(taken, self._table.encode(inputs), strict=True):
            if isinstance(unit, Bad):
                self._refuse(window, place, unit)
            else:
                window.rows.append((place, identity, unit))
        units = [unit for _, _, unit in window.rows]
        for batch in batches(units, self.plan.work.batch_rows, self.plan.work.batch_tokens):
            window.runs.append((batch, pool.submit(self._run, [units[index].payload for index in batch])))
        return window

    def _refuse(self, window: _Window, place: Place, reason: str) -> None:
        path = self.plan.work.inputs[place.input].path
        window.output.refuse(BadRow(place.row, path, place.row_of_input, str(reason)))
        window.bad += 1

    def _run(self, payloads: Sequence[Any]) -> list[Any]:
        """Results in order, with Bad for rows that the model fails on. One takes no other with it."""
        try:
            return self._model.run(payloads)
        # Whatever a model raises ends its rows, unless it is the device that fails.
        except Exception as error:
            if len(payloads) > 1:
                return [self._run([payload])[0] for payload in payloads]
            self._require_working()
            return [Bad(f"the model failed on it: {type(error).__name__}")]

    def _require_working(self) -> None:
        """Raises ProviderError if the model fails on its golden inputs as well, which it did not at the start."""
        try:
            self._model.run([self._model.task.golden()[0].units[0].payload])
        except Exception as error:
            raise ProviderError(f"the model now fails on its golden inputs, too: {type(error).__name__}") from None

    def _finish(self, window: _Window) -> Iterator[Marker]:
        """Writes a window's answers, in the order of rows; the last one's shard counts then."""
        results, answers = dict[int, Any](), []
        for batch, run in window.runs:
            results.update(zip(batch, run.result(), strict=True))
        for index, (place, identity, unit) in enumerate(window.rows):
            try:
                answers.append({"id": identity} | self._table.answer(unit, results[index]))
            except Invalid as error:
                self._refuse(window, place, str(error))
        window.output.write(answers)
        self._count(len(answers), window.bad)
        if window.last:
            marker = window.output.commit()
            self._unfinished.discard(window.output)
            yield marker
