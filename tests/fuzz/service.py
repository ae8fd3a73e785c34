"""The real application with a real tokenizer, in this process, over a model that says the same of everything; and
what must hold of it after every request."""

import asyncio
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import structlog

from app.artifact.datatypes import Tensors
from app.runtime.loading import load_model
from app.runtime.session import Model
from tests.text_model import text_model
from tests.unit.http.asgi import Served

# Only ends what hangs.
PATIENCE_SECONDS = 60


def undecided() -> Model:
    """The tests' own model, without the time that it takes, or an opinion."""
    model = load_model(text_model())
    manifest = model.artifact.manifest

    def infer(inputs: Tensors) -> Tensors:
        rows, share = len(next(iter(inputs.values()))), 1 / len(manifest.labels)
        return {spec.name: np.full((rows, len(manifest.labels)), share, np.float32) for spec in manifest.outputs}

    return replace(model, infer=infer)


class Loop(asyncio.SelectorEventLoop):
    """An event loop that keeps what it was asked to do later, and what went wrong in it."""

    def __init__(self) -> None:
        super().__init__()
        self.timers: list[asyncio.TimerHandle] = []
        self.wrong: list[Any] = []
        self.set_exception_handler(lambda _, context: self.wrong.append(context))

    def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
        handle = super().call_at(*args, **kwargs)
        self.timers.append(handle)
        return handle


class Service:
    """`served`: the application. `logged`: what it and its libraries logged, as text, since the last `require_calm`."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.served = Served(undecided(), max_queue_wait_ms=PATIENCE_SECONDS * 1000)
        self.logged: list[tuple[str, str]] = []
        structlog.configure(processors=[self._own])
        handler = logging.Handler()
        handler.emit = self._theirs  # type: ignore[method-assign]
        logging.getLogger().handlers[:] = [handler]

    def _own(self, _: object, level: str, event: Any) -> Any:
        self.logged.append((level, repr(event)))
        raise structlog.DropEvent

    def _theirs(self, record: logging.LogRecord) -> None:
        text = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
        self.logged.append((record.levelname.lower(), f"{record.getMessage()} {text}"))

    def limits(self) -> Any:
        """What requests share, from the middleware that has it."""
        layer: Any = self.served.app.middleware_stack
        while layer is not None and not hasattr(layer, "limits"):
            layer = layer.app
        return layer.limits if layer is not None else None

    def require_calm(self) -> None:
        """Nothing is left of what was asked, and nothing went wrong that nobody was told of."""
        wrong = [*self.loop.wrong, *(line for line in self.logged if line[0] in ("error", "critical", "exception"))]
        self.loop.wrong.clear()
        self.logged.clear()
        assert wrong == [], wrong
        assert self.served.lifecycle.in_flight == 0
        if self.served.app.middleware_stack is not None:
            assert self.limits().held_bytes == 0


@contextmanager
def running() -> Iterator[Service]:
    """A service, and the loop that it runs on."""
    loop = Loop()
    asyncio.set_event_loop(loop)
    try:
        service = Service(loop)
        loop.run_until_complete(service.served.__aenter__())
        yield service
        loop.run_until_complete(service.served.__aexit__())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
