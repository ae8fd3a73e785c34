"""What the engine makes of a worker's messages, beside a channel whose other side is the test."""

import asyncio

import pytest

from app.multiprocess.channel import Ask, Failed, Part, Submit
from app.multiprocess.engine import Engine
from app.multiprocess.metrics import Family, Snapshot
from app.multiprocess.workers import Worker
from app.runtime.tasks import Encoded
from app.settings import Settings
from app.telemetry.metrics import Metrics, Statistics


class Sent:
    """A channel that only remembers, with an answer from before."""

    def __init__(self, last_answer: Snapshot | None) -> None:
        self.messages: list[object] = []
        self.last_answer = last_answer

    def send(self, message: object) -> None:
        self.messages.append(message)


def worker(last_answer: Snapshot | None = None) -> Worker:
    made = Worker(process=None)
    made.channel = Sent(last_answer)
    return made


@pytest.fixture
async def engine() -> Engine:
    return Engine(Settings(http_processes=2), Metrics(()))


async def test_a_request_that_comes_before_the_model_is_refused(engine):
    early = worker()
    engine._hear(early, Submit(3, [Encoded([1], 1)], 1.0))
    (refusal,) = early.channel.messages
    assert isinstance(refusal, Failed)
    assert (refusal.id, refusal.error, refusal.reason) == (3, "Unavailable", "not_ready")


async def test_what_a_worker_that_has_ended_or_hangs_last_counted_stays_in_the_sum(engine):
    workers = [
        worker(Snapshot([Family("a", "", "counter", [("a_total", {}, 2.0)])], Statistics(runs=n))) for n in (1, 2)
    ]
    engine._workers = [*workers, worker()]
    engine._hear(workers[0], Ask(9))
    while not workers[0].channel.messages:
        await asyncio.sleep(0)
    (part,) = workers[0].channel.messages
    assert isinstance(part, Part)
    assert (part.id, part.snapshot.statistics.runs) == (9, 3)
    assert [family.samples for family in part.snapshot.families if family.name == "a"] == [[("a_total", {}, 4.0)]]
