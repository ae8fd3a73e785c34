"""An HTTP worker's batcher, beside a channel whose other side is the test."""

import asyncio
import time
from math import inf

import pytest

from app.artifact.manifest import read_artifact
from app.batching.admission import Limits, QueueState
from app.errors import ArtifactError, DeadlineExceeded, RunFailed, TooManyRows, Unavailable
from app.multiprocess import remote
from app.multiprocess.channel import MAX_UNREAD_BYTES, Cancel, Done, Failed, Serve, State, Submit
from app.multiprocess.remote import RemoteBatcher, open_model
from app.runtime.tasks import Encoded
from app.runtime.tasks.text_classification import TextClassification
from app.settings import Settings
from tests.text_model import text_model

LIMITS = Limits(runners=2, batch_rows=8, batch_tokens=512, queue_rows=16, max_wait_seconds=0.5)
UNIT = Encoded([1, 2, 3], 3)


class Sent:
    """A channel that only remembers."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.unread_bytes = 0

    def send(self, message: object) -> None:
        self.messages.append(message)


@pytest.fixture
async def channel() -> Sent:
    return Sent()


@pytest.fixture
async def batcher(channel: Sent) -> RemoteBatcher:
    batcher = RemoteBatcher(channel, Serve("0" * 64, "cpu", LIMITS))
    batcher.start()
    return batcher


def later(seconds: float = 3600) -> float:
    return time.monotonic() + seconds


async def test_units_go_out_and_their_results_come_back(channel, batcher):
    deadline = later()
    pending = batcher.submit([UNIT, UNIT], deadline)
    (sent,) = channel.messages
    assert sent == Submit(sent.id, [UNIT, UNIT], deadline)
    batcher.done(Done(sent.id, ["a", "b"], pending.submitted + 1, pending.submitted + 3))
    assert await pending.future == ["a", "b"]
    assert (pending.queue_seconds, pending.inference_seconds) == pytest.approx((1, 2))
    await asyncio.sleep(0)
    assert channel.messages == [sent], "nothing to cancel"


async def test_answers_find_their_requests_in_any_order(channel, batcher):
    pending = [batcher.submit([UNIT], later()) for _ in range(5)]
    for message in reversed(channel.messages):
        batcher.done(Done(message.id, [message.id], 1.0, 2.0))
    assert [(await pending.future)[0] for pending in pending] == [message.id for message in channel.messages]


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        (Failed(0, "RunFailed", "the model failed", None, None, False), RunFailed),
        (Failed(0, "DeadlineExceeded", "late", "deadline", None, False), DeadlineExceeded),
        (Failed(0, "TooManyRows", "17 rows", "too_many_rows", None, False), TooManyRows),
    ],
)
async def test_the_engines_error_is_the_requests(channel, batcher, failed, expected):
    pending = batcher.submit([UNIT], later())
    failed.id = channel.messages[0].id
    batcher.failed(failed)
    with pytest.raises(expected, match=failed.message):
        await pending.future


async def test_a_refusal_keeps_what_it_says(channel, batcher):
    pending = batcher.submit([UNIT], later())
    batcher.failed(Failed(channel.messages[0].id, "Unavailable", "shutting down", "draining", 7, True))
    with pytest.raises(Unavailable) as caught:
        await pending.future
    assert (caught.value.reason, caught.value.retry_after_seconds, caught.value.close) == ("draining", 7, True)


async def test_a_request_given_up_is_cancelled_in_the_engine_and_its_late_answer_ignored(channel, batcher):
    pending = batcher.submit([UNIT], later())
    pending.future.cancel()
    await asyncio.sleep(0)
    number = channel.messages[0].id
    assert channel.messages[1:] == [Cancel(number)]
    batcher.done(Done(number, ["late"], 1.0, 2.0))
    batcher.failed(Failed(number, "RunFailed", "late", None, None, False))


async def test_a_deadline_holds_though_the_engine_says_nothing(channel, batcher):
    pending = batcher.submit([UNIT], later(0.02))
    with pytest.raises(DeadlineExceeded):
        await pending.future
    await asyncio.sleep(0)
    assert isinstance(channel.messages[-1], Cancel)


async def test_what_the_engine_last_said_decides_at_the_door(channel, batcher):
    batcher.admission.admit()
    batcher.heard(State(QueueState(16, 160, 1000.0), None))
    with pytest.raises(Unavailable, match="queue full"):
        batcher.submit([UNIT], later())
    batcher.heard(State(QueueState(2, 400, 1000.0), None))
    with pytest.raises(Unavailable, match="deadline"):
        batcher.submit([UNIT], later(0.1))
    batcher.heard(State(QueueState(0, 0, 1000.0), None))
    batcher.submit([UNIT], later(0.1)).future.cancel()
    with pytest.raises(TooManyRows):
        batcher.admission.require_possible(17)
    assert [type(message) for message in channel.messages] == [Submit]


async def test_while_the_engine_does_not_read_requests_are_refused_at_the_door(channel, batcher):
    channel.unread_bytes = MAX_UNREAD_BYTES
    with pytest.raises(Unavailable, match="queue full"):
        batcher.admission.admit()
    with pytest.raises(Unavailable, match="queue full"):
        batcher.submit([UNIT], later())
    assert channel.messages == []
    channel.unread_bytes = 0
    batcher.submit([UNIT], later()).future.cancel()


async def test_a_stuck_engine_and_a_silent_one_are_noticed(batcher, monkeypatch):
    assert batcher.stuck() is None
    batcher.heard(State(QueueState(0, 0, inf), "runner 0 has ended"))
    assert batcher.stuck() == "runner 0 has ended"
    batcher.heard(State(QueueState(0, 0, inf), None))
    assert batcher.stuck() is None
    monkeypatch.setattr(remote, "SILENCE_SECONDS", -1.0)
    assert "said nothing" in batcher.stuck()


async def test_closing_ends_what_waits_and_refuses_what_comes(batcher):
    pending = batcher.submit([UNIT], later())
    batcher.close()
    with pytest.raises(Unavailable):
        await pending.future
    with pytest.raises(Unavailable) as caught:
        batcher.submit([UNIT], later())
    assert caught.value.reason == "draining"


def test_a_workers_model_encodes_and_names_itself_but_does_not_run(digest):
    model = open_model(Settings(model_dir=text_model()), Serve(digest, "cuda", LIMITS))
    assert isinstance(model.task, TextClassification)
    assert (model.artifact.digest, model.provider, model.batch_rows) == (digest, "cuda", 8)
    with pytest.raises(NotImplementedError):
        model.infer({})


def test_an_artifact_swapped_since_the_engine_read_it_is_refused():
    with pytest.raises(ArtifactError, match="digest"):
        open_model(Settings(model_dir=text_model()), Serve("0" * 64, "cpu", LIMITS))


@pytest.fixture
def digest() -> str:
    return read_artifact(text_model(), "").digest
