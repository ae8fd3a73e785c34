"""What a shard came to: its answers and bad rows staged, then created, and its marker. Knows neither rows nor models.

A shard counts when its marker is there. Nothing is replaced: of two processes at one shard the first wins, and what is
there is whole.
"""

from contextlib import ExitStack
from hashlib import file_digest, sha256
from typing import Any

import msgspec
from msgspec import Struct

from app.errors import TooManyBadRows
from app.scoring.formats import Answers, Format
from app.scoring.plan import PLAN, Plan
from app.scoring.storage import Storage
from app.telemetry import logging

MARKERS, BAD_ROWS, MANIFEST = "_markers", "_bad", "_manifest.json"


class Marker(Struct, frozen=True):
    """That a shard is done. bytes, sha256: of its output. rows: that were scored."""

    shard: int
    output: str
    bytes: int
    sha256: str
    rows: int
    bad_rows: int


class BadRow(Struct, frozen=True):
    """row: among all rows, as an answer's `id` counts them. row_of_input: within its file, from 0 on."""

    row: int
    input: str
    row_of_input: int
    reason: str


class RunManifest(Struct, frozen=True):
    """What a finished run has written."""

    model: str
    model_version: str
    digest: str
    plan_sha256: str
    rows: int
    bad_rows: int
    shards: list[Marker]


class ShardOutput:
    """Of one shard, in a staged file until `commit`."""

    def __init__(
        self,
        storage: Storage,
        shard: int,
        file_format: str,
        writer_of: Format,
        fields: dict[str, Any],
        max_bad_rows: int,
    ) -> None:
        self.shard = shard
        self._storage, self._max_bad_rows = storage, max_bad_rows
        self._name, self._format = f"shard-{shard:05}", file_format
        self._staging = ExitStack()
        self._file = self._staging.enter_context(storage.staged())
        self._writer = writer_of.writer(self._file, fields)
        self._rows = 0
        self._bad: list[BadRow] = []

    def refuse(self, bad: BadRow) -> None:
        """Notes a bad row."""
        self._bad.append(bad)

    def write(self, answers: Answers) -> None:
        """The next rows' answers. Raises TooManyBadRows if there are too many so far."""
        self._writer.write(answers)
        self._rows += len(answers)
        if len(self._bad) > self._max_bad_rows:
            first = min(self._bad, key=lambda each: each.row)
            raise TooManyBadRows(
                f"{self._name}: expected at most {self._max_bad_rows} bad rows, found more, the first in "
                f"{first.input}, row {first.row_of_input}: {first.reason}; --max-bad-rows allows more"
            )

    def close(self) -> None:
        """Leaves nothing behind."""
        self._staging.close()

    def commit(self) -> Marker:
        """Makes the shard count. Raises StorageError."""
        with self._staging:
            self._writer.close()
            self._file.seek(0)
            found = file_digest(self._file, "sha256").hexdigest(), self._file.tell()
            if self._bad:
                lines = msgspec.json.Encoder().encode_lines(sorted(self._bad, key=lambda each: each.row))
                self._storage.create_bytes(f"{BAD_ROWS}/{self._name}.jsonl", lines)
            name = f"{self._name}.{self._format}"
            if not self._storage.create(name, self._file):
                # By a process that is at the same shard, or was killed here. On another kind of CPU it may differ in
                # last digits.
                mine, found = found, self._storage.digest(name)
                if found != mine:
                    logging.logger().warning("another process answered otherwise; its output stays", output=name)
        marker, path = Marker(self.shard, name, found[1], found[0], self._rows, len(self._bad)), marker_path(self.shard)
        if not self._storage.create_bytes(path, msgspec.json.encode(marker)):
            marker = msgspec.json.decode(self._storage.read(path), type=Marker)
        return marker


def marker_path(shard: int) -> str:
    return f"{MARKERS}/shard-{shard:05}.json"


def shards_done(storage: Storage, plan: Plan) -> set[int]:
    """The shards that have their marker."""
    names = storage.names(MARKERS)
    return {shard for shard in range(len(plan.shards)) if marker_path(shard).removeprefix(f"{MARKERS}/") in names}


def finish(storage: Storage, plan: Plan) -> RunManifest | None:
    """Writes the manifest if every shard is done; None if not. Whoever marks the last shard comes to it."""
    shards = range(len(plan.shards))
    if len(shards_done(storage, plan)) < len(shards):
        return None
    found = storage.read_all([marker_path(shard) for shard in shards])
    markers = [msgspec.json.decode(each, type=Marker) for each in found]
    work, plan_sha256 = plan.work, sha256(storage.read(PLAN)).hexdigest()
    rows, bad_rows = sum(each.rows for each in markers), sum(each.bad_rows for each in markers)
    manifest = RunManifest(work.model, work.model_version, work.digest, plan_sha256, rows, bad_rows, markers)
    storage.create_bytes(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    storage.tidy()
    return manifest
