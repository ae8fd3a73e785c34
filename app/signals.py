"""The signals that end the service, heard from its first line on: one that comes before there is anything to drain ends
it at once, with exit code 0. Needs nothing but the standard library, so that it is there before what takes its time.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

Handler = Callable[[int, FrameType | None], object]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def on_stop(handler: Handler) -> None:
    """Calls `handler` at each of them, but not at a SIGHUP that `nohup` has made to be ignored."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_before_start(_: int, __: FrameType | None) -> None:
    """The handler until there is another."""
    os._exit(0)
