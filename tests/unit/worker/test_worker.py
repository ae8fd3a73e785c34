"""A worker with a real model and a real redis-server: what it takes at once, and what becomes of jobs that fail."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.batching.admission import Limits
from app.batching.batcher import Batcher
from app.jobs.leases import Leases
from app.jobs.queue import JobQueue
from app.lifecycle import Lifecycle, count_batch
from app.predictor import Predictor
from app.runtime.loading import load_model
from app.runtime.session import Model
from app.settings import Settings
from app.telemetry.metrics import JobMetrics, Metrics
from app.worker import worker as module
from app.worker.worker import Worker
from tests.redis_server import RedisServer
from tests.text_model import POISON, text_model
from tests.unit.http.asgi import HeldModel, held, until

ROWS = 4
LIMITS = Limits(runners=1, batch_rows=ROWS, batch_tokens=512, queue_rows=1000)
MAX_DELIVERIES = 2


class Working:
    """A worker, and who submits jobs to it."""

    def __init__(self, redis: RedisServer, model: Model) -> None:
        settings = Settings(queue_url=redis.url, job_max_deliveries=MAX_DELIVERIES, job_lease_seconds=3600)
        metrics = Metrics(())
        self.registry, self.client = metrics.registry, redis.client
        self.queue = JobQueue(settings)
        self.lifecycle = Lifecycle(settings, metrics)
        self.batcher = Batcher(model.run, LIMITS, model.tokens_per_second, partial(count_batch, metrics))
        self.predictor = Predictor(model, self.batcher, metrics)
        self.leases = Leases(settings)
        self.worker = Worker(settings, self.leases, self.lifecycle, JobMetrics(self.registry))

    async def start(self) -> None:
        self.batcher.start()
        self.worker.start(self.predictor)
        await until(lambda: self.lifecycle.ready)

    async def close(self) -> None:
        self.lifecycle.drain()
        await self.worker.close()
        await asyncio.to_thread(self.batcher.close)
        await self.queue._redis.aclose()

    def sample(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def pending(self) -> int:
        return self.client.xpending("jobs", "workers")["pending"]

    def deliver_again(self) -> None:
        """As when a lease ends: the worker looks at those after a while by itself."""
        for each in self.client.xpending_range("jobs", "workers", "-", "+", 1000):
            entry, name = each["message_id"], each["consumer"]
            self.client.xclaim("jobs", "workers", name, 0, [entry], idle=10_000_000, justid=True)

    async def ended(self, job_id: str) -> tuple[str, Any]:
        """Status and content of a job, once it has any."""
        content = b""
        while not content:
            status, content = await self.queue.status(job_id)
            await asyncio.sleep(0.01)
        return status, content


@pytest.fixture
def reviews() -> Model:
    return load_model(text_model())


@pytest.fixture
async def working(request: pytest.FixtureRequest, redis_server: RedisServer, reviews: Model) -> AsyncIterator[Working]:
    """With the model that the test's `kind` makes of that of reviews."""
    kind = getattr(request, "param", lambda model: model)
    working = Working(redis_server, kind(reviews))
    yield working
    model = working.predictor.model
    if isinstance(model, HeldModel):
        model.opened.set()
    await working.close()


def failing(_: Model) -> Model:
    return load_model(text_model(poison=True))


async def test_jobs_are_answered_in_the_order_of_their_texts(working: Working) -> None:
    await working.start()
    status, content = await working.ended(await working.queue.submit(["good", "bad", "good " * 300], None))
    found = json.loads(content)
    assert status == "done"
    assert [each["label"] for each in found] == ["positive", "negative", "positive"]
    assert [each.get("truncated", False) for each in found] == [False, False, True]
    assert working.sample("jobs_total", outcome="done") == working.sample("job_duration_seconds_count") == 1
    assert working.lifecycle.stage == "ready"


@pytest.mark.parametrize("working", [held], indirect=True)
async def test_several_jobs_share_a_run_and_no_more_are_taken_than_keep_the_runners_busy(working: Working) -> None:
    jobs, model = 40, working.predictor.model
    ids = [await working.queue.submit(["good"], None) for _ in range(jobs)]
    await working.start()
    enough = module.BATCHES_HELD * ROWS
    await until(lambda: working.pending() >= enough)
    assert working.pending() == enough
    model.opened.set()
    for job_id in ids:
        assert (await working.ended(job_id))[0] == "done"
    assert working.sample("inference_batch_rows_sum") == jobs
    assert working.sample("inference_batch_rows_count") < jobs / 2


@pytest.mark.parametrize("working", [held], indirect=True)
async def test_of_large_jobs_fewer_are_taken(working: Working) -> None:
    for _ in range(10):
        await working.queue.submit(["good"] * 100, None)
    await working.start()
    await until(lambda: working.pending() > 0 and working.predictor.model.entered)
    assert working.pending() == 1


async def test_what_is_wrong_with_a_job_fails_it_at_once(working: Working) -> None:
    await working.start()
    job_id = await working.queue.submit([], None)
    assert await working.ended(job_id) == ("failed", b"texts: expected at least one")
    assert working.sample("jobs_total", outcome="failed") == 1
    assert working.client.exists("jobs:dead") == working.sample("job_redeliveries_total") == 0


@pytest.mark.parametrize("working", [failing], indirect=True)
async def test_a_job_that_the_model_fails_on_is_tried_again_then_a_dead_letter_and_in_nobodys_way(
    working: Working,
) -> None:
    await working.start()
    with capture_logs() as logs:
        poison = await working.queue.submit(["good", f"a secret {POISON}"], None)
        other = await working.queue.submit(["good"], None)
        assert (await working.ended(other))[0] == "done"
        await until(lambda: any(line.get("status") == "tried" for line in logs))
        assert (await working.queue.status(poison)).content == b""
        working.deliver_again()
        assert await working.ended(poison) == ("failed", b"the model failed on this input")
    ((_, letter),) = working.client.xrange("jobs:dead")
    assert letter == {b"id": poison.encode(), b"reason": b"RunFailed", b"deliveries": b"2"}
    assert working.sample("job_dead_letters_total") == working.sample("job_redeliveries_total") == 1
    assert working.client.xlen("jobs") == 0
    assert "secret" not in str(logs)


async def test_a_job_whose_workers_were_all_lost_is_a_dead_letter_that_is_not_tried_again(
    working: Working, redis_server: RedisServer
) -> None:
    poison = await working.queue.submit(["good"], None)
    settings = Settings(queue_url=redis_server.url, job_lease_seconds=3600)
    for _ in range(MAX_DELIVERIES):
        lost = Leases(settings)
        await lost.join()
        assert len(await lost.take(1)) == 1
        await lost._redis.aclose()
        working.deliver_again()
    await working.start()
    status, content = await working.ended(poison)
    assert (status, content) == ("failed", b"2 workers were lost while they had it")
    ((_, letter),) = working.client.xrange("jobs:dead")
    assert (letter[b"reason"], letter[b"deliveries"]) == (b"WorkerLost", b"3")
    assert working.sample("inference_batch_rows_count") == 0


@pytest.mark.parametrize("working", [held], indirect=True)
async def test_while_it_drains_nothing_more_is_taken_and_what_is_left_is_given_back(
    working: Working, redis_server: RedisServer
) -> None:
    first = await working.queue.submit(["good"] * 100, None)
    await working.start()
    await until(lambda: working.predictor.model.entered)
    assert working.lifecycle.in_flight == 1
    working.lifecycle.drain()
    second = await working.queue.submit(["good"], None)
    await working.worker.close()
    assert working.lifecycle.in_flight == 0
    assert {(await working.queue.status(each)).status for each in (first, second)} == {"queued"}
    other = Leases(Settings(queue_url=redis_server.url, job_lease_seconds=3600))
    taken = []
    while len(taken) < 2:
        taken += [(job.id, job.deliveries) for job in await other.take(10)]
    assert taken == [(first, 2), (second, 1)]
    await other.leave()


async def test_a_bug_in_a_worker_ends_it(working: Working, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Exception] = []
    monkeypatch.setattr(module, "exit_process", ended.append)

    async def broken(_: int) -> None:
        raise KeyError("a secret")

    monkeypatch.setattr(working.leases, "take", broken)
    with capture_logs() as logs:
        await working.start()
        await until(lambda: ended)
    assert "secret" not in str(logs)
    assert (str(ended[0]), ended[0].exit_code) == ("the worker failed: KeyError", 1)
