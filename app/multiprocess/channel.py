"""Messages between the engine and an HTTP worker, over a socket pair, each end on its event loop.

A frame is a length and a MessagePack list of all messages of one turn of the loop, so that a busy loop pays for a
system call and a wake-up of the other side once a turn, not once a message.
"""

import asyncio
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from app.batching.admission import Limits, QueueState
from app.multiprocess.metrics import Snapshot
from app.runtime.session import Provider

LENGTH_BYTES = 4
# More than the requests or the results of one turn ever are.
MAX_FRAME_BYTES = 1 << 30
# An end that leaves so much unread does not read any more.
MAX_UNREAD_BYTES = 1 << 28
ARRAY = 1


class Unit(NamedTuple):
    """As `app.runtime.tasks.Encoded`, with a key that can be read back."""

    payload: Any
    length: int
    rows: int
    key: bytes | tuple[tuple[int, ...], ...] | None
    truncated: bool


class Submit(Struct, array_like=True, tag=1):
    """Worker: run these units. deadline: on the clock of `time.monotonic()`, which processes share."""

    id: int
    units: list[Unit]
    deadline: float


class Cancel(Struct, array_like=True, tag=2):
    """Worker: nobody waits for this any more."""

    id: int


class Ready(Struct, array_like=True, tag=3):
    """Worker: has the model's tokenizer and schema, may answer."""


class Done(Struct, array_like=True, tag=4):
    """Engine: a request's results in order, and when its run began and ended."""

    id: int
    results: list[Any]
    dispatched: float
    finished: float


class Failed(Struct, array_like=True, tag=5):
    """Engine: a request's error, by the name of its class in `app.errors`."""

    id: int
    error: str
    message: str
    reason: str | None
    retry_after_seconds: int | None
    close: bool


class Stage(Struct, array_like=True, tag=6):
    """Engine: what it is at."""

    name: str


class Serve(Struct, array_like=True, tag=7):
    """Engine: the model has passed the gate."""

    digest: str
    provider: Provider
    limits: Limits


class State(Struct, array_like=True, tag=8):
    """Engine: what waits, and why no progress can be made if so. Comes when it changes, and as a sign of life."""

    queue: QueueState
    stuck: str | None


class Ask(Struct, array_like=True, tag=9):
    """Worker: a snapshot of all processes, please. Engine: of you."""

    id: int


class Part(Struct, array_like=True, tag=10):
    """The answer to Ask."""

    id: int
    snapshot: Snapshot


Message = Submit | Cancel | Ready | Done | Failed | Stage | Serve | State | Ask | Part


def _encode_other(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.ndarray):
        return msgspec.msgpack.Ext(ARRAY, pickle.dumps(value, 5))
    raise NotImplementedError(f"cannot be sent: {type(value)}")


def _decode_other(code: int, data: memoryview) -> Any:
    # From the other process of this server, over a socket that has no name.
    return pickle.loads(data)  # noqa: S301


class Channel(asyncio.Protocol):
    """One end. on_message: called with each message in the order of sending, but for answers to `ask`.

    on_lost: called when the other side is gone. last_answer: the latest to any `ask`, also one that came too late.
    """

    def __init__(self, on_message: Callable[[Message], None], on_lost: Callable[[], None]) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
        self._decoder = msgspec.msgpack.Decoder(list[Message], ext_hook=_decode_other)
        self._transport: asyncio.Transport | None = None
        self.last_answer: Snapshot | None = None
        self._asked: dict[int, asyncio.Future[Snapshot]] = {}
        self._ids = itertools.count()
        self._unsent: list[Message] = []
        self._received = bytearray()

    def send(self, message: Message) -> None:
        """Sends at the end of this turn of the event loop; silently nothing once the other side is gone."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(message)

    @property
    def unread_bytes(self) -> int:
        """What was sent and has not left this process, because the other side does not read."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    async def ask(self, timeout_seconds: float | None) -> Snapshot:
        """The other side's answer to Ask; None: whenever it comes. Raises TimeoutError."""
        number = next(self._ids)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        self.send(Ask(number))
        try:
            return await asyncio.wait_for(answer, timeout_seconds)
        finally:
            del self._asked[number]

    def close(self) -> None:
        """Ends the connection; the other side's `on_lost` is called."""
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        if self._transport is not None and self.unread_bytes > MAX_UNREAD_BYTES:
            self._transport.abort()
        elif self._transport is not None:
            frame = self._encoder.encode(messages)
            self._transport.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop, which closes the connection when this raises: for bytes that are no messages."""
        self._received += data
        while len(self._received) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "little")
            if end > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {end} bytes: expected at most {MAX_FRAME_BYTES}")
            if len(self._received) < end:
                break
            frame = bytes(self._received[LENGTH_BYTES:end])
            del self._received[:end]
            for message in self._decoder.decode(frame):
                if not isinstance(message, Part):
                    self._on_message(message)
                    continue
                self.last_answer = message.snapshot
                if (answer := self._asked.get(message.id)) is not None and not answer.done():
                    answer.set_result(message.snapshot)
