"""An HTTP worker as the engine sees it: its process, its channel, whether it answers. Knows nothing of the model."""

import asyncio
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from app.batching.queue import PendingRequest
from app.multiprocess.channel import Channel, Message
from app.telemetry import logging

ASK_SECONDS = 2.0
QUESTION_EVERY_SECONDS = 1.0
# A loop that is busy with a large body or a slow disk is back within one or two, and a liveness probe takes longer.
SILENCE_SECONDS = 10


@dataclass(slots=True, eq=False)
class Worker:
    """pending: its requests that wait or run. answers: whether it answered the last question in time."""

    process: asyncio.subprocess.Process
    pending: dict[int, PendingRequest] = field(default_factory=dict)
    ready: bool = False
    answers: bool = False
    channel: Channel = field(init=False)

    @classmethod
    async def start(cls, listening: socket.socket, on_message: Callable[["Worker", Message], None]) -> "Worker":
        """Starts the process, which takes `listening` over. Raises OSError if there can be no more processes."""
        ours, theirs = socket.socketpair()
        # A session of its own: Ctrl-C in a terminal is for the engine, which tells the workers.
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app.multiprocess.http_worker", str(listening.fileno()), str(theirs.fileno()),
            pass_fds=(listening.fileno(), theirs.fileno()), start_new_session=True,
        )  # fmt: skip
        listening.close()
        theirs.close()
        worker = cls(process)
        # Its end is noticed by the end of its process.
        loop, hear = asyncio.get_running_loop(), partial(on_message, worker)
        _, worker.channel = await loop.create_unix_connection(partial(Channel, hear, lambda: None), sock=ours)
        return worker

    async def refresh(self) -> None:
        """Brings `channel.last_answer` up to date, but waits only once for a worker that does not answer."""
        if self.answers:
            try:
                await self.channel.ask(ASK_SECONDS)
            except TimeoutError:
                self.answers = False

    async def require_answers(self) -> None:
        """Asks again and again, and kills a worker that once answered and does not any more."""
        # Until it has started, which may take its time.
        await self.channel.ask(None)
        while True:
            self.answers = True
            await asyncio.sleep(QUESTION_EVERY_SECONDS)
            question = asyncio.create_task(self.channel.ask(None))
            # Waits of this loop, not time that passed: after a pause of the whole machine both go on where they were.
            for _ in range(SILENCE_SECONDS):
                if (await asyncio.wait([question], timeout=1.0))[0]:
                    break
                self.answers = False
            else:
                break
        if self.process.returncode is None:
            logging.logger().error("an HTTP worker does not answer", process_id=self.process.pid)
            self.process.kill()
