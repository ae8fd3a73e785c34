"""Whether an HTTP worker answers: a real channel whose other side is the test, on a loop whose clock the test moves."""

import asyncio
import socket
from contextlib import asynccontextmanager
from functools import partial

import pytest

from app.multiprocess.channel import Ask, Channel, Part
from app.multiprocess.metrics import Snapshot
from app.multiprocess.workers import QUESTION_EVERY_SECONDS, SILENCE_SECONDS, Worker
from app.telemetry.metrics import Statistics

HOUR = 3600.0
TURNS = 20


def counted(number: int) -> Snapshot:
    return Snapshot([], Statistics(succeeded=number))


class Process:
    """One that only remembers that it was killed."""

    pid = 4711
    returncode = None

    def kill(self) -> None:
        self.returncode = -9


class Clock:
    """The loop's own, which goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        # As many turns as any message or timer needs to have its effect.
        for _ in range(TURNS):
            await asyncio.sleep(0)


class Other:
    """The worker's own end: answers with how often it was asked, or keeps the questions."""

    def __init__(self) -> None:
        self.answering = True
        self.asked = 0
        self.kept: list[int] = []

    def on_message(self, message: Ask) -> None:
        self.asked += 1
        self.kept.append(message.id)
        if self.answering:
            self.answer()

    def answer(self) -> None:
        for number in self.kept:
            self.channel.send(Part(number, counted(self.asked)))
        self.kept.clear()


@asynccontextmanager
async def watched():
    loop, other, worker = asyncio.get_running_loop(), Other(), Worker(Process())
    ours, theirs = socket.socketpair()
    _, worker.channel = await loop.create_unix_connection(partial(Channel, print, lambda: None), sock=ours)
    make = partial(Channel, other.on_message, lambda: None)
    _, other.channel = await loop.create_unix_connection(make, sock=theirs)
    task = asyncio.create_task(worker.require_answers())
    try:
        yield worker, other, task
    finally:
        task.cancel()
        worker.channel.close()
        other.channel.close()
        await asyncio.gather(task, return_exceptions=True)
        for left in asyncio.all_tasks() - {asyncio.current_task()}:
            left.cancel()
        await asyncio.sleep(0)


async def test_a_worker_that_does_not_answer_any_more_is_killed(monkeypatch):
    async with watched() as (worker, other, task):
        clock = Clock(monkeypatch)
        await clock.advance(0)
        other.answering = False
        await clock.advance(QUESTION_EVERY_SECONDS + 0.1)
        for _ in range(SILENCE_SECONDS - 1):
            await clock.advance(1.1)
            assert worker.process.returncode is None
            assert not worker.answers
        await clock.advance(1.1)
        assert task.done()
        assert worker.process.returncode == -9


async def test_one_that_answers_late_each_time_lives(monkeypatch):
    async with watched() as (worker, other, _):
        clock = Clock(monkeypatch)
        await clock.advance(0)
        other.answering = False
        for _ in range(3 * SILENCE_SECONDS):
            await clock.advance(QUESTION_EVERY_SECONDS + 0.1)
            for _ in range(2):
                await clock.advance(1.1)
            other.answer()
            await clock.advance(0)
            assert worker.answers
        assert worker.process.returncode is None
        assert other.asked > 3 * SILENCE_SECONDS


@pytest.mark.parametrize("in_between", [True, False])
async def test_a_pause_of_the_whole_machine_is_not_silence(monkeypatch, in_between):
    async with watched() as (worker, other, _):
        clock = Clock(monkeypatch)
        await clock.advance(0)
        for _ in range(SILENCE_SECONDS + 3):
            other.answering = False
            if in_between:
                await clock.advance(QUESTION_EVERY_SECONDS + 0.1)
            await clock.advance(HOUR)
            other.answering = True
            other.answer()
            await clock.advance(0.1)
            assert worker.process.returncode is None


async def test_a_worker_may_take_any_time_to_start(monkeypatch):
    async with watched() as (worker, other, _):
        clock = Clock(monkeypatch)
        other.answering = False
        for _ in range(3 * SILENCE_SECONDS):
            await clock.advance(1.1)
        assert worker.process.returncode is None
        assert not worker.answers
        other.answer()
        await clock.advance(0)
        assert worker.answers


async def test_a_scrape_waits_once_for_a_worker_that_does_not_answer_and_keeps_what_it_said(monkeypatch):
    async with watched() as (worker, other, _):
        clock = Clock(monkeypatch)
        await clock.advance(0)
        other.answering = False
        first = asyncio.create_task(worker.refresh())
        await clock.advance(0.5)
        assert not first.done()
        await clock.advance(HOUR)
        assert first.done()
        asked = other.asked
        second = asyncio.create_task(worker.refresh())
        await clock.advance(0)
        assert second.done()
        assert other.asked == asked
        assert worker.channel.last_answer == counted(1)
        # Once it answers, it is asked again.
        other.answering = True
        other.answer()
        await clock.advance(0)
        await asyncio.wait_for(worker.refresh(), None)
        assert worker.channel.last_answer == counted(other.asked)
