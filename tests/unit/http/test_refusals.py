"""Refusals at the door: only of what admission refuses, counted and logged as any other."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from app.http import refusals
from app.main import Server
from app.runtime.session import Model
from tests.unit.http.asgi import LIMITS, Client, Served, held, until


def asked(path: str = "/predict", method: str = "POST", request_id: str = "mine") -> dict:
    return {"type": "http", "method": method, "path": path, "headers": [(b"x-request-id", request_id.encode())]}


@asynccontextmanager
async def full(model: Model) -> AsyncIterator[Served]:
    """A server whose one runner is held, and whose queue has no room."""
    async with Served(stuck := held(model)) as served:
        texts = json.dumps({"texts": ["a heron"] * (LIMITS.queue_rows - 1)}).encode()
        clients = [asyncio.create_task(served(Client(texts), "/predict/batch"))]
        await until(lambda: stuck.entered)
        clients += [asyncio.create_task(served(Client(texts), "/predict/batch")) for _ in range(2)]
        await until(lambda: served.in_flight in (1, 2) and served.rejected("queue_full") >= 1)
        batcher = served.lifecycle.predictor.batcher
        one = json.dumps({"text": "a heron"}).encode()
        while batcher.admission.refusal() is None:
            clients.append(asyncio.create_task(served(Client(one))))
            await asyncio.sleep(0)
        yield served
        stuck.opened.set()
        await asyncio.wait(clients)


async def test_a_request_that_would_be_refused_is_and_is_counted_and_logged(reviews: Model) -> None:
    async with full(reviews) as served:
        before, log_before = served.requests(503), served.rejected("queue_full")
        with capture_logs() as lines:
            answer = served.app.state.refusals.at_the_door(asked(), early=False)
        assert (answer.status, json.loads(answer.body)) == (503, {"error": "queue full"})
        headers = dict(answer.all_headers())
        assert int(headers[b"retry-after"]) == answer.retry_after_seconds >= 1
        assert (headers[b"content-type"], headers[b"x-request-id"]) == (b"application/json", b"mine")
        assert served.requests(503) == before + 1
        assert served.rejected("queue_full") == log_before + 1
        (line,) = lines
        assert (line["event"], line["request_id"], line["status"], line["error"]) == (
            "request", "mine", 503, "Unavailable",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "method"),
    [("/live", "GET"), ("/predict", "GET"), ("/nowhere", "POST"), ("/v2/models/stats", "GET")],
)
async def test_what_is_no_inference_is_not_refused(reviews: Model, path: str, method: str) -> None:
    async with full(reviews) as served:
        assert served.app.state.refusals.at_the_door(asked(path, method), early=False) is None


async def test_with_room_nobody_is_refused(reviews: Model) -> None:
    async with Served(reviews) as served:
        assert served.app.state.refusals.at_the_door(asked(), early=True) is None


async def test_requests_that_come_at_once_are_let_in_as_far_as_there_is_room(reviews: Model) -> None:
    async with Served(stuck := held(reviews)) as served:
        door = served.app.state.refusals.at_the_door
        clients = [asyncio.create_task(served(Client(b'{"text": "a heron"}')))]
        await until(lambda: stuck.entered)
        texts = json.dumps({"texts": ["a heron"] * (LIMITS.queue_rows - 2)}).encode()
        clients.append(asyncio.create_task(served(Client(texts), "/predict/batch")))
        await until(lambda: served.lifecycle.predictor.batcher.state().rows)
        assert [door(asked(), early=False) is None for _ in range(3)] == [True, True, False]
        await asyncio.sleep(0)
        # The first is no inference and takes no room.
        assert [door(asked(path), early=False) is None for path in ("/live", "/predict", "/predict")] == [True] * 3
        stuck.opened.set()
        await asyncio.wait(clients)


async def test_where_hooks_are_asked_first_nothing_is_refused_before_them(
    reviews: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hook(connection: object) -> None: ...

    monkeypatch.setattr(refusals, "HOOKS", (hook,))
    async with full(reviews) as served:
        assert served.app.state.refusals.at_the_door(asked(), early=False) is None


async def test_a_server_that_drains_or_has_no_model_says_so_itself(reviews: Model) -> None:
    async with full(reviews) as served:
        served.lifecycle.drain()
        assert served.app.state.refusals.at_the_door(asked(), early=False) is None
    async with Served() as served:
        assert served.app.state.refusals.at_the_door(asked(), early=False) is None


@pytest.mark.parametrize("added", [False, True])
async def test_middleware_that_was_added_has_its_say_in_refusals(reviews: Model, added: bool) -> None:
    class Passing:
        def __init__(self, app) -> None:
            self.app = app

    async with Served(reviews) as served:
        if added:
            served.app.add_middleware(Passing)
        server = Server(served.app, served.lifecycle, served.settings, served.app.state.metrics_source.metrics)
        connections = server.config.http.args[0]
        assert (connections.refusal == served.app.state.refusals.at_the_door) is not added
