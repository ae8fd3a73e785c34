"""The end of a process that cannot serve: one line, and an exit code that says which kind of reason."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from app.errors import StartupError

TERMINATION_LOG = Path("/dev/termination-log")


def exit_process(error: StartupError) -> None:
    """Ends the process with the error's exit code; its one line goes to stderr and to the termination log."""
    line = f"sentiment-inference: {error}"
    print(line, file=sys.stderr, flush=True)
    if TERMINATION_LOG.exists():
        with suppress(OSError):  # a read-only file there must not hide the exit code
            # As stderr does: a path need not be UTF-8.
            TERMINATION_LOG.write_text(line, errors="backslashreplace")
    sys.stdout.flush()
    # Nothing was accepted yet, so there is nothing to unwind; the exit code survives whatever server runs us.
    os._exit(error.exit_code)
