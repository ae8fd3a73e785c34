"""Bytes in pieces to the real connection, under uvicorn's configuration and with the real application behind it.

Whatever they are, what comes back is HTTP, no more of it than was asked for, and nothing stays behind.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import h11
from hypothesis import strategies as st
from uvicorn.server import ServerState

from app.http.connection.limits import ConnectionLimits
from app.http.server import uvicorn_config
from app.telemetry.metrics import Children, Metrics
from tests.fuzz.service import NAME, PATIENCE_SECONDS, Loop, running

# Pieces as they arrive, an empty one for a turn of the event loop; then how the client ends.
Case = tuple[list[bytes], str]
EXAMPLES = 250
# What runs for a connection, not for a request.
LONG_SECONDS = 10
# What the connections' limits know of those that there are.
COUNTED = ("open", "_idle", "_held_bytes", "_unsent", "_unsent_bytes")
MODEL = b"/v2/models/" + NAME.encode()

METHODS = [
    b"GET",
    b"POST",
    b"HEAD",
    b"POST",
    b"PUT",
    b"OPTIONS",
    b"CONNECT",
    b"TRACE",
    b"PRI",
    b"get",
    b"M-SEARCH",
    b"",
]
TARGETS = [
    *(b"/predict", b"/predict/batch", b"/live", b"/ready", b"/metrics", b"/v2", b"/v2/models/stats", b"/openapi.json"),
    *(MODEL, MODEL + b"/infer", MODEL + b"/config", b"/docs", b"/", b"*"),
    *(b"/v2/models/x/infer", b"/v2/models/%2e%2e/infer", b"/v2/models//infer", b"/v2/models/\xc3\xa9/infer"),
    *(b"http://x/predict", b"http://x", b"http://", b"http://[::1", b"https://u:p@x:1/live", b"x:443", b"//", b"//x"),
    *(b"/predict?a=%ff#b", b"/%00", b"/%", b"/\xff", b"/live/", b"/predict/../live", b"?", b"/live\x00", b"/a b", b""),
]
VERSIONS = [b"HTTP/1.1"] * 6 + [
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.2",
    b"http/1.1",
    b"HTTP/1.1 ",
    b"X",
    b"",
]
HEADERS = [
    *(b"host: x", b"host: x", b"Host: y", b"host:", b"host: \xff", b"host: a b", b"host: x/y", b"host : x"),
    *(b"content-type: application/json",) * 4,
    *(b"content-type: text/plain", b"content-type: application/octet-stream", b"Content-Type: APPLICATION/JSON ; q"),
    *(b"content-length: 0", b"content-length: 5", b"content-length: 15", b"content-length: 99999999"),
    *(
        b"content-length: -1",
        b"content-length: +5",
        b"content-length: 5, 5",
        b"content-length: 1e1",
        b"content-length:",
    ),
    *(b"content-length: 18446744073709551616", b"content-length: 05", b"Content-Length: 5"),
    *(b"transfer-encoding: chunked",) * 4,
    *(b"transfer-encoding: gzip, chunked", b"transfer-encoding: identity", b"transfer-encoding: chunked, chunked"),
    *(
        b"Transfer-Encoding: xchunked",
        b"transfer-encoding:\tchunked",
        b"transfer-encoding: chunked\x0b",
        b"te: trailers",
    ),
    *(b"connection: close", b"connection: keep-alive", b"connection: Upgrade, HTTP2-Settings", b"connection: upgrade"),
    *(b"connection: close, upgrade", b"connection: \xff", b"upgrade: h2c", b"upgrade: websocket", b"upgrade:"),
    *(
        b"http2-settings: AAMAAABkAAQAAP__",
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        b"sec-websocket-version: 13",
    ),
    *(b"expect: 100-continue", b"expect: 100-Continue", b"expect: 200-ok", b"expect: 100-continue, x"),
    *(b"content-encoding: gzip", b"content-encoding: deflate", b"content-encoding: identity", b"content-encoding: br"),
    *(
        b"x-request-id: one",
        b"x-request-id: a\tb",
        b"x-request-id: \xe9",
        b"x-request-id:",
        b"inference-header-content-length: 3",
    ),
    *(
        b"inference-header-content-length: \xb2",
        b"inference-header-content-length: -1",
        b" folded",
        b"\tfolded",
        b":",
        b"x",
    ),
    *(b"x\x00: y", b"x: \x00", b"x: a\rb", b"\xff: x", b"x-long: " + b"x" * 9000, b"cookie: " + b"a=b;" * 2000),
]
# What leaves a request as good as it is.
HARMLESS = [
    *(
        b"content-type: application/json",
        b"connection: keep-alive",
        b"connection: Upgrade, HTTP2-Settings",
        b"upgrade: h2c",
    ),
    *(
        b"expect: 100-continue",
        b"x-request-id: one",
        b"x-request-id: \xe9",
        b"te: trailers",
        b"content-encoding: identity",
    ),
    *(b"inference-header-content-length: 3", b"content-encoding: gzip", b"connection: close", b"upgrade: websocket"),
]
BODIES = [
    *(
        b'{"text":"hi"}',
        b'{"text":"hi"}',
        b'{"texts":["a","b"]}',
        b'{"texts":[]}',
        b'{"text":"\\ud800"}',
        b"{",
        b"null",
    ),
    b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","data":["a"]}]}',
    b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":5}}]}\1\0\0\0a',
    *(
        b"",
        b"\x1f\x8b\x08\0",
        b"\xff\xfe",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 70_000,
        b"[" * 5000,
        b'{"texts":[' + b'"a",' * 40 + b'"b"]}',
    ),
]
SIZES = [b"0", b"00", b"fffffffff", b"ffffffffffffffffff", b"-1", b"0x5", b" 5", b"5 ", b"", b"g"]
EXTENSIONS = [b""] * 12 + [b";a", b";a=b", b';a="b;\r"', b";" + b"x" * 5000, b" ; a", b";\x00"]
ENDS = [b"\r\n"] * 40 + [b"\n", b"\r", b"\r\r\n", b""]
ENDINGS = ["close", "half", "reset", "unread"]


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    """A body in chunks, mostly as it should be, with trailers."""
    parts = []
    body = draw(st.sampled_from(BODIES))
    cut = draw(st.integers(0, len(body)))
    for piece in filter(None, (body[:cut], body[cut:])):
        size = draw(st.sampled_from(SIZES)) if draw(st.integers(0, 31)) == 31 else b"%x" % len(piece)
        parts += [
            size,
            draw(st.sampled_from(EXTENSIONS)),
            draw(st.sampled_from(ENDS)),
            piece,
            draw(st.sampled_from(ENDS)),
        ]
    parts += [b"0", draw(st.sampled_from(EXTENSIONS)), b"\r\n"]
    for line in draw(st.lists(st.sampled_from(HARMLESS + HEADERS[:20]), max_size=3)):
        parts += [line, b"\r\n"]
    return b"".join([*parts, draw(st.sampled_from(ENDS))])


@st.composite
def request(draw: st.DrawFn) -> bytes:
    """One request, good or nearly."""
    good = draw(st.sampled_from([2, 1, 2, 1, 2, 0]))
    method, target = (
        (b"POST", b"/predict") if good == 2 else (draw(st.sampled_from(METHODS)), draw(st.sampled_from(TARGETS)))
    )
    version = draw(st.sampled_from(VERSIONS)) if good == 0 else b"HTTP/1.1"
    lines = [b"host: x", b"content-type: application/json"] if good else []
    many = draw(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 98, 101]))
    lines += [b"x-%d: y" % number for number in range(many)] + draw(
        st.lists(st.sampled_from(HARMLESS if good else HEADERS), max_size=4)
    )
    match draw(st.sampled_from([0, 2, 2, 3] if good else [0, 1, 2, 3])):
        case 0:
            body = draw(chunked())
            lines.append(b"transfer-encoding: chunked")
        case 1:
            body = draw(st.sampled_from(BODIES))
        case 2:
            body = draw(st.sampled_from(BODIES))
            lines.append(b"content-length: %d" % len(body))
        case _:
            body = b""
    if good != 2:
        lines = draw(st.permutations(lines)) if len(lines) < 8 else lines
    ends = draw(st.sampled_from(ENDS)) if good == 0 else b"\r\n"
    return ends.join([b" ".join((method, target, version)), *lines, b""]) + ends + body


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Requests one behind the other, sometimes damaged, cut at any place."""
    stream = bytearray(b"".join(draw(st.lists(request(), min_size=1, max_size=4))))
    damage = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=2)
    for place, change in draw(damage) if draw(st.integers(0, 3)) == 3 else ():
        stream[place : place + draw(st.integers(0, 2))] = change
    cuts = sorted(set(draw(st.lists(st.integers(1, 600), max_size=5))))
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        pieces.append(bytes(stream[start:end]))
        pieces += [b""] * draw(st.integers(0, 3))
    return pieces, draw(st.sampled_from(ENDINGS))


CASES = cases()


class Pipe(asyncio.Transport):
    """The client's side: what it was sent, until it or the server closes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self._loop = loop
        self._closing = False
        self._lost = False
        self.protocol: Any = None
        self.paused = False
        self.written = bytearray()

    def write(self, data: Any) -> None:
        if not self._closing:
            self.written += data

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self.lose)

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def lose(self, reason: Exception | None = None) -> None:
        """The connection is gone."""
        self._closing = True
        if not self._lost:
            self._lost = True
            self.protocol.connection_lost(reason)


class Connections:
    """Makes connections, one after the other."""

    def __init__(self, app: Any, loop: Loop) -> None:
        self._app = app
        self._loop = loop
        self._limits = ConnectionLimits(1000, Children(Metrics(()).connections_shed, []))
        self._config = uvicorn_config(self, self._limits)
        self._config.load()
        self._methods: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._methods.append(scope["method"])
        await self._app(scope, receive, send)

    async def exchange(self, pieces: list[bytes], ending: str) -> tuple[bytes, list[str]]:
        """What came back, and the methods of the requests that reached the application."""
        loop, state = self._loop, ServerState()
        self._methods = []
        loop.timers.clear()
        protocol = self._config.http_protocol_class(config=self._config, server_state=state, app_state={}, _loop=loop)  # type: ignore[call-arg]
        pipe = Pipe(loop)
        pipe.protocol = protocol
        protocol.connection_made(pipe)
        if ending == "unread":
            protocol.pause_writing()
        for piece in pieces:
            if pipe.paused:
                await settled(state)
            if pipe.is_closing() or pipe.paused:
                break
            if piece:
                protocol.data_received(piece)
            else:
                await asyncio.sleep(0)
        await settled(state)
        if ending == "half" and not pipe.is_closing():
            if not protocol.eof_received():
                pipe.close()
            # It sends no more, so its last answer is the end.
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not pipe.is_closing():
                    await asyncio.sleep(0.001)
            await settled(state)
        pipe.lose(ConnectionResetError() if ending == "reset" else None)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while state.tasks:
                await asyncio.wait(state.tasks)
        await asyncio.sleep(0)
        assert not state.connections
        left = {name: vars(self._limits)[name] for name in COUNTED}
        assert not any(left.values()), left
        later = loop.time() + LONG_SECONDS
        running = [handle for handle in loop.timers if not handle.cancelled() and handle.when() > later]
        assert running == [], running
        return bytes(pipe.written), self._methods


async def settled(state: ServerState) -> None:
    """Until all that can be answered is; what waits for more of its body is not waited for long."""
    for _ in range(3):
        await asyncio.sleep(0)
    while state.tasks:
        done, _ = await asyncio.wait(state.tasks, timeout=0.01)
        await asyncio.sleep(0)
        if not done:
            return


def check_answers(written: bytes, methods: list[str]) -> None:
    """HTTP, an answer for each request at most, one more where the last bytes were no request."""
    connection = h11.Connection(h11.CLIENT)
    connection.receive_data(written)
    answers = 0
    while connection.trailing_data[0]:
        method = "HEAD" if answers < len(methods) and methods[answers] == "HEAD" else "GET"
        connection.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        connection.send(h11.EndOfMessage())
        body, answer = b"", None
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                # The client was gone before the rest was written; an interim answer may stand alone.
                assert answer is None or not body.startswith(b"{"), "an answer is not whole"
                return
            if isinstance(event, h11.Response):
                answer = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
        assert answer is not None
        answers += 1
        assert answers <= len(methods) + 1, "more answers than requests"
        assert answer.status_code != 500, body
        headers = dict(answer.headers)
        if answer.status_code >= 400 and method != "HEAD":
            assert headers[b"content-type"] == b"application/json"
            assert isinstance(json.loads(body)["error"], str)
        if connection.our_state is h11.MUST_CLOSE or connection.their_state in (h11.MUST_CLOSE, h11.CLOSED):
            rest = connection.trailing_data[0]
            # What refuses the bytes behind a HEAD goes out in the place of its answer, with a body.
            refusal = method == "HEAD" and answer.status_code == 400 and b"%d" % len(rest) == headers[b"content-length"]
            assert rest == b"" or refusal, "bytes behind the last answer"
            return
        connection.start_next_cycle()


@contextmanager
def checking() -> Iterator[Callable[[Case], None]]:
    """The check of a case; raises what is wrong."""
    with running() as service:
        connections = Connections(service.served.app, service.loop)

        def check(case: Case) -> None:
            written, methods = service.loop.run_until_complete(connections.exchange(*case))
            service.require_calm()
            check_answers(written, methods)

        yield check
