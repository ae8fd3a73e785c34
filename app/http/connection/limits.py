"""What all connections of a process share: how many there may be, and how many bytes they may hold, sent or unsent.

Knows nothing of HTTP.
"""

import asyncio
import math
import random
import resource
from collections.abc import Callable
from typing import Any, Protocol

from app.batching.deadlines import Deadlines
from app.telemetry import logging

# Of requests that are not whole yet or wait for their turn, and of answers that nobody reads.
MAX_HELD_BYTES = 16 << 20
MAX_UNSENT_BYTES = 32 << 20
# For all else that is a file, and for connections that come in one turn of the event loop.
RESERVED_FILES_RATIO = 0.25
LOG_SECONDS = 10.0
# A client that has said all it will say tells so at once; one that gives up, later.
BEAT_SECONDS = 0.02
BEATS = 2
# Connections that began together do not all end together.
AGE_JITTER_RATIO = 0.1
Refusal = Callable[[Any, bool], Any]


def never(scope: Any, early: bool) -> None:
    """The refusal of nothing."""


class LimitedConnection(Protocol):
    """What is limited."""

    transport: asyncio.Transport


class ConnectionLimits:
    """open: how many connections there are. deadlines: of whatever they wait for. beats: grows for a while after each
    `watch`."""

    def __init__(
        self, max_connections: int, shed: Any, refusal: Refusal = never, max_connection_seconds: float = 0
    ) -> None:
        """shed: a counter for each reason: too many of them (`count`), `memory`, answers not read (`unread`).

        refusal: the answer to a request that need not be asked of the application, since it would only be refused; or
        None. From its ASGI scope, and whether its client comes back earlier than it was told to.

        max_connection_seconds: the age from which a connection's answer is its last; 0: none is.
        """
        self.refusal = refusal
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_age_seconds = max_connection_seconds or math.inf
        self._max_connections = max(1, min(max_connections, int(files * (1 - RESERVED_FILES_RATIO))))
        self._shed = shed
        self.open = 0
        # In the order in which they began to wait for a request.
        self._idle: dict[LimitedConnection, None] = {}
        self._held_bytes = 0
        self._unsent: dict[LimitedConnection, int] = {}
        self._unsent_bytes = 0
        self._logged: dict[str, float] = {}
        self.deadlines = Deadlines()
        self.beats = 0
        self._beats_left = 0

    def opened(self, connection: LimitedConnection) -> None:
        """One more. Beyond the limit the one that has waited for a request for longest gives way, or else this one."""
        self.open += 1
        if self.open > self._max_connections:
            self.end(next(iter(self._idle), connection), "count")

    def old_at(self, now: float) -> float:
        """When one that begins now is old, on the same clock."""
        jitter = random.uniform(1 - AGE_JITTER_RATIO, 1 + AGE_JITTER_RATIO)  # noqa: S311 - no secret
        return now + self._max_age_seconds * jitter

    def lost(self, connection: LimitedConnection, held_bytes: int) -> None:
        """One less, with what it held."""
        self.open -= 1
        self._held_bytes -= held_bytes
        self.busy(connection)
        self.sent(connection)

    def idle(self, connection: LimitedConnection) -> None:
        """It waits for a request from now on."""
        self._idle[connection] = None

    def busy(self, connection: LimitedConnection) -> None:
        """It has one."""
        self._idle.pop(connection, None)

    def hold(self, connection: LimitedConnection, more_bytes: int) -> None:
        """It holds so much more (or less) of requests that are not whole or wait. Beyond the limit it ends."""
        self._held_bytes += more_bytes
        if more_bytes > 0 and self._held_bytes > MAX_HELD_BYTES:
            self.end(connection, "memory")

    def unsent(self, connection: LimitedConnection) -> None:
        """Its client does not read. Beyond the limit those end that have not read for longest, but never this one."""
        self.sent(connection)
        self._unsent[connection] = connection.transport.get_write_buffer_size()
        self._unsent_bytes += self._unsent[connection]
        while self._unsent_bytes > MAX_UNSENT_BYTES and len(self._unsent) > 1:
            self.end(next(iter(self._unsent)), "unread")

    def sent(self, connection: LimitedConnection) -> None:
        """Its client reads."""
        self._unsent_bytes -= self._unsent.pop(connection, 0)

    def end(self, connection: LimitedConnection, reason: str) -> None:
        """Ends it without waiting, counts that, and says so in the log, if not too often."""
        self.busy(connection)
        self.sent(connection)
        connection.transport.abort()
        self._shed[reason].inc()
        now = asyncio.get_running_loop().time()
        if now - self._logged.get(reason, -LOG_SECONDS) >= LOG_SECONDS:
            self._logged[reason] = now
            most = self._max_connections
            logging.logger().warning("connection shed", reason=reason, connections=self.open, max_connections=most)

    def watch(self, loop: asyncio.AbstractEventLoop) -> int:
        """`beats`. It will be greater by two in a while, during which `loop` has turned and turned again."""
        if not self._beats_left:
            loop.call_later(BEAT_SECONDS, self._beat, loop)
        self._beats_left = BEATS
        return self.beats

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self.beats += 1
        self._beats_left -= 1
        if self._beats_left:
            loop.call_later(BEAT_SECONDS, self._beat, loop)
