"""Jobs as a worker sees them, against a real redis-server: one holder at a time, a true count, nothing lost."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.errors import Unavailable
from app.jobs import leases as module
from app.jobs.leases import Job, Leases
from app.jobs.queue import JobQueue
from app.settings import Settings
from tests.redis_server import RedisServer
from tests.unit.http.asgi import PATIENCE_SECONDS, until

TEXTS = ["a fine day"]
# Longer than any test: what ends a lease here is `age`.
LEASE_SECONDS = 3600


class Workers:
    """Leases of several workers, and who submits jobs."""

    def __init__(self, redis: RedisServer) -> None:
        settings = Settings(queue_url=redis.url, job_lease_seconds=LEASE_SECONDS, job_result_seconds=1000)
        self.redis, self.client = redis, redis.client
        self.queue = JobQueue(settings)
        self.one, self.other = Leases(settings), Leases(settings)

    async def take(self, leases: Leases, count: int = 10) -> list[Job]:
        """What the worker gets, as soon as it gets anything."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not (jobs := await leases.take(count)):
                pass
        return jobs

    def pending(self) -> list[dict]:
        return self.client.xpending_range("jobs", "workers", "-", "+", 1000)

    def age(self, seconds: int = 2 * LEASE_SECONDS) -> None:
        """As if nobody had renewed a lease for so long."""
        for each in self.pending():
            name, entry = each["consumer"], each["message_id"]
            self.client.xclaim("jobs", "workers", name, 0, [entry], idle=seconds * 1000, justid=True)

    def consumers(self) -> set[bytes]:
        return {each["name"] for each in self.client.xinfo_consumers("jobs", "workers")}


@pytest.fixture
async def workers(redis_server: RedisServer) -> AsyncIterator[Workers]:
    workers = Workers(redis_server)
    await workers.one.join()
    yield workers
    for leases in (workers.one, workers.other):
        await leases.leave()
    await workers.queue._redis.aclose()


async def test_a_job_is_one_workers_and_gone_when_it_is_finished(workers: Workers) -> None:
    job_id = await workers.queue.submit(TEXTS, None)
    (job,) = await workers.take(workers.one)
    assert await workers.other.take(10) == []
    seconds = await workers.one.finish(job, "done", b"[]")
    assert seconds is not None
    assert seconds >= 0
    assert (workers.client.xlen("jobs"), workers.pending()) == (0, [])
    assert await workers.one.finish(job, "failed", b"twice") is None
    assert await workers.queue.status(job_id) == ("done", b"[]")


async def test_what_was_submitted_before_any_worker_is_there_for_the_first(redis_server: RedisServer) -> None:
    workers = Workers(redis_server)
    ids = [await workers.queue.submit(TEXTS, None) for _ in range(3)]
    await workers.one.join()
    await workers.other.join()
    assert [job.id for job in await workers.take(workers.one)] == ids
    for leases in (workers.one, workers.other):
        await leases.leave()
    await workers.queue._redis.aclose()


async def test_a_lease_that_ended_is_the_next_workers_who_alone_can_write(workers: Workers) -> None:
    job_id = await workers.queue.submit(TEXTS, None)
    (lost,) = await workers.take(workers.one)
    workers.age()
    (taken,) = await workers.take(workers.other)
    assert (taken.entry, taken.deliveries) == (lost.entry, 2)
    assert await workers.one.finish(lost, "done", b'["late"]') is None
    assert (await workers.queue.status(job_id)).status == "running"
    assert workers.client.exists("jobs:dead") == 0
    assert await workers.other.finish(taken, "done", b"[]") is not None
    assert (await workers.queue.status(job_id)).content == b"[]"


async def test_renewing_begins_a_lease_anew_and_is_no_delivery(workers: Workers) -> None:
    await workers.queue.submit(TEXTS, None)
    (job,) = await workers.take(workers.one)
    workers.age()
    await workers.one.renew([job.entry])
    (pending,) = workers.pending()
    assert pending["times_delivered"] == 1
    assert pending["time_since_delivered"] < LEASE_SECONDS * 1000
    assert await workers.other.take(10) == []


async def test_renewing_takes_nothing_back_from_who_has_it_now(workers: Workers) -> None:
    await workers.queue.submit(TEXTS, None)
    (job,) = await workers.take(workers.one)
    workers.age()
    await workers.take(workers.other)
    await workers.one.renew([job.entry, "1-1"])
    assert await workers.one.finish(job, "done", b"[]") is None


async def test_who_leaves_gives_back_all_it_has_and_its_name_goes(workers: Workers) -> None:
    ids = [await workers.queue.submit(TEXTS, None) for _ in range(5)]
    await workers.take(workers.one, 5)
    before = workers.consumers()
    await workers.one.leave()
    assert {(await workers.queue.status(job_id)).status for job_id in ids} == {"queued"}
    assert workers.consumers() & before == set()
    jobs = await workers.take(workers.other, 5)
    assert [(job.id, job.deliveries) for job in jobs] == [(job_id, 2) for job_id in ids]


async def test_more_leases_than_one_look_sees_are_all_taken_over(workers: Workers) -> None:
    ids = [await workers.queue.submit(TEXTS, None) for _ in range(60)]
    await workers.take(workers.one, 60)
    workers.age()
    taken: list[str] = []
    while len(taken) < len(ids):
        taken += [job.id for job in await workers.take(workers.other, 7)]
    assert taken == ids


async def test_names_of_workers_that_were_killed_are_forgotten_but_not_with_what_they_hold(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await workers.queue.submit(TEXTS, None)
    await workers.take(workers.other)
    workers.client.xgroup_createconsumer("jobs", "workers", "killed")
    assert b"killed" in workers.consumers()
    monkeypatch.setattr(module, "FORGET_SECONDS", -1)
    await workers.one.join()
    assert b"killed" not in workers.consumers()
    assert len(workers.pending()) == 1


async def test_a_dead_letter_says_which_job_and_why_and_nothing_of_its_texts(workers: Workers) -> None:
    job_id = await workers.queue.submit(["a secret"], None)
    (job,) = await workers.take(workers.one)
    await workers.one.finish(job, "failed", b"why", "RunFailed")
    ((_, letter),) = workers.client.xrange("jobs:dead")
    assert letter == {b"id": job_id.encode(), b"reason": b"RunFailed", b"deliveries": b"1"}
    assert await workers.queue.status(job_id) == ("failed", b"why")


@pytest.mark.parametrize("fields", [{"x": "y"}, {"id": "7", "texts": "{"}, {"id": b"\xff", "texts": b"\xff"}])
async def test_an_entry_that_is_no_job_is_one_without_texts(workers: Workers, fields: dict) -> None:
    workers.client.xadd("jobs", fields)
    (job,) = await workers.take(workers.one)
    assert job.texts == []
    assert await workers.one.finish(job, "failed", b"no") is not None
    assert workers.client.xlen("jobs") == 0


async def test_a_redis_that_is_full_takes_no_job_and_lets_go_of_those_it_has(workers: Workers) -> None:
    job_id = await workers.queue.submit(TEXTS, None)
    workers.client.config_set("maxmemory", 1)
    with pytest.raises(Unavailable):
        await workers.queue.submit(TEXTS, None)
    (job,) = await workers.take(workers.one)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await workers.one.finish(job, "done", b"[]")
    assert (await workers.queue.status(job_id)).status == "done"
    assert workers.client.xlen("jobs") == 0


async def test_after_redis_has_lost_everything_jobs_are_taken_again(workers: Workers) -> None:
    await workers.queue.submit(TEXTS, None)
    (lost,) = await workers.take(workers.one)
    workers.client.flushall()
    assert await workers.one.finish(lost, "done", b"[]") is None
    assert workers.client.keys() == []
    await workers.one.renew([lost.entry])
    job_id = await workers.queue.submit(TEXTS, None)
    assert [job.id for job in await workers.take(workers.one)] == [job_id]


async def test_what_is_finished_while_redis_is_away_is_written_when_it_is_back(workers: Workers) -> None:
    job_id = await workers.queue.submit(TEXTS, None)
    (job,) = await workers.take(workers.one)
    workers.redis.kill()
    finishing = asyncio.create_task(workers.one.finish(job, "done", b"[]"))
    renewing = asyncio.create_task(workers.one.renew([job.entry]))
    taking = asyncio.create_task(workers.take(workers.other))
    await until(lambda: workers.one._away and workers.other._away)
    assert not finishing.done()
    workers.redis.start()
    assert await finishing is not None
    await renewing
    assert (await workers.queue.status(job_id)).status == "done"
    next_id = await workers.queue.submit(TEXTS, None)
    assert [job.id for job in await taking] == [next_id]
