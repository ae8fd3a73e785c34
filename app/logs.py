"""Structured logs on standard output: JSON for machines, text for people. Never sees the content of a request."""

import logging
import sys
from typing import Any

import msgspec
import structlog
from structlog.typing import Processor

_ENCODER = msgspec.json.Encoder(enc_hook=str)


def _encode(event: Any, **_: Any) -> bytes:
    return _ENCODER.encode(event)


def configure(level: str, log_format: str) -> None:
    """Sets up structlog, and the standard library's loggers (uvicorn's) through it. May be called again."""
    number = logging.getLevelNamesMapping()[level.upper()]
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_json = log_format == "json"
    console: list[Processor] = [_as_lines, structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty())]
    structlog.configure(
        processors=[
            *shared,
            *([structlog.processors.JSONRenderer(serializer=_encode)] if as_json else console),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.BytesLoggerFactory(sys.stdout.buffer) if as_json else structlog.PrintLoggerFactory(),
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
