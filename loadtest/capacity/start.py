"""How long a replica takes from process start to ready: measured where it can be, else what the server says."""

import os
import subprocess
import sys
import time

from loadtest.benchmark.bench import HOST, ROOT, answers, free_port
from loadtest.capacity.load import Target
from loadtest.capacity.scrape import Reading

TRIES = 3
TIMEOUT_SECONDS = 120.0
# Interpreter and imports, before the stages that model_load_seconds counts.
IMPORT_SECONDS = 1.0
UNKNOWN_SECONDS = 10.0


def start_seconds(target: Target, reading: Reading, given: float | None) -> tuple[float, str]:
    """Seconds and where they come from."""
    if given is not None:
        return given, "--start-seconds"
    stages = reading.total("model_load_seconds")
    if stages is None:
        return UNKNOWN_SECONDS, "assumed: the server does not say (--start-seconds)"
    if target.local:
        measured = measure()
        if measured is not None:
            return measured, f"median of {TRIES} starts of `python -m app` on this machine"
    return stages + IMPORT_SECONDS, f"model_load_seconds {stages:.2f} + {IMPORT_SECONDS:g} for imports"


def measure() -> float | None:
    """The median over a few starts of this project's server with this environment's settings; None if it fails."""
    times = []
    for _ in range(TRIES):
        seconds = _once()
        if seconds is None:
            return None
        times.append(seconds)
    return sorted(times)[len(times) // 2]


def _once() -> float | None:
    port = free_port()
    env = {**os.environ, "APP_HOST": HOST, "APP_PORT": str(port)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "app"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and time.perf_counter() - started < TIMEOUT_SECONDS:
            if answers(f"http://{HOST}:{port}/ready"):
                return time.perf_counter() - started
            time.sleep(0.01)
        return None
    finally:
        process.kill()
        process.wait()
