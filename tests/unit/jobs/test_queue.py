"""Jobs as who submits them sees them, with a real redis-server: once each, never too many, known until they expire."""

import asyncio
from collections.abc import AsyncIterator
from math import isnan
from uuid import UUID

import pytest
from prometheus_client import CollectorRegistry

from app.errors import ConfigError, Invalid, NotFound, Unavailable
from app.jobs import queue as module
from app.jobs.leases import Leases
from app.jobs.queue import JobQueue
from app.settings import Settings
from app.telemetry.metrics import QueueMetrics
from tests.redis_server import RedisServer
from tests.unit.http.asgi import until

TEXTS = ["a fine day", "a “bad” one\n"]


def metrics() -> QueueMetrics:
    return QueueMetrics(CollectorRegistry())


@pytest.fixture
async def queue(redis_server: RedisServer) -> AsyncIterator[JobQueue]:
    queue = JobQueue(Settings(queue_url=redis_server.url, max_jobs=10, job_result_seconds=1000))
    async with queue.watched(metrics(), lambda _: None):
        yield queue


@pytest.fixture
async def leases(redis_server: RedisServer) -> AsyncIterator[Leases]:
    leases = Leases(Settings(queue_url=redis_server.url, job_result_seconds=1000))
    await leases.join()
    yield leases
    await leases.leave()


async def test_a_job_is_queued_then_running_then_done(queue: JobQueue, leases: Leases) -> None:
    job_id = await queue.submit(TEXTS, None)
    assert (await queue.status(job_id)).status == "queued"
    (job,) = await leases.take(5)
    assert (job.id, job.texts, job.deliveries) == (job_id, TEXTS, 1)
    assert (await queue.status(job_id)).status == "running"
    await leases.finish(job, "done", b"[1]")
    assert await queue.status(job_id) == ("done", b"[1]")


async def test_a_job_is_queued_where_no_worker_has_ever_been(queue: JobQueue) -> None:
    assert (await queue.status(await queue.submit(TEXTS, None))).status == "queued"


async def test_one_key_with_the_same_texts_is_one_job_however_often_and_however_far_it_is(
    queue: JobQueue, leases: Leases, redis_server: RedisServer
) -> None:
    ids = set(await asyncio.gather(*(queue.submit(TEXTS, "a key") for _ in range(20))))
    assert redis_server.client.xlen("jobs") == len(ids) == 1
    (job,) = await leases.take(5)
    ids.add(await queue.submit(TEXTS, "a key"))
    await leases.finish(job, "done", b"[]")
    ids.add(await queue.submit(TEXTS, "a key"))
    assert ids == {job.id}
    assert redis_server.client.xlen("jobs") == 0


async def test_without_a_key_or_with_another_the_same_texts_are_another_job(queue: JobQueue) -> None:
    keys = (None, None, "one", "two")
    assert len({await queue.submit(TEXTS, key) for key in keys}) == len(keys)


async def test_a_key_that_came_with_other_texts_is_refused_and_changes_nothing(
    queue: JobQueue, redis_server: RedisServer
) -> None:
    job_id = await queue.submit(TEXTS, "a key")
    with pytest.raises(Invalid, match="idempotency-key"):
        await queue.submit(TEXTS[:1], "a key")
    assert redis_server.client.xlen("jobs") == 1
    assert await queue.submit(TEXTS, "a key") == job_id


async def test_a_submission_that_is_sent_again_because_its_answer_was_lost_is_one_job(
    queue: JobQueue, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "uuid4", lambda: UUID(int=7))
    assert await queue.submit(TEXTS, None) == await queue.submit(TEXTS, None)
    assert redis_server.client.xlen("jobs") == 1


async def test_a_full_queue_takes_no_more_and_forgets_nothing(queue: JobQueue, redis_server: RedisServer) -> None:
    first = await queue.submit(TEXTS, "a key")
    results = await asyncio.gather(*(queue.submit(TEXTS, None) for _ in range(30)), return_exceptions=True)
    refused = [each for each in results if isinstance(each, Unavailable)]
    assert len(refused) == 21
    assert {each.reason for each in refused} == {"queue_full"}
    assert all((each.retry_after_seconds or 0) >= 1 for each in refused)
    assert redis_server.client.xlen("jobs") == 10
    assert await queue.submit(TEXTS, "a key") == first


async def test_what_runs_counts_against_the_bound(queue: JobQueue, leases: Leases) -> None:
    for _ in range(10):
        await queue.submit(TEXTS, None)
    jobs = await leases.take(10)
    with pytest.raises(Unavailable):
        await queue.submit(TEXTS, None)
    await leases.finish(jobs[0], "done", b"[]")
    await queue.submit(TEXTS, None)


async def test_a_job_and_its_key_expire_together_and_not_before_it_is_done(
    queue: JobQueue, leases: Leases, redis_server: RedisServer
) -> None:
    client, job_id = redis_server.client, await queue.submit(TEXTS, "a key")
    held = {name: client.ttl(name) for name in client.keys("jobs:*")}
    assert len(held) == 2
    assert set(held.values()) == {-1}
    (job,) = await leases.take(5)
    await leases.finish(job, "done", b"[]")
    assert all(0 < client.ttl(name) <= 1000 for name in held)
    for name in held:
        client.pexpire(name, 1)
    await until(lambda: not client.exists(*held))
    with pytest.raises(NotFound):
        await queue.status(job_id)
    assert await queue.submit(TEXTS, "a key") != job_id


@pytest.mark.parametrize("job_id", ["0123456789abcdef" * 2, "dead", "", "0" * 31, "A" * 32, "../jobs", "\n" + "0" * 32])
async def test_an_id_that_is_no_jobs_is_not_found(queue: JobQueue, job_id: str) -> None:
    with pytest.raises(NotFound):
        await queue.status(job_id)


async def test_neither_key_nor_id_of_a_job_says_what_is_in_it(queue: JobQueue, redis_server: RedisServer) -> None:
    await queue.submit(TEXTS, "order 17")
    assert not any(b"order" in name for name in redis_server.client.scan_iter())


async def test_backlog_and_age_count_what_waits_and_what_runs(
    queue: JobQueue, leases: Leases, redis_server: RedisServer
) -> None:
    seen = metrics()
    async with JobQueue(Settings(queue_url=redis_server.url)).watched(seen, lambda _: None):
        for _ in range(3):
            await queue.submit(TEXTS, None)
        jobs = await leases.take(2)
        await until(lambda: seen.backlog._value.get() == 3 and seen.oldest_age._value.get() > 0)
        for job in jobs:
            await leases.finish(job, "done", b"[]")
        await until(lambda: seen.backlog._value.get() == 1)
        for job in await leases.take(1):
            await leases.finish(job, "done", b"[]")
        await until(lambda: seen.backlog._value.get() == seen.oldest_age._value.get() == 0)


async def test_while_redis_is_away_nothing_is_taken_and_the_backlog_is_unknown(redis_server: RedisServer) -> None:
    heard: list[bool] = []
    seen, queue = metrics(), JobQueue(Settings(queue_url=redis_server.url))
    async with queue.watched(seen, heard.append):
        job_id = await queue.submit(TEXTS, None)
        await until(lambda: heard)
        redis_server.kill()
        for asked in (queue.submit(TEXTS, None), queue.status(job_id)):
            with pytest.raises(Unavailable) as caught:
                await asked
            assert caught.value.reason == "not_ready"
        await until(lambda: not heard[-1])
        assert isnan(seen.backlog._value.get())
        assert isnan(seen.oldest_age._value.get())
        redis_server.start()
        await until(lambda: heard[-1])
        assert (await queue.status(job_id)).status == "queued"
        assert heard[0]


async def test_watching_ends_whatever_it_is_at(redis_server: RedisServer) -> None:
    for turns in range(30):
        async with JobQueue(Settings(queue_url=redis_server.url)).watched(metrics(), lambda _: None):
            for _ in range(turns):
                await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, turns


@pytest.mark.parametrize(
    "url", ["", "hush", "http://:hush@localhost", "redis://:hush/hush@localhost:1", "redis://:hush#hush@a:hush"]
)
def test_a_url_that_is_none_is_a_setting_that_is_wrong_and_is_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="APP_QUEUE_URL") as caught:
        JobQueue(Settings(queue_url=url))
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
