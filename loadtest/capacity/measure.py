"""One step: warm up, then measure until the estimates are stable, or until the time for a step is used up. Knows the
client and the server's metrics, not which step comes next.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import psutil

from loadtest.capacity import scrape, stats
from loadtest.capacity.schema import Estimate, Options, Step
from loadtest.capacity.scrape import Reading
from loadtest.client import Client
from loadtest.connection import Answers
from loadtest.shapes import shape

# Rendering metrics takes the server's time too: not often.
GAUGE_SECONDS = 1.0
LOOK_SECONDS = 0.25
# The 95th percentile needs more answers than the mean for the same precision.
P95_FACTOR = 2.0
# A server so slow that a step's time is too short for this many answers gets up to this many times as long.
LEAST_ANSWERS = 30
PATIENCE = 3
GRACE_SECONDS = 2.0
# An open loop's first part, not counted.
WARM_UP_SHARE = 0.2


def _busy_seconds() -> float:
    """CPU time that all of this machine's processes have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


class Watch:
    """The server's side and this machine's CPUs while a step runs; as an async context manager, then `seen`."""

    def __init__(self, metrics_url: str | None) -> None:
        self._metrics_url = metrics_url
        self._during: list[Reading] = []
        self.seen: dict[str, Any] = {}

    async def __aenter__(self) -> "Watch":
        self._before = await scrape.read(self._metrics_url)
        self._cpu, self._machine, self._started = time.process_time(), _busy_seconds(), time.perf_counter()
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        elapsed = time.perf_counter() - self._started
        self.seen = {
            "client_cpu_share": (time.process_time() - self._cpu) / elapsed,
            "machine_cpu_cores": (_busy_seconds() - self._machine) / elapsed,
            "server": scrape.between(self._before, self._during, await scrape.read(self._metrics_url)),
        }

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_SECONDS)
            self._during.append(await scrape.read(self._metrics_url))


def _estimates(answers: Answers, begin: float, held: float | None) -> tuple[Estimate, stats.Values, stats.Values]:
    """Rate, latencies in ms of what was answered since `begin`, statuses. `held`: so many are always in flight."""
    finished, latencies, statuses = map(np.array, (answers.finished, answers.latencies, answers.statuses))
    good = statuses == 200
    # By Little's law where it holds, else by counting.
    if held is not None and good.all():
        return stats.rate_of(latencies, held), latencies * 1e3, statuses
    return stats.rate(finished[good], begin), latencies[good] * 1e3, statuses


def summarise(answers: Answers, begin: float, end: float, held: float | None, **given: Any) -> Step:
    """The step that these answers make; `given`: which load, and what Watch has seen."""
    rate, latencies, statuses = _estimates(answers, begin, held)
    refused = int(np.isin(statuses, (429, 503)).sum())
    p50, p99 = np.percentile(latencies, (50, 99)) if len(latencies) else (math.inf, math.inf)
    return Step(
        rps=rate,
        mean_ms=float(np.mean(latencies)) if len(latencies) else math.inf,
        p50_ms=float(p50),
        p95_ms=stats.percentile(latencies, 95),
        p99_ms=float(p99),
        requests=len(latencies),
        refused=refused,
        errors=len(statuses) - len(latencies) - refused,
        seconds=end - begin,
        **given,
    )


def stable(answers: Answers, begin: float, in_flight: float, precision: float) -> bool:
    """Whether rate and 95th percentile are known well enough."""
    rate, latencies, _ = _estimates(answers, begin, in_flight)
    return rate.relative <= precision and stats.percentile(latencies, 95).relative <= precision * P95_FACTOR


async def closed_step(
    client: Client,
    metrics_url: str | None,
    in_flight: int,
    options: Options,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Step:
    """`in_flight` requests at all times. `on_progress` gets the seconds measured so far."""
    client.answers = Answers()
    client.hold(in_flight)
    started = time.perf_counter()
    # Warm: every request of the step before has been answered, and some of this one.
    while len(client.answers.finished) < 2 * in_flight or time.perf_counter() - started < options.min_step_seconds / 4:
        await asyncio.sleep(LOOK_SECONDS / 10)
        if time.perf_counter() - started > options.max_step_seconds:
            break
    async with Watch(metrics_url) as watch:
        answers = client.answers = Answers()
        begin, enough = time.perf_counter(), False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            seconds = time.perf_counter() - begin
            on_progress(seconds)
            if seconds < options.min_step_seconds:
                continue
            enough = stable(answers, begin, in_flight, options.precision_percent / 100)
            few = len(answers.finished) < LEAST_ANSWERS and seconds < PATIENCE * options.max_step_seconds
            if enough or (seconds >= options.max_step_seconds and not few):
                break
        client.answers = Answers()
    load = {"loop": "closed", "in_flight": float(in_flight), "stable": enough}
    return summarise(answers, begin, begin + seconds, float(in_flight), **load, **watch.seen)


async def open_step(
    client: Client, metrics_url: str | None, rate: float, seconds: float, most: float = math.inf
) -> Step:
    """Poisson arrivals at `rate`; those due in the first fifth warm up and are not counted. What is not answered within
    the grace after the last arrival counts as an error, so that a server that cannot follow is seen to fail. More than
    `most` unanswered, and half a second's arrivals, end the step at once and count as errors: one that collapses would
    otherwise carry what is left of this step through all that follow."""
    await client.drain(PATIENCE * seconds)
    answers = Answers()
    async with Watch(metrics_url) as watch:
        started = time.perf_counter()
        sent = await client.arrive(shape("constant", rate, rate, seconds), answers, most=max(most, rate / 2))
        end = time.perf_counter()
    ended_early, overrun = end - started < 0.99 * seconds, sent - len(answers.finished)
    await client.drain(GRACE_SECONDS)
    unanswered = sent - len(answers.finished)
    begin = started + (end - started) * WARM_UP_SHARE
    rows = zip(answers.finished, answers.latencies, answers.statuses, strict=True)
    counted = Answers(*map(list, zip(*(row for row in rows if begin <= row[0] - row[1] <= end), strict=True)))
    in_flight = sum(counted.latencies) / (end - begin)  # Little's law
    load = {"loop": "open", "in_flight": in_flight, "stable": True, "offered_rps": rate}
    step = summarise(counted, begin, end, None, **load, **watch.seen)
    return msgspec.structs.replace(step, errors=step.errors + (overrun if ended_early else unanswered))
