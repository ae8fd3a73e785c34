"""Structured logs on standard output: JSON for machines, text for people. Never sees the content of a request.

Never raises into the service and never waits for whoever reads: what a closed or full pipe does not take is dropped
and counted.
"""

import asyncio
import atexit
import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
import structlog
from prometheus_client import Counter
from structlog.typing import Processor

# Lines that wait for a reader who is slow.
MAX_HELD_BYTES = 1 << 20
RETRY_SECONDS = 0.1
_ENCODER = msgspec.json.Encoder(enc_hook=str)


class LineWriter:
    """A structlog logger, and a file for the standard library's, that writes whole lines to a descriptor. Those of one
    turn of the event loop leave in one write: each is a system call, and wakes whoever reads. Never more than a pipe
    takes in one piece, so that lines of several processes do not mix and a write never blocks."""

    def __init__(self, descriptor: int, dropped: Counter | None = None) -> None:
        self._descriptor = _reopened(descriptor)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._lines: deque[bytes] = deque()
        self._held_bytes = 0
        self._due = False
        self._lock = threading.Lock()
        self._dropped = dropped

    def msg(self, line: str | bytes) -> None:
        """Takes one line; writes it at the end of this turn, or at once where no event loop runs."""
        data = line if isinstance(line, bytes) else line.encode(errors="backslashreplace")
        with self._lock:
            if self._held_bytes + len(data) > MAX_HELD_BYTES:
                self._drop()
                return
            self._lines.append(data if data.endswith(b"\n") else data + b"\n")
            self._held_bytes += len(data)
        self._write_soon(0.0)

    debug = info = warning = error = critical = fatal = failure = log = msg

    def write(self, text: str) -> None:
        """As a file, for `logging.StreamHandler`."""
        self.msg(text)

    def flush(self, timeout_seconds: float = 0.0) -> None:
        """Writes what is held, as far as the reader takes it within `timeout_seconds` each time."""
        with self._lock:
            while self._lines and self._poll.poll(timeout_seconds * 1000):
                part = [self._lines.popleft()]
                size = len(part[0])
                while self._lines and size + len(self._lines[0]) <= select.PIPE_BUF:
                    part.append(self._lines.popleft())
                    size += len(part[-1])
                data = b"".join(part)
                try:
                    written = os.write(self._descriptor, data[: select.PIPE_BUF])
                except BlockingIOError:
                    written = 0
                except OSError:  # nobody will ever read it
                    written = size
                    self._drop(len(part))
                self._held_bytes -= written
                if written < size:
                    self._lines.appendleft(data[written:])
                if not written:
                    return

    def _write_soon(self, delay_seconds: float) -> None:
        if self._due:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        self._due = True
        if delay_seconds:
            loop.call_later(delay_seconds, self._write)
        else:
            loop.call_soon(self._write)

    def _write(self) -> None:
        self._due = False
        self.flush()
        if self._lines:
            self._write_soon(RETRY_SECONDS)

    def _drop(self, lines: int = 1) -> None:
        if self._dropped is not None:
            self._dropped.inc(lines)


def _reopened(descriptor: int) -> int:
    """A pipe once more, so that writing to it never blocks here and still does for others who hold it. Where that may
    not be, as for a pipe that another user made, asking first (`poll`) must do."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return descriptor


def _standard_output() -> int:
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # none, or one that a program put in its place
        # Not number 1 as such: where it was closed at start, that may be a socket by now.
        return os.open(os.devnull, os.O_WRONLY)


_writer: LineWriter | None = None


def flush() -> None:
    """Writes what is held, before the process ends."""
    if _writer is not None:
        _writer.flush(timeout_seconds=0.1)


def _as_json(_: Any, level: str, event: Any) -> bytes:
    """One processor for all that a line needs: each call counts where a line for each refusal is written."""
    event["level"] = level
    event["timestamp"] = datetime.now(UTC)
    return _ENCODER.encode(event) + b"\n"


def configure(level: str, log_format: str, dropped: Counter | None = None) -> None:
    """Sets up structlog, and the standard library's loggers (uvicorn's) through it. May be called again.

    dropped: counts lines that were not written.
    """
    global _writer
    output = _standard_output()
    _writer = writer = LineWriter(output, dropped)
    atexit.register(flush)
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_json = log_format == "json"
    console: list[Processor] = [
        _as_lines,
        structlog.dev.ConsoleRenderer(colors=os.isatty(output)),
    ]
    structlog.configure(
        processors=[_as_json] if as_json else [*shared, *console],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: writer,
        # Not cached: a test or an embedding program may configure again.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(writer)
    handler.terminator = ""
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _without_exception_text,
                *([structlog.processors.JSONRenderer()] if as_json else console),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.INFO))
    # What libraries warn of would stand on standard error, beside the line that says why the process ended.
    logging.captureWarnings(True)


def _without_exception_text(_: Any, __: str, event: Any) -> Any:
    """An exception's message may quote what a client sent; its type and place may not."""
    info = event.pop("exc_info", None)
    if info and info is not True and info[0] is not None:
        event["error_type"] = info[0].__name__
        event["stack"] = stack_of(info[1])
        # asyncio goes on with what it knows of the task, the exception's message included.
        event["event"] = event["event"].partition("\n")[0]
    return event


def _as_lines(_: Any, __: str, event: Any) -> Any:
    """The console shows a stack as text."""
    if "stack" in event:
        event["stack"] = "\n".join(event["stack"])
    return event


def stack_of(error: BaseException) -> list[str]:
    """Where an exception came from, innermost last, without its message."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return frames


class Sampler:
    """Lets some lines through each second, and says how many it did not. For one event loop."""

    def __init__(self, event: str, lines_per_second: int) -> None:
        self._event = event
        self._most = self._left = lines_per_second
        self._skipped = 0
        self._due = False

    def lets(self) -> bool:
        """Whether the next line may be written."""
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(1.0, self._next_second)
        self._left -= 1
        self._skipped += self._left < 0
        return self._left >= 0

    def _next_second(self) -> None:
        if self._skipped:
            logger().warning(self._event, count=self._skipped)
        self._left, self._skipped, self._due = self._most, 0, False


def logger() -> Any:
    """The service's logger."""
    return structlog.get_logger()
