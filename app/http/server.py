"""uvicorn, as this service runs it: sockets opened early, and a drain before its shutdown."""

import asyncio
import os
import resource
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.errors import ConfigError
from app.http.connection.limits import ConnectionLimits, never
from app.http.connection.protocol import HttpProtocol
from app.lifecycle import Lifecycle
from app.settings import Settings
from app.signals import exit_before_start, on_stop
from app.telemetry import logging
from app.telemetry.metrics import Metrics

# Longer than the idle timeout of common proxies (60 s): the side that reuses a connection must close it first.
KEEP_ALIVE_SECONDS = 65
# Connections that may wait for the event loop to accept them: as many as the kernel allows (net.core.somaxconn), since
# a client that is dropped here tries again after a second, then three.
BACKLOG = 65535
SWITCH_SECONDS = 0.0005


def listen(host: str, port: int, setting: str = "APP_PORT") -> socket.socket:
    """A listening socket. Raises ConfigError naming the address if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, TypeError) as error:  # TypeError: no encoding of a host name has these characters
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"APP_HOST={host!r} {setting}={port}: cannot listen there: {reason}") from None


def uvicorn_config(app: object, limits: ConnectionLimits) -> uvicorn.Config:
    """The one configuration of uvicorn."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="uvloop",
        http=partial(HttpProtocol, limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        # Logging is set up by the application; its own line per request replaces uvicorn's.
        log_config=None,
        access_log=False,
        server_header=False,
        # Nothing here depends on the client's address.
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # What the drain has not finished by then is cut.
        timeout_graceful_shutdown=1,
        backlog=BACKLOG,
    )


class Server(uvicorn.Server):
    """uvicorn, with a drain before its shutdown: by itself it would at once cut idle connections, also those that a
    request is on its way to."""

    def __init__(self, app: Any, lifecycle: Lifecycle, settings: Settings, metrics: Metrics) -> None:
        # Container runtimes leave 1,024 files, and a larger number to who asks.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        # Middleware that a user added has its say in every answer.
        plain = isinstance(app, FastAPI) and len(app.user_middleware) == 1
        refusal = app.state.refusals.at_the_door if plain else never
        limits = ConnectionLimits(settings.max_connections, metrics.shed, refusal, settings.max_connection_seconds)
        metrics.connections.set_function(lambda: limits.open)
        super().__init__(uvicorn_config(app, limits))
        self._lifecycle = lifecycle
        self._delay_seconds = settings.drain_delay_seconds
        self._timeout_seconds = settings.drain_timeout_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    def run_and_exit(self, *sockets: socket.socket) -> None:
        """Serves until a signal, then ends the process with exit code 0."""
        # A runner that has a result waits this long at most for a busy event loop to let it go on; the default of 5 ms
        # is as long as a whole run of the model.
        sys.setswitchinterval(SWITCH_SECONDS)
        on_stop(self.handle_exit)
        self.run(sockets=list(sockets))
        logging.flush()
        # A model's run that never ends cannot be stopped, and aborts the interpreter when that unwinds under it.
        os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; from here on a signal can be handed to the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then stop with exit code 0. Second: stop without waiting."""
        if self._loop is None:
            exit_before_start(sig, frame)
            return
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        # A signal may interrupt anything, metrics' locks included: only the loop may act on it.
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_then_stop())

    async def _drain_then_stop(self) -> None:
        lifecycle, log = self._lifecycle, logging.logger()
        lifecycle.drain()
        log.info("draining", in_flight=lifecycle.in_flight)
        # Clients with open connections learn from each answer that it is the last on its connection.
        await asyncio.sleep(self._delay_seconds)
        lifecycle.refuse()
        if not await lifecycle.idle(self._timeout_seconds):
            log.warning("drain timeout", in_flight=lifecycle.in_flight)
            for task in self.server_state.tasks:
                task.cancel()  # each is answered 503
        self.should_exit = True
