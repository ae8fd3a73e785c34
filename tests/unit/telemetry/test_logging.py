"""How log lines are made and written: few writes, no waiting, nothing of an exception's words."""

import asyncio
import fcntl
import json
import logging
import os
import re
import select
import socket
from collections.abc import Callable, Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter
from structlog.testing import capture_logs

from app.telemetry import logging as logs
from app.telemetry.logging import LineWriter
from tests.process import BUNDLED

SECRETS = ("zyzzyva", "quokka", "ptarmigan", "axolotl")
SECRET_TEXT = "The Zyzzyva told the quokka, “ptarmigan!” 🐧 axolotl"


def assert_no_secret(text: str) -> None:
    found = [word for word in SECRETS if word in text.lower()]
    assert not found, f"{found} in {text}"


# --- few writes -------------------------------------------------------------------------------------------------------


class Recorded:
    """A descriptor that keeps each write apart, as the system sees it."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs
        self.descriptor = theirs.fileno()
        self._writes: list[bytes] = []

    @property
    def writes(self) -> list[bytes]:
        while select.select([self._ours], [], [], 0)[0]:
            self._writes.append(self._ours.recv(1 << 20))
        return self._writes

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def file() -> Iterator[Recorded]:
    recorded = Recorded()
    yield recorded
    recorded.close()


async def test_lines_of_one_turn_of_the_event_loop_leave_in_one_write_and_in_order(file: Recorded) -> None:
    lines = LineWriter(file.descriptor)
    for turn in range(3):
        for number in range(5):
            lines.info(b"%d.%d\n" % (turn, number))
        assert len(file.writes) == turn
        await asyncio.sleep(0)
    assert file.writes == [b"".join(b"%d.%d\n" % (turn, number) for number in range(5)) for turn in range(3)]


async def test_no_write_is_larger_than_a_pipe_takes_whole_or_cuts_a_line(file: Recorded) -> None:
    lines = LineWriter(file.descriptor)
    sent = [b"%03d" % number + b"x" * (number * 7 % 900) + b"\n" for number in range(200)]
    for line in sent:
        lines.info(line)
    while len(b"".join(file.writes)) < len(b"".join(sent)):
        await asyncio.sleep(0)
    assert b"".join(file.writes) == b"".join(sent)
    assert all(write.endswith(b"\n") and len(write) <= select.PIPE_BUF for write in file.writes)
    assert len(file.writes) < len(sent) / 4


async def test_a_line_longer_than_a_pipe_takes_whole_arrives_whole(file: Recorded) -> None:
    lines = LineWriter(file.descriptor)
    lines.info(b"x" * 10_000)
    lines.info(b"after it")
    await asyncio.sleep(0)
    assert b"".join(file.writes) == b"x" * 10_000 + b"\nafter it\n"


def test_without_an_event_loop_a_line_is_written_at_once(file: Recorded) -> None:
    lines = LineWriter(file.descriptor)
    lines.info(b"one\n")
    lines.error(b"two\n")
    assert file.writes == [b"one\n", b"two\n"]


# --- who reads --------------------------------------------------------------------------------------------------------


class Pipe:
    """A pipe that takes one page, a writer to it, and a count of the lines that it did not write."""

    def __init__(self) -> None:
        reads, self.writes = os.pipe()
        self.reader = os.fdopen(reads, "rb", 0)
        fcntl.fcntl(self.writes, fcntl.F_SETPIPE_SZ, 4096)
        self._counter = Counter("dropped", "Lines.", registry=CollectorRegistry())
        self.lines = LineWriter(self.writes, self._counter)

    @property
    def dropped(self) -> float:
        return self._counter._value.get()

    def read(self) -> bytes:
        """What is there now."""
        return self.reader.read(1 << 20) if select.select([self.reader], [], [], 0)[0] else b""


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.reader.close()
    os.close(pipe.writes)


async def test_a_full_pipe_is_not_waited_for_and_gets_every_line_once_it_is_read(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "RETRY_SECONDS", 0.001)
    sent = [b"%05d" % number + b"x" * 95 for number in range(500)]
    for line in sent:
        pipe.lines.info(line)
    await asyncio.sleep(0)
    received = b""
    async with asyncio.timeout(30):
        while received.count(b"\n") < len(sent):
            received += pipe.read()
            await asyncio.sleep(0.001)
    assert received.splitlines() == sent
    assert pipe.dropped == 0


async def test_lines_beyond_what_may_be_held_are_dropped_and_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_HELD_BYTES", 1000)
    for _ in range(30):
        pipe.lines.info(b"x" * 99)
    assert pipe.dropped == 20
    await asyncio.sleep(0)
    assert pipe.read() == (b"x" * 99 + b"\n") * 10
    pipe.lines.info(b"there is room again")
    await asyncio.sleep(0)
    assert pipe.read() == b"there is room again\n"
    assert pipe.dropped == 20


def test_a_pipe_that_nobody_reads_any_more_takes_nothing_and_raises_nothing(pipe: Pipe) -> None:
    pipe.reader.close()
    for _ in range(3):
        pipe.lines.info(b"a line")
    assert pipe.dropped == 3


def test_a_full_pipe_keeps_nobody_from_ending(pipe: Pipe) -> None:
    for _ in range(500):
        pipe.lines.info(b"x" * 99)
    pipe.lines.flush(timeout_seconds=0.01)
    assert len(pipe.read()) <= 4096


def test_who_else_holds_the_pipe_still_waits_for_its_reader(pipe: Pipe) -> None:
    assert not fcntl.fcntl(pipe.writes, fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_process_without_an_output_logs_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    monkeypatch.setattr("sys.stdout", None)
    logs.configure("info", log_format)
    logs.logger().info("nobody hears it")


# --- never a word of an exception -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_exceptions_that_libraries_log_lose_their_words_but_not_their_place(
    capfd: pytest.CaptureFixture[str], log_format: str
) -> None:
    logs.configure("info", log_format)
    try:
        raise ValueError(SECRET_TEXT)
    except ValueError:
        logging.getLogger("some.library").exception("it failed")
    out, err = capfd.readouterr()
    assert_no_secret(out + err)
    assert "it failed" in out
    assert "ValueError" in out
    assert "test_logging.py" in out


def test_an_exception_that_a_task_was_left_with_is_logged_without_its_words(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    async def fail() -> None:
        raise ValueError(SECRET_TEXT)

    async def leave() -> None:
        task = asyncio.create_task(fail())
        await asyncio.wait([task])
        del task  # asyncio now logs that nobody asked how it ended

    asyncio.run(leave())
    out, err = capfd.readouterr()
    assert "never retrieved" in out
    assert_no_secret(out + err)


# --- formats and levels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_lines_below_the_level_are_left_out(capfd: pytest.CaptureFixture[str], level: str, expected: list[str]) -> None:
    logs.configure(level, "json")
    for name in ("debug", "info", "warning", "error"):
        getattr(logs.logger(), name)("heard", place=name)
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["place"] for line in lines] == [line["level"] for line in lines] == expected


def test_setting_up_twice_does_not_write_twice(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")
    logs.configure("info", "json")
    logs.logger().info("ours")
    logging.getLogger("uvicorn.error").warning("theirs")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["event"] for line in lines] == ["ours", "theirs"]


def test_values_that_json_does_not_know_are_written_as_text(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logs.logger().info("odd", path=BUNDLED, number=float("inf"), text="ü\n\x00")
    line = json.loads(capfd.readouterr().out)
    assert line["path"] == str(BUNDLED)
    assert line["text"] == "ü\n\x00"


def test_the_place_of_an_exception_is_file_line_and_function() -> None:
    def inner() -> None:
        raise ValueError(SECRET_TEXT)

    with pytest.raises(ValueError) as caught:
        inner()
    places = logs.stack_of(caught.value)
    assert re.fullmatch(r".*test_logging\.py:\d+ inner", places[-1])
    assert_no_secret(str(places))


async def test_a_sampler_lets_some_lines_through_each_second_and_says_how_many_it_did_not(monkeypatch) -> None:
    timers: list[Callable[[], None]] = []
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda delay, callback: timers.append(callback))
    sampler = logs.Sampler("more of them", 3)
    with capture_logs() as lines:
        assert [sampler.lets() for _ in range(10)] == [True] * 3 + [False] * 7
        timers.pop()()
        assert [sampler.lets() for _ in range(3)] == [True] * 3
        timers.pop()()
        assert sampler.lets()
    assert [(line["event"], line["count"]) for line in lines] == [("more of them", 7)]
    assert len(timers) == 1
