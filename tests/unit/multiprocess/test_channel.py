"""Messages between two ends of a socket pair, over real sockets."""

import asyncio
import socket
from contextlib import asynccontextmanager
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batching.admission import Limits, QueueState
from app.multiprocess import channel as channel_module
from app.multiprocess.channel import Ask, Cancel, Channel, Done, Failed, Part, Ready, Serve, Stage, State, Submit
from app.multiprocess.metrics import Family, Snapshot
from app.runtime.tasks import Encoded
from app.telemetry.metrics import Statistics

SNAPSHOT = Snapshot([Family("a", "Of a.", "counter", [("a_total", {"kind": "x"}, 2.0)])], Statistics(succeeded=3))
MESSAGES = [
    Submit(0, [Encoded([101, 7, 102], 3, truncated=True), Encoded([5], 1)], 12.5),
    Submit(1, [Encoded(b"", 1, 4, key=b"12345678"), Encoded(b"", 1, 2, key=((2, 3), ()))], float("inf")),
    Cancel(7),
    Ready(),
    Done(9, ["fine"], 1.25, 2.5),
    Failed(4, "Unavailable", "queue full", "queue_full", 3, True),
    Stage("loading"),
    Serve("0" * 64, "cuda", Limits(2, 8, 512, 64, overhead_tokens=12.5)),
    State(QueueState(3, 40, 1e4), "runner 0 has ended"),
    Ask(3),
]


class End:
    """One end, and what it heard."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.lost = asyncio.Event()
        self.more = asyncio.Event()

    def on_message(self, message: object) -> None:
        self.heard.append(message)
        self.more.set()

    async def hears(self, count: int) -> list[object]:
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                self.more.clear()
                await self.more.wait()
        return self.heard


@asynccontextmanager
async def linked():
    """Two ends and what each heard: (link, end), (link, end)."""
    loop, sides = asyncio.get_running_loop(), []
    for sock in socket.socketpair():
        end = End()
        _, channel = await loop.create_unix_connection(partial(Channel, end.on_message, end.lost.set), sock=sock)
        sides.append((channel, end))
    try:
        yield sides
    finally:
        for channel, _ in sides:
            channel.close()
        await asyncio.sleep(0)


async def test_every_message_arrives_as_it_was_sent_and_in_order():
    async with linked() as ((here, _), (_, there)):
        for message in MESSAGES:
            here.send(message)
        for sent, heard in zip(MESSAGES, await there.hears(len(MESSAGES)), strict=True):
            assert type(heard) is type(sent)
            assert heard == sent


async def test_a_units_key_can_be_looked_up_on_the_other_side():
    async with linked() as ((here, _), (_, there)):
        here.send(MESSAGES[1])
        (message,) = await there.hears(1)
        assert {unit.key for unit in message.units} == {b"12345678", ((2, 3), ())}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u8", "?", "O"])
async def test_arrays_arrive_whatever_their_type_and_shape(dtype):
    sent = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    if dtype == "O":
        sent = np.array([["é", ""], ["longer", "\n"]], object)
    async with linked() as ((here, _), (_, there)):
        here.send(Done(0, [{"y": sent}, sent[0], sent[:0]], 0.0, 0.0))
        (message,) = await there.hears(1)
        named, row, none = message.results
        for found, expected in ((named["y"], sent), (row, sent[0]), (none, sent[:0])):
            assert found.dtype == expected.dtype
            assert np.array_equal(found, expected)


async def test_what_one_turn_of_the_loop_sends_travels_together():
    async with linked() as ((here, _), (there, end)):
        frames = []
        received = there.data_received
        there.data_received = lambda data: (frames.append(data), received(data))
        for number in range(50):
            here.send(Cancel(number))
        await end.hears(50)
        assert len(frames) <= 1


@given(st.lists(st.integers(1, 40), max_size=60))
def test_however_the_bytes_are_cut_the_messages_are_the_same(cuts):
    async def cut() -> None:
        end = End()
        channel = Channel(end.on_message, end.lost.set)
        written = bytearray()

        class Transport:
            write = written.extend

            def get_write_buffer_size(self) -> int:
                return 0

        channel.connection_made(Transport())
        for message in MESSAGES[:5]:
            channel.send(message)
            await asyncio.sleep(0)
        start = 0
        for size in [*cuts, len(written)]:
            channel.data_received(bytes(written[start : start + size]))
            start += size
        assert end.heard == MESSAGES[:5]

    asyncio.run(cut())


async def test_asking_brings_the_other_sides_answer_to_who_asked():
    async with linked() as ((here, here_end), (there, there_end)):
        first, second = asyncio.create_task(here.ask(10)), asyncio.create_task(here.ask(10))
        one, two = await there_end.hears(2)
        other = Snapshot([], Statistics(failed=1))
        there.send(Part(two.id, other))
        there.send(Part(one.id, SNAPSHOT))
        assert (await first, await second) == (SNAPSHOT, other)
        assert here_end.heard == []


async def test_an_answer_that_does_not_come_is_a_timeout_and_one_that_comes_later_harms_nobody():
    async with linked() as ((here, here_end), (there, there_end)):
        with pytest.raises(TimeoutError):
            await here.ask(0.01)
        (question,) = await there_end.hears(1)
        there.send(Part(question.id, SNAPSHOT))
        there.send(Stage("loading"))
        assert await here_end.hears(1) == [Stage("loading")]


async def test_the_loss_of_the_other_side_is_noticed_and_sending_to_it_does_nothing():
    async with linked() as ((here, _), (there, there_end)):
        here.close()
        async with asyncio.timeout(10):
            await there_end.lost.wait()
        there.send(Ready())
        await asyncio.sleep(0)


async def test_the_last_answer_is_kept_though_nobody_waits_for_it_any_more():
    async with linked() as ((here, here_end), (there, there_end)):
        with pytest.raises(TimeoutError):
            await here.ask(0.01)
        (question,) = await there_end.hears(1)
        there.send(Part(question.id, SNAPSHOT))
        there.send(Ready())
        await here_end.hears(1)
        assert here.last_answer == SNAPSHOT


GARBAGE = {
    "a frame of 4 GB": b"\xff" * 8,
    "no MessagePack": b"\x04\0\0\0\xc1\xc1\xc1\xc1",
    "an unknown message": b"\x03\0\0\0\x91\x91\x63",
    "a message that lacks its fields": b"\x03\0\0\0\x91\x91\x02",
    "an array that is none": b"\x08\0\0\0\x91\x95\x04\x01\x91\xd4\x01\0",
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_bytes_that_are_no_messages_end_the_connection_and_nothing_else(garbage, caplog):
    async with linked() as ((here, _), (_, there_end)):
        here._transport.write(GARBAGE[garbage])
        async with asyncio.timeout(10):
            await there_end.lost.wait()
        assert there_end.heard == []
    assert "data_received" in caplog.text


async def test_an_end_that_does_not_read_is_given_up_before_what_it_left_unread_fills_the_memory(monkeypatch):
    monkeypatch.setattr(channel_module, "MAX_UNREAD_BYTES", 1 << 20)
    async with linked() as ((here, here_end), (there, there_end)):
        there._transport.pause_reading()
        sent = 0
        while not here_end.lost.is_set():
            here.send(Done(0, ["x" * 100_000], 0.0, 0.0))
            await asyncio.sleep(0)
            sent += 1
            assert sent < 1000
            assert here.unread_bytes < 2 << 20
        assert sent > 10
        there._transport.resume_reading()
        async with asyncio.timeout(10):
            await there_end.lost.wait()


async def test_what_cannot_be_sent_is_an_error_and_not_something_else():
    with pytest.raises(NotImplementedError, match="object"):
        Channel(print, print)._encoder.encode([Done(0, [object()], 0.0, 0.0)])
