"""The handlers of the Open Inference Protocol: what is long is done beside the event loop, what is short on it."""

import json
import threading

import pytest

from app.http import request
from app.http.oip import handlers
from app.runtime.session import Model
from tests.text_model import NAME
from tests.unit.http.asgi import Client, Served, until

INFER = f"/v2/models/{NAME}/infer"


def asking(text: str) -> bytes:
    return json.dumps({"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]}).encode()


@pytest.mark.parametrize("step", ["_decode", "_encode"])
@pytest.mark.parametrize("characters", [10, 100_000])
async def test_what_is_long_is_done_in_a_thread_and_what_is_short_without_one(
    reviews: Model, monkeypatch: pytest.MonkeyPatch, step: str, characters: int
) -> None:
    threads, work = [], getattr(handlers, step)
    monkeypatch.setattr(handlers, step, lambda *args: threads.append(threading.get_ident()) or work(*args))
    async with Served(reviews) as served:
        client = await served.ask(INFER, "POST", asking("fine " * (characters // 5)))
    assert client.status == 200
    # The answer is short either way.
    assert (threads == [threading.get_ident()]) is (characters == 10 or step == "_encode")


async def test_a_long_answer_is_made_in_a_thread(reviews: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, work = [], handlers._encode
    monkeypatch.setattr(handlers, "QUICK_BYTES", 1)
    monkeypatch.setattr(handlers, "_encode", lambda *args: threads.append(threading.get_ident()) or work(*args))
    async with Served(reviews) as served:
        assert (await served.ask(INFER, "POST", asking("fine"))).status == 200
    assert threads
    assert threads != [threading.get_ident()]


@pytest.mark.parametrize(("times", "status"), [(1, 422), (4, 200)])
async def test_an_answer_may_be_so_many_times_as_long_as_the_longest_question(
    reviews: Model, monkeypatch: pytest.MonkeyPatch, times: int, status: int
) -> None:
    # Its three numbers and a word are counted as 86 bytes.
    body = asking("a")
    monkeypatch.setattr(request, "MAX_ANSWER", times)
    async with Served(reviews, max_body_bytes=len(body)) as served:
        client = await served.ask(INFER, "POST", body)
    assert len(body) < 86
    assert (client.status, f"at most {len(body)} bytes" in client.text) == (status, status == 422)


async def test_a_question_to_the_repository_without_end_is_not_read_to_it(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = Client(*[b" " * 1000] * 5, more=True)
        await served(client, "/v2/repository/index")
    assert client.status == 413


async def test_a_question_to_the_repository_that_does_not_come_is_not_waited_for(
    reviews: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "INDEX_SECONDS", 0.01)
    async with Served(reviews) as served:
        client = Client(b"{", more=True)
        await served(client, "/v2/repository/index")
    assert client.status == 408


async def test_a_model_that_is_not_ready_is_listed_as_such_unless_only_ready_ones_are_asked_for(reviews: Model) -> None:
    async with Served(reviews) as served:
        served.lifecycle.drain()
        await until(lambda: not served.lifecycle.ready)
        listed = await served.ask("/v2/repository/index", "POST")
        ready = await served.ask("/v2/repository/index", "POST", b'{"ready": true}')
    (entry,) = listed.body
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "draining")
    assert ready.body == []
