"""The load generator against servers of every kind, and the benchmark's figures of what it got."""

import asyncio
import math
from contextlib import asynccontextmanager

import pytest

from loadtest.benchmark.load import Spent, summary
from loadtest.client import Client
from loadtest.connection import Answers, Target
from loadtest.shapes import shape
from loadtest.texts import sentences

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"


class Server:
    """What it is asked, it answers with `await answer(writer)`; knows how many wait for that."""

    def __init__(self, answer):
        self.answer = answer
        self.connections = self.present = self.most = self.seen = 0

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                self.seen += 1
                self.present += 1
                self.most = max(self.most, self.present)
                try:
                    await self.answer(writer)
                finally:
                    self.present -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def client_of(answer, **options):
    """A server that answers so, and a client of it."""
    made = Server(answer)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    async with server:
        target = Target.of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict")
        client = Client(target, [target.post(b"{}")], **options)
        yield made, client
        await client.close()


def writing(*chunks):
    async def answer(writer):
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0)

    return answer


def closing(*chunks):
    async def answer(writer):
        await writing(*chunks)(writer)
        writer.close()

    return answer


async def answered(client, count):
    while len(client.answers.statuses) < count:
        await asyncio.sleep(0.005)


def test_sentences_are_the_same_for_a_seed_and_as_long_as_natural_ones():
    texts = sentences(2000, seed=3)
    assert texts == sentences(2000, seed=3)
    assert texts != sentences(2000, seed=4)
    words = sorted(len(text.split()) for text in texts)
    assert 10 <= words[1000] <= 17
    assert words[-1] > 3 * words[1000]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (writing(ANSWER), 200),
        (writing(ANSWER[:9], ANSWER[9:40], ANSWER[40:]), 200),
        (writing(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"), 200),
        (writing(REFUSAL), 503),
        (closing(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"), 200),
        (closing(b"HTTP/1.0 200 OK\r\n\r\n", b"{}"), 200),
        (closing(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"), 0),
        (closing(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{}"), 0),
        (closing(), 0),
        (writing(b"nonsense\r\n\r\n"), 0),
    ],
    ids=[
        "whole",
        "in pieces",
        "chunked",
        "refusal",
        "closed",
        "until closed",
        "cut",
        "closed, cut",
        "silent",
        "no HTTP",
    ],
)
async def test_any_servers_answers_are_told_apart_and_the_next_request_is_sent(answer, status):
    async with client_of(answer, back_off_seconds=0.0) as (server, client):
        client.hold(2)
        await answered(client, 6)
    assert set(client.answers.statuses) == {status}
    assert server.most <= 2


async def test_a_closed_loop_keeps_as_many_in_flight_as_it_is_told():
    go = asyncio.Event()

    async def answer(writer):
        await go.wait()
        writer.write(ANSWER)

    async with client_of(answer) as (server, client):
        client.hold(5)
        while server.present < 5:
            await asyncio.sleep(0.005)
        assert client.in_flight == 5
        client.hold(2)
        go.set()
        await answered(client, 50)
        assert client.in_flight == 2
        assert server.connections == 5
        client.hold(0)
        await client.drain(10)
        assert client.in_flight == server.present == 0


async def test_where_nothing_listens_each_attempt_is_a_broken_one():
    target = Target.of("http://127.0.0.1:9/")
    client, answers = Client(target, [target.post(b"{}")]), Answers()
    sent = await client.arrive(shape("constant", 200, 200, 0.1), answers)
    await client.drain(10)
    await client.close()
    assert answers.statuses == [0] * sent


async def test_an_open_loop_waits_for_nothing_and_counts_from_when_a_request_was_due():
    gate = asyncio.Event()

    async def answer(writer):
        await gate.wait()
        writer.write(ANSWER)

    async with client_of(answer) as (_, client):
        asyncio.get_running_loop().call_later(0.5, gate.set)
        answers = Answers()
        sent = await client.arrive(shape("constant", 200, 200, 0.4), answers)
        await client.drain(10)
    # Arrivals are seeded. The server said nothing for half a second: the earliest waited nearly that long, and a client
    # that sends only after an answer would have seen a handful of waits.
    assert len(answers.statuses) == sent > 50
    assert set(answers.statuses) == {200}
    assert client.answers.statuses == []
    assert max(answers.latencies) > 0.4
    assert sum(latency > 0.09 for latency in answers.latencies) > 50


async def test_an_open_loop_opens_no_more_connections_than_it_may():
    async with client_of(writing(ANSWER), max_connections=3) as (server, client):
        answers = Answers()
        sent = await client.arrive(shape("constant", 1000, 1000, 0.2), answers)
        await client.drain(10)
    assert answers.statuses == [200] * sent
    assert server.connections <= 3


def test_a_summary_tells_goodput_from_refusals():
    answers = Answers([1.0] * 4, [0.05, 0.2, 0.3, 0.001], [200, 200, 200, 503])
    found = summary(answers, Spent(0.0, [1.0, 1.0], 5.0), Spent(2.0, [3.0, 2.0], 6.0))
    assert found["requests_per_second"] == 1.5
    assert found["refused_per_second"] == found["goodput_100ms_per_second"] == 0.5
    assert found["goodput_250ms_per_second"] == 1.0
    assert found["refusal_p99_ms"] == 1.0
    assert found["server_cpu_ms_per_request"] == 750.0
    assert found["engine_cpu_ms_per_request"] == 500.0
    assert found["client_cpu_share"] == 0.25
    assert math.isnan(summary(Answers(), Spent(0.0, [0.0], 0.0), Spent(1.0, [0.0], 0.0))["p50_ms"])
