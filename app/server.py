"""uvicorn, as this service runs it: a drain before its shutdown, a bound on request heads, a socket opened early."""

import asyncio
import os
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import logs
from app.edge import Traffic
from app.errors import ConfigError
from app.exchange import CONNECTION
from app.predictor import Predictor
from app.settings import Settings

# Longer than the idle timeout of common proxies (60 s): the side that reuses a connection must close it first.
KEEP_ALIVE_SECONDS = 65
# For a whole request line and headers, from the first byte or from the connection's start.
HEAD_SECONDS = 65
# Connections that may wait for the event loop to accept them; the kernel caps it at net.core.somaxconn.
BACKLOG = 2048
MAX_HEAD_BYTES = 64 * 1024
SWITCH_SECONDS = 0.0005


def listen(host: str, port: int, count: int = 1) -> list[socket.socket]:
    """Listening sockets, all on one address; the kernel deals connections out to several of them.

    Raises ConfigError naming the address if it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # The address must be nobody else's, which those that share it would not notice.
        first = socket.create_server((host, port), family=family, backlog=BACKLOG)
        if count == 1:
            return [first]
        address = first.getsockname()
        first.close()
        return [
            socket.create_server(address[:2], family=family, backlog=BACKLOG, reuse_port=True) for _ in range(count)
        ]
    except (OSError, TypeError) as error:  # TypeError: no encoding of a host name has these characters
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"APP_HOST={host!r} APP_PORT={port}: cannot listen there: {reason}") from None


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which would wait for a request line and headers without end, and take them at any size."""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _data = b""
    _running: RequestResponseCycle | None = None
    on_lost: Callable[[], None] | None = None
    """Called when the client leaves."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; the first head is waited for as long as one that follows."""
        super().connection_made(transport)
        self._await_head()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's; then tells whoever asked."""
        super().connection_lost(exc)
        self._end_wait()
        if self._running is not None:
            # uvicorn tells the newest request alone; the one being answered may have others behind it.
            self._running.disconnected = True
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        """As uvicorn's; ends a connection whose head still goes on beyond MAX_HEAD_BYTES or HEAD_SECONDS."""
        self._data = data
        super().data_received(data)
        self._data = b""
        if self._in_head:
            if self._head_timer is None:
                self._await_head()
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("Request line and headers too large.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Called by uvicorn for each request when its turn has come."""
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _should_upgrade(self) -> bool:
        """Asked by uvicorn where the parser stops behind a head. A tunnel is refused like any other method."""
        return self.parser.get_method() != b"CONNECT"

    def handle_websocket_upgrade(self) -> None:
        """Called by uvicorn for a head that asks for another protocol, as Java's client does for HTTP/2. A server may
        stay with this one: the head goes to the parser again, without the wish, and then what came behind it."""
        stop, data = sys.exc_info()[1], self._data  # uvicorn is handling it
        if not isinstance(stop, HttpParserUpgrade) or not data:  # one after the other: nobody means that
            self.send_400_response("Invalid HTTP request received.")
            return
        head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        head += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._data = b""
        # Another parser: the old one may take this connection's requests for ended.
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        super().data_received(b"\r\n".join([*head, b"", data[stop.args[0] :]]))

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in the one shape of every error."""
        body = b'{"error":"%s"}' % msg.encode()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head = False
        self._end_wait()
        super().on_headers_complete()


def uvicorn_config(app: object) -> uvicorn.Config:
    """The one configuration of uvicorn."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="uvloop",
        http=HttpProtocol,
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

    def __init__(
        self,
        config: uvicorn.Config,
        predictor: Predictor,
        traffic: Traffic,
        settings: Settings,
        *,
        insist: bool = True,
    ) -> None:
        """insist: whether a second signal stops without waiting."""
        super().__init__(config)
        self._insist = insist
        self._predictor = predictor
        self._traffic = traffic
        self._delay = settings.drain_delay_seconds
        self._timeout = settings.drain_timeout_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    def run_and_exit(self, sock: socket.socket) -> None:
        """Serves until a signal, then ends the process with exit code 0."""
        # A runner that has a result waits this long at most for a busy event loop to let it go on; the default of 5 ms
        # is as long as a whole run of the model.
        sys.setswitchinterval(SWITCH_SECONDS)
        # Container runtimes leave 1,024 files; connections beyond would be reset, and nothing would say so.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.run(sockets=[sock])
        sys.stdout.flush()
        # A model's run that never ends cannot be stopped, and aborts the interpreter when that unwinds under it.
        os._exit(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; from here on a signal can be handed to the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, then stop with exit code 0. Second: stop without waiting."""
        if self._loop is None or (self._drain is not None and self._insist):
            self.should_exit = self.force_exit = True
            return
        # A signal may interrupt anything, metrics' locks included: only the loop may act on it.
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._drain_then_stop())

    async def _drain_then_stop(self) -> None:
        log = logs.logger()
        self._predictor.leave()
        log.info("draining", in_flight=self._traffic.in_flight)
        # Clients with open connections learn from each answer that it is the last on its connection.
        await asyncio.sleep(self._delay)
        self._predictor.drain()
        if not await self._traffic.idle(self._timeout):
            log.warning("drain timeout", in_flight=self._traffic.in_flight)
            for task in self.server_state.tasks:
                task.cancel()  # each is answered 503
        self.should_exit = True
