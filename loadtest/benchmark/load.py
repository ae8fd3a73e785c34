"""One load on one server of this machine: closed or open loop, its rates and latencies, and the CPU time that server
and client spent on each answer.
"""

import asyncio
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import uvloop

from loadtest.benchmark.server import Running
from loadtest.client import MAX_CONNECTIONS, Client
from loadtest.connection import Answers, Target
from loadtest.payloads import Payload
from loadtest.shapes import shape

# A closed loop's first part, not counted.
WARM_UP_SHARE = 0.2
CONNECTIONS_AT_FIRST = 64
GRACE_SECONDS = 2.0
# Before the server's threads, so that a latency does not count how long its client waited for a processor.
CLIENT_NICE = -10


@dataclass(frozen=True)
class Spent:
    """Seconds until now: wall, CPU of each of the server's processes, CPU of this client."""

    wall: float
    server: list[float]
    client: float

    @staticmethod
    def now(running: Running) -> "Spent":
        return Spent(time.perf_counter(), running.cpu_seconds(), time.process_time())


def closed(running: Running, inputs: Sequence[str | Payload], connections: int, seconds: float) -> dict[str, float]:
    """`connections` clients that each send their next request when the last is answered; a text goes to /predict."""

    async def load() -> dict[str, float]:
        # The next at once, even if refused: the server must bear that.
        client = _client(running, inputs, back_off_seconds=0.0)
        client.hold(connections)
        await asyncio.sleep(seconds * WARM_UP_SHARE)
        before, answers = Spent.now(running), Answers()
        client.answers = answers
        await asyncio.sleep(seconds * (1 - WARM_UP_SHARE))
        client.answers = Answers()
        after = Spent.now(running)
        await client.close()
        return summary(answers, before, after)

    with foremost():
        return uvloop.run(load())


def opened(
    running: Running,
    texts: list[str],
    rate: float,
    seconds: float,
    grace_seconds: float = GRACE_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> dict[str, float]:
    """Poisson arrivals at `rate` per second, whatever the server does."""

    async def load() -> dict[str, float]:
        client, answers = _client(running, texts, max_connections=max_connections), Answers()
        await client.connect(min(CONNECTIONS_AT_FIRST, max_connections))
        before = Spent.now(running)
        sent = await client.arrive(shape("constant", rate, rate, seconds), answers)
        await client.drain(grace_seconds)
        after = Spent.now(running)
        await client.close()
        return summary(answers, before, after, seconds) | {"unanswered": sent - len(answers.statuses)}

    with foremost():
        return uvloop.run(load())


def summary(answers: Answers, before: Spent, after: Spent, seconds: float | None = None) -> dict[str, float]:
    """Rates per second, over `seconds` or all of the time; latencies and CPU times in milliseconds."""
    latencies, statuses = np.array(answers.latencies), np.array(answers.statuses)
    good, bad = latencies[statuses == 200], latencies[statuses != 200]
    server = sum(after.server) - sum(before.server)
    client = after.client - before.client
    seconds = seconds or after.wall - before.wall
    counted = max(1, len(statuses))

    def percentile_ms(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", percent: float) -> float:
        return float(np.percentile(values, percent)) * 1e3 if len(values) else float("nan")

    found = {
        "requests_per_second": len(good) / seconds,
        "refused_per_second": len(bad) / seconds,
        "p50_ms": percentile_ms(good, 50),
        "p99_ms": percentile_ms(good, 99),
        "refusal_p99_ms": percentile_ms(bad, 99),
        "goodput_100ms_per_second": float((good <= 0.1).sum()) / seconds,
        "goodput_250ms_per_second": float((good <= 0.25).sum()) / seconds,
        "server_cpu_ms_per_request": server / counted * 1e3,
        "engine_cpu_ms_per_request": (after.server[0] - before.server[0]) / counted * 1e3,
        "client_cpu_share": client / max(1e-9, client + server),
    }
    statuses_seen, counts = np.unique(statuses, return_counts=True)
    found |= {f"status_{code}": count for code, count in zip(statuses_seen.tolist(), counts.tolist(), strict=True)}
    return {name: round(value, 4) for name, value in found.items()}


@contextmanager
def foremost() -> Iterator[None]:
    """This thread goes first, where that is allowed (as root); a server that is started later does not inherit it."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, CLIENT_NICE)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def allow_connections() -> None:
    """An open loop holds thousands of connections; many shells allow a thousand files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))


def _client(running: Running, inputs: Sequence[str | Payload], **options: Any) -> Client:
    payloads = [
        Payload("/predict", msgspec.json.encode({"text": each})) if isinstance(each, str) else each for each in inputs
    ]
    requests = [Target.of(running.url + each.path).post(each.body, each.headers) for each in payloads]
    return Client(Target.of(running.url), requests, **options)
