"""The inference middleware: identity, books, readiness, bodies, deadlines, errors, spoken to in ASGI."""

import asyncio
import gzip
import json
import re
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from app.runtime.session import Model
from app.runtime.tasks import Encoded
from app.runtime.tasks.text_classification import TextClassification
from tests.text_model import NAME
from tests.unit.http.asgi import LIMITS, PREDICT, Client, Served, held, until

# Bodies may arrive at once up to this many times the largest one.
BODIES_AT_ONCE = 32


class BrokenTask(TextClassification):
    """Quotes its input when it fails, as libraries do."""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        raise ValueError(f"cannot digest {texts}")


# --- identity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "A-1_b.c:d/e+f=g@h", "7" * 128])
async def test_a_request_id_is_taken_from_the_client_and_given_back(reviews: Model, given: str) -> None:
    async with Served(reviews) as served:
        for path, method in (("/predict", "POST"), ("/live", "GET"), ("/nowhere", "GET")):
            client = Client(PREDICT)
            await served(client, path, method, x_request_id=given)
            assert client.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given", ["", "7" * 129, "two words", "tab\there", "line\nbreak", "trailing\n", '"quoted"', "ümlaut", "{}", "a,b"]
)
async def test_a_request_id_that_could_do_harm_is_replaced(reviews: Model, given: str) -> None:
    async with Served(reviews) as served:
        for path, method in (("/predict", "POST"), ("/live", "GET")):
            client = Client(PREDICT)
            with capture_logs() as lines:
                await served(client, path, method, x_request_id=given)
            assert re.fullmatch("[0-9a-f]{32}", client.headers["x-request-id"])
            assert [line["request_id"] for line in lines] == [client.headers["x-request-id"]] * len(lines)


async def test_generated_request_ids_differ(reviews: Model) -> None:
    seen = set()
    async with Served(reviews) as served:
        for _ in range(20):
            client = Client(PREDICT)
            await served(client)
            seen.add(client.headers["x-request-id"])
    assert len(seen) == 20


# --- books ------------------------------------------------------------------------------------------------------------


async def test_a_request_is_in_flight_until_it_is_answered(reviews: Model) -> None:
    async with Served(model := held(reviews)) as served:
        client = Client(PREDICT)
        task = asyncio.create_task(served(client))
        await until(lambda: model.entered)
        assert served.in_flight == 1
        model.opened.set()
        await task
        assert client.status == 200
        assert served.in_flight == 0
        assert served.requests(200) == 1


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/predict", "/predict"),
        ("/predict/batch", "/predict/batch"),
        ("/v2/models/anything/infer", "/v2/models/infer"),
        ("/v2/models/anything/versions/9/infer", "/v2/models/infer"),
    ],
)
async def test_every_inference_path_counts_under_its_route(reviews: Model, path: str, route: str) -> None:
    async with Served(reviews) as served:
        client = Client(b"{")
        with capture_logs() as lines:
            await served(client, path)
        assert client.status in (400, 404)
        assert served.requests(client.status, route) == 1
        assert [(line["event"], line["route"]) for line in lines] == [("request", route)]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/live"),
        ("GET", "/ready"),
        ("GET", "/metrics"),
        ("GET", "/v2"),
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", f"/v2/models/{NAME}"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
        ("POST", "/v2/models/a/b/infer"),
        ("POST", "/v2/models//infer"),
        ("GET", "/predict"),
    ],
)
async def test_all_else_is_neither_counted_nor_logged(reviews: Model, method: str, path: str) -> None:
    async with Served(reviews) as served:
        client = Client(b"")
        with capture_logs() as lines:
            await served(client, path, method)
        assert "x-request-id" in client.headers
        assert lines == []
        counts = re.findall(r"^inference_requests_total\{.*\} (.*)$", served.metrics, re.MULTILINE)
        assert {float(count) for count in counts} == {0.0}


async def test_a_bug_ends_one_request_with_500_and_without_a_word_of_what_it_was_about(reviews: Model) -> None:
    async with Served(replace(reviews, task=BrokenTask(reviews.artifact, reviews.batch_rows))) as served:
        client = Client(PREDICT)
        with capture_logs() as lines:
            await served(client)
        unhandled, request = lines
        assert (client.status, client.body) == (500, {"error": "internal error"})
        assert client.headers["x-request-id"] == unhandled["request_id"] == request["request_id"]
        assert unhandled["error_type"] == "ValueError"
        assert "test_middleware.py" in repr(unhandled), "where it happened"
        assert "heron" not in repr(lines)
        assert request["status"] == 500
        assert served.requests(500) == 1
        assert served.in_flight == 0


async def test_a_request_cut_off_by_the_server_leaves_the_gauges_at_zero(reviews: Model) -> None:
    async with Served(reviews) as served:
        task = asyncio.create_task(served(Client(b"{", more=True)))
        await until(lambda: served.in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert served.in_flight == 0
        assert served.sample("inference_request_duration_seconds_count", route="/predict") == 1


# --- readiness --------------------------------------------------------------------------------------------------------


async def test_before_the_model_is_there_inference_is_refused_for_now() -> None:
    async with Served() as served:
        served.lifecycle.enter("loading")
        client = Client(PREDICT)
        await served(client)
        assert client.status == 503
        assert "loading" in client.body["error"]
        assert int(client.headers["retry-after"]) >= 1
        assert "connection" not in client.headers
        assert served.rejected("not_ready") == 1
        ready, live = Client(), Client()
        await served(ready, "/ready", "GET")
        await served(live, "/live", "GET")
        assert (ready.status, ready.body["stage"], live.status) == (503, "loading", 200)


async def test_while_draining_new_requests_are_refused_and_connections_closed(reviews: Model) -> None:
    async with Served(model := held(reviews)) as served:
        accepted, refused, probe = Client(PREDICT), Client(PREDICT), Client()
        task = asyncio.create_task(served(accepted))
        await until(lambda: model.entered)
        served.lifecycle.refuse()
        await served(refused)
        await served(probe, "/ready", "GET")
        model.opened.set()
        await task
        assert (refused.status, accepted.status) == (503, 200)
        assert (probe.status, probe.body["stage"]) == (503, "draining")
        for client in (accepted, refused, probe):
            assert client.headers["connection"] == "close"
        assert int(refused.headers["retry-after"]) >= 1
        assert served.rejected("draining") == 1


async def test_a_request_accepted_before_the_drain_is_answered_although_its_body_comes_later(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = Client(PREDICT[:5], more=True)
        task = asyncio.create_task(served(client))
        await until(lambda: client.asked == 2)
        served.lifecycle.refuse()
        client.send_part(PREDICT[5:], more=False)
        await task
        assert client.status == 200


async def test_connections_are_kept_open_while_ready(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = Client(PREDICT)
        await served(client)
        assert "connection" not in client.headers


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1], [5, 6, 20], list(range(len(PREDICT)))])
async def test_a_body_is_read_whole_however_it_is_cut(reviews: Model, cuts: list[int]) -> None:
    async with Served(reviews) as served:
        edges = [0, *cuts, len(PREDICT)]
        client = Client(*[PREDICT[start:end] for start, end in pairwise(edges)])
        with capture_logs() as lines:
            await served(client)
        assert client.status == 200
        assert lines[0]["body_bytes"] == len(PREDICT)
        assert served.sample("inference_request_bytes_sum") == len(PREDICT)


async def test_a_body_of_just_the_limit_is_read(reviews: Model) -> None:
    async with Served(reviews, max_body_bytes=len(PREDICT)) as served:
        client = Client(PREDICT)
        await served(client, content_length=str(len(PREDICT)))
        assert client.status == 200


async def test_a_body_declared_too_large_is_refused_before_a_byte_is_read(reviews: Model) -> None:
    async with Served(reviews, max_body_bytes=100) as served:
        client = Client(b"x" * 101)
        await served(client, content_length="101")
        assert client.status == 413
        assert "at most 100 bytes" in client.body["error"]
        assert client.headers["connection"] == "close"
        assert client.asked == 0
        assert served.rejected("body_too_large") == 1


@pytest.mark.parametrize("declared", ["", "5", "-1", "many", "²", "1e9"])
async def test_a_body_that_grows_too_large_is_refused_whatever_was_declared(reviews: Model, declared: str) -> None:
    async with Served(reviews, max_body_bytes=100) as served:
        client = Client(b"x" * 60, b"x" * 60, b"x" * 60)
        await served(client, content_length=declared)
        assert client.status == 413
        assert client.headers["connection"] == "close"
        assert client.asked == 2, "what is too much is not read on"


async def test_a_body_that_does_not_arrive_in_time_is_given_up(reviews: Model) -> None:
    async with Served(reviews, request_timeout_ms=20) as served:
        client = Client(b"a part", more=True)
        await served(client)
        assert client.status == 408
        assert client.headers["connection"] == "close"
        assert served.rejected("body_timeout") == 1
        assert served.in_flight == 0


async def test_a_client_that_leaves_while_sending_is_counted_and_forgotten(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = Client(b"a part", more=True)
        client.leave()
        await served(client)
        assert served.requests(499) == 1
        assert served.rejected("client_closed") == 1
        assert served.in_flight == 0


async def test_bodies_held_at_once_are_bounded_and_what_is_released_may_be_used_again(reviews: Model) -> None:
    async with Served(reviews, max_body_bytes=100) as served:
        clients = [Client(b"x" * 100, more=True) for _ in range(BODIES_AT_ONCE)]
        tasks = [asyncio.create_task(served(client)) for client in clients]
        await until(lambda: all(client.asked == 2 for client in clients))
        refused = Client(PREDICT)
        await served(refused)
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert served.rejected("memory") == 1
        # One is cut off, another's client leaves.
        tasks[0].cancel()
        clients[1].leave()
        await asyncio.wait(tasks[:2])
        accepted = Client(PREDICT)
        await served(accepted)
        assert accepted.status == 200
        for client in clients:
            client.leave()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(BODIES_AT_ONCE + 1):
            again = Client(PREDICT)
            await served(again)
            assert again.status == 200
        assert served.in_flight == 0


# --- bodies that come packed ------------------------------------------------------------------------------------------

PACKED = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}
BATCH = json.dumps({"texts": ["the heron waits"]}).encode()
TENSOR = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["the heron waits"]}]}
MiB = 2**20


@pytest.mark.parametrize("encoding", [*PACKED, "GZIP"])
@pytest.mark.parametrize(
    ("path", "body"),
    [("/predict", PREDICT), ("/predict/batch", BATCH), ("/v2/models/{}/infer", json.dumps(TENSOR).encode())],
)
async def test_a_packed_body_is_unpacked_however_it_is_cut(
    reviews: Model, encoding: str, path: str, body: bytes
) -> None:
    packed = PACKED[encoding.lower()](body)
    path = path.format(reviews.artifact.manifest.name)
    async with Served(reviews) as served:
        plain = await served.ask(path, "POST", body)
        for parts in ([packed], [packed[:1], packed[1:9], packed[9:]], [packed[i : i + 1] for i in range(len(packed))]):
            client = Client(*parts)
            with capture_logs() as lines:
                await served(client, path, content_encoding=encoding)
            assert (client.status, client.body) == (200, plain.body)
            assert lines[0]["body_bytes"] == len(packed)


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
async def test_a_body_that_is_said_to_be_as_it_is_is_read_so(reviews: Model, encoding: str) -> None:
    async with Served(reviews) as served:
        assert (await served.ask("/predict", "POST", PREDICT, content_encoding=encoding)).status == 200


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip, identity", "gzip;q=1", "axolotl"])
async def test_another_packing_is_unsupported_and_its_body_is_not_read(reviews: Model, encoding: str) -> None:
    async with Served(reviews) as served:
        client = Client(gzip.compress(PREDICT))
        await served(client, content_encoding=encoding)
        assert (client.status, client.asked) == (415, 0)
        assert "axolotl" not in client.text
        assert served.rejected("invalid") == 1


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_packing_that_is_broken_or_cut_is_a_bad_request(reviews: Model, encoding: str) -> None:
    packed = PACKED[encoding](PREDICT)
    broken = [
        b"",
        PREDICT,
        *(packed[:length] for length in range(0, len(packed), 3)),
        packed[:-1],
        packed + b"x",
        packed[:-4] + bytes(byte ^ 1 for byte in packed[-4:]),
        b"\0" + packed,
        PACKED["deflate" if encoding == "gzip" else "gzip"](PREDICT),
    ]
    async with Served(reviews) as served:
        for body in broken:
            for parts in ([body], [body[:5], body[5:]]):
                client = Client(*parts)
                await served(client, content_encoding=encoding)
                assert (client.status, list(client.body)) == (400, ["error"]), body
        assert served.rejected("invalid") == 2 * len(broken)
        assert (await served.ask("/predict", "POST", packed, content_encoding=encoding)).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_what_unpacks_to_just_the_limit_is_read_and_one_byte_more_is_not(reviews: Model, encoding: str) -> None:
    async with Served(reviews, max_body_bytes=1000) as served:
        for size, status in ((1000, 200), (1001, 413)):
            body = PACKED[encoding](PREDICT.ljust(size))
            for parts in ([body], [body[:7], body[7:], b""]):
                client = Client(*parts)
                await served(client, content_encoding=encoding)
                assert client.status == status
        assert "at most 1000 bytes" in client.body["error"]
        assert client.headers["connection"] == "close"
        assert served.rejected("body_too_large") == 2


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_bomb_is_refused_before_it_is_in_memory(reviews: Model, encoding: str) -> None:
    bomb = PACKED[encoding](bytes(256 * MiB))
    assert len(bomb) < 256 * MiB / 900
    async with Served(reviews, max_body_bytes=MiB) as served:
        client = Client(bomb)
        tracemalloc.start()
        try:
            await served(client, content_encoding=encoding)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert client.status == 413
        # What it holds, a copy of it while its buffer grows, and what any request takes.
        assert most < 3 * MiB


async def test_packed_bodies_count_towards_what_may_be_held_at_once_with_their_whole_size(reviews: Model) -> None:
    part = zlib.compressobj(wbits=31)
    packed = part.compress(b" " * 1000) + part.flush(zlib.Z_SYNC_FLUSH)
    async with Served(reviews, max_body_bytes=1000) as served:
        clients = [Client(packed, more=True) for _ in range(BODIES_AT_ONCE)]
        tasks = [asyncio.create_task(served(client, content_encoding="gzip")) for client in clients]
        await until(lambda: all(client.asked == 2 for client in clients))
        assert (await served.ask("/predict", "POST", PREDICT)).status == 503
        assert served.rejected("memory") == 1
        for client in clients:
            client.leave()
        await asyncio.gather(*tasks)
        assert (await served.ask("/predict", "POST", PREDICT)).status == 200


# --- deadlines, and clients that leave --------------------------------------------------------------------------------


async def test_an_answer_that_does_not_come_in_time_is_504(reviews: Model) -> None:
    async with Served(held(reviews), request_timeout_ms=20) as served:
        client = Client(PREDICT)
        await served(client)
        assert client.status == 504
        assert served.rejected("deadline") == 1
        assert served.in_flight == 0


async def test_a_client_that_leaves_while_its_rows_run_or_wait_is_not_waited_for(reviews: Model) -> None:
    async with Served(model := held(reviews)) as served:
        running, waiting = Client(PREDICT), Client(PREDICT)
        tasks = [asyncio.create_task(served(running))]
        await until(lambda: model.entered)
        tasks.append(asyncio.create_task(served(waiting)))
        await until(lambda: served.sample("inference_queue_rows") == 1)
        running.leave()
        waiting.leave()
        await asyncio.gather(*tasks)
        assert served.in_flight == 0
        assert served.requests(499) == 2
        assert served.rejected("client_closed") == 2
        model.opened.set()
        await until(lambda: served.sample("inference_queue_rows") == 0)
        after = Client(PREDICT)
        await served(after)
        assert after.status == 200
        assert served.sample("inference_batch_rows_sum") == 2, "the row that waited was not run"


async def test_a_client_that_leaves_just_before_or_after_its_answer_does_no_harm(reviews: Model) -> None:
    async with Served(reviews, replace(LIMITS, queue_rows=100)) as served:
        for delay in range(30):
            client = Client(PREDICT)
            task = asyncio.create_task(served(client))
            await asyncio.sleep(delay * 0.0002)
            client.leave()
            await task
            assert client.status in (200, 499)
        assert served.in_flight == 0
        assert served.requests(200) + served.requests(499) == 30


async def test_a_client_that_is_answered_leaves_no_task_behind(reviews: Model) -> None:
    async with Served(reviews) as served:
        await served(Client(PREDICT))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1


async def test_what_follows_the_body_is_not_taken_for_a_client_that_leaves(reviews: Model) -> None:
    async with Served(reviews) as served:
        client = Client(PREDICT)
        for _ in range(3):
            client.send_part(b"", more=False)
        await served(client)
        assert client.status == 200


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "path", "body", "headers"),
    [
        (400, "/predict", b"{", {}),
        (400, "/predict", b'{"text": "\xff"}', {}),
        (404, "/v2/models/another/infer", b'{"inputs": []}', {}),
        (415, "/predict", PREDICT, {"content_type": "text/plain"}),
        (400, "/predict", PREDICT, {"content_encoding": "gzip"}),
        (415, "/predict", PREDICT, {"content_encoding": "br"}),
        (422, "/predict", b"{}", {}),
        (422, "/predict", b'{"text": " "}', {}),
        (422, "/predict/batch", b'{"texts": []}', {}),
        (429, "/predict/batch", json.dumps({"texts": ["x"] * 17}).encode(), {}),
    ],
)
async def test_every_error_is_one_shape_with_the_status_of_the_contract(
    reviews: Model, status: int, path: str, body: bytes, headers: dict[str, str]
) -> None:
    async with Served(reviews) as served:
        client = Client(body)
        await served(client, path, **headers)
        assert client.status == status
        assert list(client.body) == ["error"]
        assert client.headers["content-type"] == "application/json"
        assert served.rejected("too_many_rows" if status == 429 else "invalid") == 1
        assert served.in_flight == 0


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/predict", 405)])
async def test_paths_and_methods_that_are_not_there_have_the_same_shape(
    reviews: Model, method: str, path: str, status: int
) -> None:
    async with Served(reviews) as served:
        client = Client(b"")
        await served(client, path, method)
        assert client.status == status
        assert list(client.body) == ["error"]
