"""Structured logs on standard output: JSON for machines, text for people. Never sees the content of a request."""

import asyncio
import logging
import select
import sys
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import Processor

_ENCODER = msgspec.json.Encoder(enc_hook=str)


class Lines:
    """A structlog logger that writes lines of bytes to a file. Those of one turn of the event loop leave in one write:
    each is a system call, and wakes whoever reads. Never more than a pipe takes in one piece, so that lines of several
    processes do not mix."""

    def __init__(self, file: BinaryIO) -> None:
        """file: buffered, so that its own `flush` writes whatever is held."""
        self._file = file
        self._held_bytes = 0
        self._due = False

    def info(self, line: bytes) -> None:
        """Takes one line; writes it at the end of this turn, or at once where no event loop runs."""
        self._held_bytes += len(line)
        if self._held_bytes > select.PIPE_BUF:
            self._file.flush()
            self._held_bytes = len(line)
        self._file.write(line)
        if self._due:
            return
        try:
            asyncio.get_running_loop().call_soon(self._write)
            self._due = True
        except RuntimeError:
            self._write()

    debug = warning = error = critical = info

    def _write(self) -> None:
        self._due = False
        self._held_bytes = 0
        self._file.flush()


def _as_json(_: Any, level: str, event: Any) -> bytes:
    """One processor for all that a line needs: each call counts where a line for each refusal is written."""
    event["level"] = level
    event["timestamp"] = datetime.now(UTC)
    return _ENCODER.encode(event) + b"\n"


def configure(level: str, log_format: str) -> None:
    """Sets up structlog, and the standard library's loggers (uvicorn's) through it. May be called again."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_json = log_format == "json"
    lines = Lines(sys.stdout.buffer)
    console: list[Processor] = [_as_lines, structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]
    structlog.configure(
        processors=[_as_json] if as_json else [*shared, *console],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=(lambda *_: lines) if as_json else structlog.PrintLoggerFactory(),
        # Not cached: a test or an embedding program may configure again.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stdout)
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


def logger() -> Any:
    """The service's logger."""
    return structlog.get_logger()
