"""How long a replica takes from process start to ready: measured where it can be, else what the server says."""

import statistics
import sys

from loadtest.benchmark.server import HOST, Command, serving
from loadtest.capacity.scrape import Reading
from loadtest.connection import Target

TRIES = 3
# Interpreter and imports, before the stages that model_load_seconds counts.
IMPORT_SECONDS = 1.0
UNKNOWN_SECONDS = 10.0
# With the settings of this environment.
COMMAND = Command([sys.executable, "-m", "app"], "/ready", {"APP_HOST": HOST, "APP_PORT": "{port}"})


def start_seconds(target: Target, reading: Reading, given: float | None) -> tuple[float, str]:
    """Seconds and where they come from."""
    if given is not None:
        return given, "--start-seconds"
    stages = reading.total("model_load_seconds")
    if stages is None:
        return UNKNOWN_SECONDS, "assumed: the server does not say (--start-seconds)"
    if target.local:
        try:
            return statistics.median(_once() for _ in range(TRIES)), f"median of {TRIES} starts of `python -m app` here"
        except (RuntimeError, OSError):
            pass  # the settings that the server was started with are not this environment's
    return stages + IMPORT_SECONDS, f"model_load_seconds {stages:.2f} + {IMPORT_SECONDS:g} for imports"


def _once() -> float:
    with serving(COMMAND) as running:
        return running.ready_seconds
