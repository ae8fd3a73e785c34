"""What a run will do, written once: inputs, model, and which rows each shard has. Whoever comes later does the same.

Everything that answers depend on is in it: the same plan gives the same bytes, whatever was interrupted.
"""

from itertools import pairwise
from typing import Any

import msgspec
from msgspec import Struct

from app.errors import ConfigError, StorageError
from app.scoring.formats import STRIDE, Format, Index
from app.scoring.storage import Input, Storage, storage_errors

PLAN = "_plan.json"
PLAN_VERSION = 1
DEFAULT_SHARD_ROWS = 10_000
# Rows that are sorted by length and cut into runs together.
WINDOW_ROWS = 2048


class Work(Struct, frozen=True, kw_only=True):
    """What must be the same in every process of a run. shards, shard_rows: as they were asked for, 0 if not.

    provider, batch_rows, batch_tokens, window_rows: which rows share a run, and where, can change the last digits of
    what a model answers.
    """

    plan_version: int = PLAN_VERSION
    model: str
    model_version: str
    digest: str
    provider: str
    batch_rows: int
    batch_tokens: int
    window_rows: int = WINDOW_ROWS
    file_format: str
    columns: list[str]
    id_column: str
    max_row_bytes: int
    shards: int
    shard_rows: int
    inputs: list[Input]


class Slice(Struct, frozen=True):
    """Consecutive rows of one input: `rows` of them from `first` on, which is `skip` rows behind `place`."""

    input: int
    first: int
    rows: int
    place: int
    skip: int


class Shard(Struct, frozen=True):
    """first: the number of its first row among all rows of all inputs."""

    first: int
    rows: int
    slices: list[Slice]


class Plan(Struct, frozen=True):
    """headers: of each input, what its format needs to read it from the middle."""

    work: Work
    rows: int
    headers: list[list[str]]
    shards: list[Shard]


def open_plan(work: Work, source: Storage, output: Storage, file_format: Format) -> Plan:
    """The plan in `output`; made, if there is none. Raises ConfigError if it is one of other work."""
    if PLAN not in (there := output.names()):
        if there - {"_tmp"}:
            raise ConfigError(f"OUTPUT: {output}: expected a folder with nothing in it, or with a {PLAN}")
        plan = make_plan(work, source, file_format)
        data = msgspec.json.encode(plan)
        if output.create_bytes(PLAN, data):
            # Two processes may be at one shard: that the second cannot replace what the first wrote must be so here.
            if output.create_bytes(PLAN, data):
                raise StorageError(
                    f"{output}: replaces what exists although told not to: it cannot hold a run's output"
                )
            return plan
    try:
        plan = msgspec.json.decode(output.read(PLAN), type=Plan)
    except msgspec.DecodeError:
        raise ConfigError(f"{output}/{PLAN}: not a plan of this version: score into another OUTPUT") from None
    for name in work.__struct_fields__:
        planned, found = getattr(plan.work, name), getattr(work, name)
        if planned != found:
            raise ConfigError(f"{output}/{PLAN}: {name}: {_difference(planned, found)}: score into another OUTPUT")
    return plan


def _difference(planned: Any, found: Any) -> str:
    if not isinstance(planned, list) or not isinstance(planned[0], Input):
        return f"planned {planned!r}, found {found!r}"
    if len(planned) != len(found):
        return f"planned {len(planned)}, found {len(found)}"
    one, other = next(pair for pair in zip(planned, found, strict=True) if pair[0] != pair[1])
    if one.path == other.path:
        return f"{one.path} has changed since the run began"
    return f"planned {one.path}, found {other.path}"


def make_plan(work: Work, source: Storage, file_format: Format) -> Plan:
    """Reads every input once, of Parquet only its footer. Raises ConfigError for one without the columns."""
    indexes = []
    for each in work.inputs:
        with storage_errors(each.path), source.open(each.path) as file:
            try:
                indexes.append(file_format.index(file, work.columns))
            except ConfigError as error:
                raise ConfigError(f"{each.path}: {error}") from None
    if work.file_format == "parquet" and len({tuple(index.header) for index in indexes}) > 1:
        raise ConfigError(f"{source}: expected the columns {work.columns} to have the same types in every file")
    total = sum(index.rows for index in indexes)
    if work.shards:
        cuts = [total * number // work.shards for number in range(work.shards + 1)]
    else:
        cuts = [*range(0, total, work.shard_rows or DEFAULT_SHARD_ROWS), total]
    shards = [Shard(first, end - first, _slices(indexes, first, end)) for first, end in pairwise(cuts)]
    return Plan(work, total, [index.header for index in indexes], shards)


def _slices(indexes: list[Index], first: int, end: int) -> list[Slice]:
    """Of the rows from number `first` up to `end`."""
    slices, begins = [], 0
    for number, index in enumerate(indexes):
        start, stop = max(first, begins), min(end, begins + index.rows)
        if start < stop:
            row = start - begins
            place, skip = (index.places[row // STRIDE], row % STRIDE) if index.places else (0, row)
            slices.append(Slice(number, row, stop - start, place, skip))
        begins += index.rows
    return slices
