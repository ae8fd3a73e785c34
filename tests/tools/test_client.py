"""The load generator and the benchmark's arithmetic."""

import asyncio
import math

from loadtest.client import Outcome, closed_loop, open_loop, post
from loadtest.texts import sentences

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def listen(answer):
    """A server whose every request is answered by `answer(writer)`; returns it and its port."""

    async def serve(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def test_sentences_are_the_same_for_a_seed_and_as_long_as_natural_ones():
    texts = sentences(2000, seed=3)
    assert texts == sentences(2000, seed=3)
    assert texts != sentences(2000, seed=4)
    words = sorted(len(text.split()) for text in texts)
    assert 10 <= words[1000] <= 17
    assert words[-1] > 3 * words[1000]


async def test_closed_loop_counts_what_was_answered():
    seen = 0

    async def answer(writer):
        nonlocal seen
        seen += 1
        writer.write(ANSWER)

    server, port = await listen(answer)
    async with server:
        outcome = await closed_loop("127.0.0.1", port, [post("http://127.0.0.1/predict", b"{}")], 4, 0.5)
    assert set(outcome.statuses) == {200}
    # The first fifth warms up, so it is seen but not counted.
    assert 0 < len(outcome.statuses) < seen


async def test_open_loop_counts_waiting_from_when_a_request_was_due():
    gate = asyncio.Event()

    async def answer(writer):
        await gate.wait()
        writer.write(ANSWER)

    server, port = await listen(answer)
    async with server:
        asyncio.get_running_loop().call_later(0.6, gate.set)
        requests = [post("http://127.0.0.1/predict", b"{}")]
        outcome = await open_loop("127.0.0.1", port, requests, rate=200, seconds=0.5)
    assert outcome.unanswered == 0
    # The server said nothing for 0.6 s: the earliest arrivals waited nearly that long, and a client that sends only
    # after an answer would have seen a handful of waits instead of about a hundred.
    assert len(outcome.latencies) > 50
    assert max(outcome.latencies) > 0.4
    assert sum(latency > 0.09 for latency in outcome.latencies) > 50


def test_a_summary_tells_goodput_from_refusals():
    outcome = Outcome(2.0, [0.05, 0.2, 0.3, 0.001], [200, 200, 200, 503])
    summary = outcome.summary()
    assert summary["requests_per_second"] == 1.5
    assert summary["refused_per_second"] == 0.5
    assert summary["goodput_100ms_per_second"] == 0.5
    assert summary["goodput_250ms_per_second"] == 1.0
    assert summary["refusal_p99_ms"] == 1.0
    assert math.isnan(Outcome(1.0).summary()["p50_ms"])
