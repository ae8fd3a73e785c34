"""Jobs as a worker sees them: taken with a lease, renewed, answered by whoever holds it, or given back.

The lease is the time since an entry of the group was last delivered or renewed, the count of its deliveries is Redis'
own. Knows no model.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast
from uuid import uuid4

import msgspec
from redis.asyncio.retry import Retry
from redis.backoff import DecorrelatedJitterBackoff
from redis.exceptions import RedisError

from app.jobs.queue import DEAD_LETTERS, GROUP, PREFIX, STREAM, connect, end
from app.settings import Settings
from app.telemetry.logging import logger

TEXTS = msgspec.json.Decoder(list[str])
TRACE = msgspec.json.Decoder(dict[str, str])
# How long a read waits for jobs: a worker that is told to end lets it come to its end, since Redis could still deliver
# to one that was given up.
BLOCK_SECONDS = 1.0
BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 10
# Of a consumer without entries, after which its name is forgotten: its worker was killed.
FORGET_SECONDS = 3600
T = TypeVar("T")

# KEYS: stream. ARGV: consumer, lease in ms, where to go on, how many.
TAKE_OVER = """
local found, jobs = redis.call('XAUTOCLAIM', KEYS[1], 'workers', ARGV[1], ARGV[2], ARGV[3], 'COUNT', ARGV[4]), {}
for _, entry in ipairs(found[2]) do
    local pending = redis.call('XPENDING', KEYS[1], 'workers', entry[1], entry[1], 1)[1]
    jobs[#jobs + 1] = {entry[1], entry[2], pending[4]}
end
return {found[1], jobs}
"""
# A lease that another worker has by now is left alone. JUSTID keeps the count of deliveries. ARGV: consumer, entries.
RENEW = """
for index = 2, #ARGV do
    if redis.pcall('XPENDING', KEYS[1], 'workers', ARGV[index], ARGV[index], 1, ARGV[1])[1] then
        redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], 0, ARGV[index], 'JUSTID')
    end
end
"""
# KEYS: stream, job, dead letters. Answers milliseconds since submission, or -1 if the lease is another's. However full
# Redis' memory is: in the end it needs less.
FINISH = """#!lua flags=allow-oom
local consumer, entry, status, content, seconds, id, reason, deliveries = unpack(ARGV)
if not redis.pcall('XPENDING', KEYS[1], 'workers', entry, entry, 1, consumer)[1] then return -1 end
redis.call('HSET', KEYS[2], 'status', status, 'content', content)
redis.call('EXPIRE', KEYS[2], seconds)
local key = redis.call('HGET', KEYS[2], 'key')
if key then redis.call('EXPIRE', key, seconds) end
if reason ~= '' then redis.call('XADD', KEYS[3], '*', 'id', id, 'reason', reason, 'deliveries', deliveries) end
redis.call('XACK', KEYS[1], 'workers', entry)
redis.call('XDEL', KEYS[1], entry)
local now = redis.call('TIME')
return now[1] * 1000 + math.floor(now[2] / 1000) - entry:match('^%d+')
"""
# All that a consumer holds becomes nobody's, old enough to be taken, its deliveries as they were. Its name goes.
LEAVE = """
local held = redis.pcall('XPENDING', KEYS[1], 'workers', '-', '+', 1000000, ARGV[1])
if held.err then return 0 end
for _, pending in ipairs(held) do
    redis.call('XCLAIM', KEYS[1], 'workers', 'released', 0, pending[1], 'IDLE', ARGV[2], 'JUSTID')
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'workers', ARGV[1])
return #held
"""
FORGET = """
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], 'workers')) do
    if consumer[4] == 0 and consumer[6] > tonumber(ARGV[1]) then
        redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'workers', consumer[2])
    end
end
"""


class Job(NamedTuple):
    """deliveries: this one included. texts: none if they cannot be read. trace: which one it is part of."""

    entry: str
    id: str
    texts: Sequence[str]
    deliveries: int
    trace: Mapping[str, str]


class Leases:
    """Of one worker. What it asks of Redis is asked until that answers, however long that takes."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError."""
        # Never a name again that was there before: a lease would look like this worker's own.
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._lease_ms = int(settings.job_lease_seconds * 1000)
        self._result_seconds = settings.job_result_seconds
        self._redis = connect(settings)
        self._take_over, self._renew, self._finish, self._leave, self._forget = map(
            self._redis.register_script, (TAKE_OVER, RENEW, FINISH, LEAVE, FORGET)
        )
        self._cursor, self._next_look = b"0-0", 0.0
        self._away = False

    async def join(self) -> None:
        """Makes sure that the group is there, with all that was submitted before it was."""
        await self._insist(self._join)

    async def _join(self) -> None:
        try:
            await self._redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except RedisError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        await self._forget([STREAM], [FORGET_SECONDS * 1000])

    async def take(self, count: int) -> list[Job]:
        """Up to `count` jobs: first those whose lease ended, then new ones; none if no job comes within a second."""
        if time.monotonic() >= self._next_look:
            arguments: list[Any] = [self._consumer, self._lease_ms, self._cursor, count]
            self._cursor, found = await self._insist(partial(self._take_over, [STREAM], arguments))
            if self._cursor == b"0-0":
                self._next_look = time.monotonic() + BLOCK_SECONDS
            if found:
                return [_job(entry, dict(zip(fields[::2], fields[1::2], strict=True)), n) for entry, fields, n in found]
        block_ms = int(BLOCK_SECONDS * 1000)
        read = partial(self._redis.xreadgroup, GROUP, self._consumer, {STREAM: ">"}, count=count, block=block_ms)
        streams = cast("list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]", await self._insist(read))
        return [_job(entry, fields, 1) for _, entries in streams for entry, fields in entries]

    async def renew(self, entries: Sequence[str]) -> None:
        """Begins their leases anew, if they are still this worker's."""
        await self._insist(partial(self._renew, [STREAM], [self._consumer, *entries]))

    async def finish(self, job: Job, status: str, content: bytes, dead_letter: str = "") -> float | None:
        """Writes a result and removes the job: seconds since it was submitted, or None, and nothing written, if the
        lease is another's. dead_letter: why it goes to the dead letters, as an error's class; none if it does not."""
        keys = [STREAM, PREFIX + job.id, DEAD_LETTERS]
        outcome = (status, content, self._result_seconds, job.id, dead_letter, job.deliveries)
        elapsed_ms = await self._insist(partial(self._finish, keys, [self._consumer, job.entry, *outcome]))
        return None if elapsed_ms < 0 else elapsed_ms / 1000

    async def leave(self) -> None:
        """Gives back what it holds, for others to take at once. If Redis is away, they take it when the lease ends."""
        leaving = asyncio.ensure_future(self._leave([STREAM], [self._consumer, self._lease_ms]))
        await asyncio.wait([leaving], timeout=BLOCK_SECONDS)
        await end([leaving])
        await self._redis.aclose()

    async def _insist(self, ask: Callable[[], Awaitable[T]]) -> T:
        # For ever, as libraries' other kinds of backoff do not: 2 to the number of failures is soon beyond a float.
        backoff = DecorrelatedJitterBackoff(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS)
        answer = await Retry(backoff, -1, (RedisError,)).call_with_retry(ask, self._on_error)
        if self._away:
            self._away = False
            logger().info("the queue answers")
        return answer

    async def _on_error(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            logger().warning("the queue does not answer", error_type=type(error).__name__)
        if "NOGROUP" in str(error):  # Redis has lost what it had
            with suppress(RedisError):
                await self._join()


def _job(entry: bytes, fields: dict[bytes, bytes], deliveries: int) -> Job:
    try:
        texts = TEXTS.decode(fields.get(b"texts", b""))
    except (msgspec.DecodeError, UnicodeDecodeError):  # not from a gateway
        texts = []
    try:
        trace = TRACE.decode(fields.get(b"trace", b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        trace = {}
    return Job(str(entry, "ascii"), str(fields.get(b"id", b""), "ascii", "replace"), texts, deliveries, trace)
