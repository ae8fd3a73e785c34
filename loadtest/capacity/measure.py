"""One step: warm up, then measure until the estimates are stable, or until the time for a step is used up."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import psutil

from loadtest.capacity import stats
from loadtest.capacity.load import Client, Samples
from loadtest.capacity.schema import Estimate, Options, Step
from loadtest.capacity.scrape import Reading, Scraper, between
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


@dataclass(frozen=True)
class Rules:
    """When a step is good enough."""

    precision: float
    min_seconds: float
    max_seconds: float

    @staticmethod
    def of(options: Options) -> "Rules":
        return Rules(options.precision_percent / 100, options.min_step_seconds, options.max_step_seconds)


def _busy_seconds() -> float:
    """CPU time that all of this machine's processes have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


class Watch:
    """The server's side and this client's CPU while a step runs; as an async context manager."""

    def __init__(self, scraper: Scraper) -> None:
        self._scraper = scraper
        self._during: list[Reading] = []

    async def __aenter__(self) -> "Watch":
        self._before = await self._scraper.read()
        self._cpu, self._machine, self._started = time.process_time(), _busy_seconds(), time.perf_counter()
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        elapsed = time.perf_counter() - self._started
        self.client_cpu_share = (time.process_time() - self._cpu) / elapsed
        self.machine_cpu_cores = (_busy_seconds() - self._machine) / elapsed
        self.server = between(self._before, self._during, await self._scraper.read())

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_SECONDS)
            self._during.append(await self._scraper.read())


def _rate(finished: stats.Values, seconds: stats.Values, begin: float, in_flight: float | None) -> Estimate:
    """By Little's law where that many are always in flight, else by counting."""
    return stats.rate(finished, begin) if in_flight is None else stats.rate_of(seconds, in_flight)


def summarise(samples: Samples, begin: float, end: float, watch: Watch, held: float | None, **given: object) -> Step:
    """The step that these samples make. `held`: so many in flight all the time, or None; `given`: which load."""
    finished, seconds, statuses = (np.array(part) for part in (samples.finished, samples.seconds, samples.statuses))
    chosen = (finished >= begin) & (finished <= end) if len(finished) else np.zeros(0, bool)
    good = chosen & (statuses == 200)
    latencies = seconds[good] * 1e3
    refused = chosen & np.isin(statuses, (429, 503))

    def at(percent: float) -> float:
        return float(np.percentile(latencies, percent)) if len(latencies) else float("inf")

    fields: dict[str, object] = {
        "rps": _rate(finished[good], seconds[good], begin, held if good.sum() == chosen.sum() else None),
        "mean_ms": float(np.mean(latencies)) if len(latencies) else float("inf"),
        "p50_ms": at(50),
        "p95_ms": stats.percentile(latencies, 95),
        "p99_ms": at(99),
        "requests": int(good.sum()),
        "refused": int(refused.sum()),
        "errors": int((chosen & (statuses != 200)).sum() - refused.sum()),
        "seconds": end - begin,
        "client_cpu_share": watch.client_cpu_share,
        "machine_cpu_cores": watch.machine_cpu_cores,
        "server": watch.server,
    }
    return Step(**fields, **given)  # type: ignore[arg-type]


def stable(samples: Samples, begin: float, in_flight: float, precision: float) -> bool:
    """Whether rate and 95th percentile are known well enough."""
    finished, seconds, statuses = (np.array(part) for part in (samples.finished, samples.seconds, samples.statuses))
    good = (finished >= begin) & (statuses == 200)
    rate = _rate(finished[good], seconds[good], begin, in_flight if good.all() else None)
    p95 = stats.percentile(seconds[good], 95)
    return rate.relative <= precision and p95.relative <= precision * P95_FACTOR


async def closed_step(
    client: Client, scraper: Scraper, in_flight: int, rules: Rules, on_progress: Callable[[float], None]
) -> Step:
    """`in_flight` requests at all times. `on_progress` gets the seconds measured so far."""
    client.samples = Samples()
    client.hold(in_flight)
    started = time.perf_counter()
    # Warm: every request of the step before has been answered, and some of this one.
    while len(client.samples.finished) < 2 * in_flight or time.perf_counter() - started < rules.min_seconds / 4:
        await asyncio.sleep(LOOK_SECONDS / 10)
        if time.perf_counter() - started > rules.max_seconds:
            break
    samples = client.samples = Samples()
    async with Watch(scraper) as watch:
        begin = time.perf_counter()
        enough = False
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            end = time.perf_counter()
            on_progress(end - begin)
            if end - begin < rules.min_seconds:
                continue
            enough = stable(samples, begin, in_flight, rules.precision)
            few = len(samples.finished) < LEAST_ANSWERS and end - begin < PATIENCE * rules.max_seconds
            if enough or (end - begin >= rules.max_seconds and not few):
                break
    return summarise(
        samples, begin, end, watch, float(in_flight), loop="closed", in_flight=float(in_flight), stable=enough
    )


async def open_step(client: Client, scraper: Scraper, rate: float, seconds: float, most: float = math.inf) -> Step:
    """Poisson arrivals at `rate`; those due in the first fifth warm up and are not counted. What is not answered within
    the grace after the last arrival counts as an error, so that a server that cannot follow is seen to fail. More than
    `most` unanswered, and half a second's arrivals, end the step at once and count as errors: one that collapses would
    otherwise carry what is left of this step through all that follow."""
    await _drained(client, PATIENCE * seconds)
    samples = client.samples = Samples()
    async with Watch(scraper) as watch:
        started = time.perf_counter()
        sent = await client.arrive(shape("constant", rate, rate, seconds), most=max(most, rate / 2))
        end = time.perf_counter()
    overrun = sent - len(samples.finished) if sent - len(samples.finished) > max(most, rate / 2) else 0
    while len(samples.finished) < sent and time.perf_counter() - end < GRACE_SECONDS:
        await asyncio.sleep(LOOK_SECONDS / 10)
    begin, unanswered = started + (end - started) / 5, sent - len(samples.finished)
    counted = Samples()
    for finished, waited, status in zip(samples.finished, samples.seconds, samples.statuses, strict=True):
        if begin <= finished - waited <= end:
            counted.add(finished, waited, status)
    step = summarise(counted, begin, np.inf, watch, None, loop="open", in_flight=0.0, stable=True, offered_rps=rate)
    in_flight = sum(counted.seconds) / (end - begin)  # Little's law
    errors = step.errors + max(unanswered, overrun)
    return msgspec.structs.replace(step, in_flight=in_flight, seconds=end - begin, errors=errors)


async def _drained(client: Client, seconds: float) -> None:
    """Waits until everything sent has been answered, but no longer than this."""
    started = time.perf_counter()
    while not client.idle and time.perf_counter() - started < seconds:
        await asyncio.sleep(LOOK_SECONDS / 10)
