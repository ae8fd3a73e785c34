"""Jobs in a stream of Redis or Valkey, as who submits them and asks for them sees it. Knows no model and no HTTP.

A job is an entry of the stream until it is done, and a hash until its result expires. Each step is one script, and so
happens whole or not at all; its keys are in several slots, so Redis Cluster will not do.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from math import nan
from typing import Any, NamedTuple
from uuid import uuid4

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from app.errors import ConfigError, Invalid, NotFound, Unavailable
from app.settings import Settings
from app.telemetry.logging import logger
from app.telemetry.metrics import QueueMetrics

# As the scripts have them. Their consumer `released` holds what was given back.
STREAM, GROUP, DEAD_LETTERS, PREFIX = "jobs", "workers", "jobs:dead", "jobs:job:"
JOB_ID = re.compile(r"[0-9a-f]{32}")
CONNECTIONS, TIMEOUT_SECONDS = 64, 5
POLL_SECONDS, END_SECONDS = 1.0, 0.1
FULL_RETRY_SECONDS = 5

# A job that is known is answered even where no other would be taken: by its key, or by its id where the answer to the
# first try was lost. KEYS: stream, job, and the idempotency key if there is one.
SUBMIT = """
local id, texts, digest, most, trace = unpack(ARGV)
local known = KEYS[3] and redis.call('GET', KEYS[3]) or id
local before = redis.call('HGET', 'jobs:job:' .. known, 'digest')
if before then return {before == digest and 'known' or 'other', known} end
if redis.call('XLEN', KEYS[1]) >= tonumber(most) then return {'full', ''} end
local entry = redis.call('XADD', KEYS[1], '*', 'id', id, 'texts', texts, 'trace', trace)
redis.call('HSET', KEYS[2], 'status', 'queued', 'entry', entry, 'digest', digest)
if KEYS[3] then
    redis.call('SET', KEYS[3], id)
    redis.call('HSET', KEYS[2], 'key', KEYS[3])
end
return {'new', id}
"""
# What is delivered to a worker runs; nothing is written for that, and so nothing can be wrong after a crash.
STATUS = """
local status, content, entry = unpack(redis.call('HMGET', KEYS[2], 'status', 'content', 'entry'))
if status == 'queued' then
    local pending = redis.pcall('XPENDING', KEYS[1], 'workers', entry, entry, 1)
    if pending[1] and pending[1][2] ~= 'released' then status = 'running' end
end
return {status, content}
"""
# Ages are on Redis' clock, as the ids of entries are.
STATE = """
local oldest, now = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1], redis.call('TIME')
local age = oldest and now[1] * 1000 + math.floor(now[2] / 1000) - oldest[1]:match('^%d+') or 0
return {redis.call('XLEN', KEYS[1]), age}
"""


class JobStatus(NamedTuple):
    """status: `queued`, `running`, `done` or `failed`. content: predictions as JSON, or why it failed."""

    status: str
    content: bytes


def connect(settings: Settings) -> Redis:
    """A client, which connects when it is first asked. Raises ConfigError, which does not quote the URL."""
    options: dict[str, Any] = {
        "max_connections": CONNECTIONS,
        "timeout": TIMEOUT_SECONDS,
        "socket_timeout": TIMEOUT_SECONDS,
        "socket_connect_timeout": TIMEOUT_SECONDS,
        # A connection that broke while nobody used it. All that is asked may be asked twice.
        "retry": Retry(ConstantBackoff(0.01), 1),
        # Replies of one shape, whatever release of the library it is.
        "protocol": 2,
    }
    try:
        return Redis.from_pool(BlockingConnectionPool.from_url(settings.queue_url.get_secret_value(), **options))
    except ValueError:  # it may quote a password
        wanted = "redis://[USER:PASSWORD@]HOST:PORT/0 or rediss://…, a password with special characters in % form"
        raise ConfigError(f"APP_QUEUE_URL: expected {wanted}") from None


class JobQueue:
    """Raises Unavailable while Redis does not answer."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError."""
        self._redis = connect(settings)
        self._max_jobs = settings.max_jobs
        self._submit, self._status, self._state = map(self._redis.register_script, (SUBMIT, STATUS, STATE))

    async def submit(self, texts: list[str], key: str | None, trace: Mapping[str, str] | None = None) -> str:
        """The id of a new job, or of the one that came with the same idempotency key. trace: for its worker.
        Raises Invalid if the job with that key had other texts, Unavailable if the queue is full."""
        job_id, content = uuid4().hex, msgspec.json.encode(texts)
        keys = [STREAM, PREFIX + job_id]
        if key is not None:
            keys.append(f"jobs:key:{hashlib.sha256(key.encode()).hexdigest()}")
        arguments = (
            job_id,
            content,
            hashlib.sha256(content).hexdigest(),
            self._max_jobs,
            msgspec.json.encode(trace or {}),
        )
        outcome, found = await _answer(self._submit(keys, arguments))
        if outcome == b"full":
            raise Unavailable("the queue of jobs is full", "queue_full", FULL_RETRY_SECONDS)
        if outcome == b"other":
            raise Invalid("idempotency-key: came before with other texts; a new job takes a new key")
        return str(found, "ascii")

    async def status(self, job_id: str) -> JobStatus:
        """How far a job is. Raises NotFound."""
        found = JOB_ID.fullmatch(job_id) and await _answer(self._status([STREAM, PREFIX + job_id]))
        if not found or not found[0]:
            raise NotFound("no such job, or its result has expired")
        return JobStatus(str(found[0], "ascii"), found[1] or b"")

    @asynccontextmanager
    async def watched(self, metrics: QueueMetrics, on_answer: Callable[[bool], None]) -> AsyncIterator[None]:
        """Meanwhile it is measured every second, and `on_answer` told whether it answers. Then its connections end."""
        watching = asyncio.create_task(self._watch(metrics, on_answer))
        try:
            yield
        finally:
            await end([watching])
            await self._redis.aclose()

    async def _watch(self, metrics: QueueMetrics, on_answer: Callable[[bool], None]) -> None:
        answers = None
        while True:
            try:
                backlog, age_ms = await self._state([STREAM])
                error = None
            except RedisError as caught:
                backlog, age_ms, error = nan, nan, type(caught).__name__
            metrics.backlog.set(backlog)
            metrics.oldest_age.set(age_ms / 1000)
            if answers is not (error is None):
                answers = error is None
                log = logger().info if answers else logger().warning
                log("the queue answers" if answers else "the queue does not answer", error_type=error)
            on_answer(answers)
            await asyncio.sleep(POLL_SECONDS)


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks that ask Redis, until they have ended: `asyncio.wait_for`, in which the library sends, may take no
    notice of a cancellation before Python 3.12."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=END_SECONDS)
        for task in ended:
            task.cancelled() or task.exception()  # looked at, or it is complained about


async def _answer(asked: Awaitable[Any]) -> Any:
    try:
        return await asked
    except RedisError:
        raise Unavailable("the queue of jobs does not answer", "not_ready") from None
