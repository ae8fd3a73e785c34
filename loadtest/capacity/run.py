"""The whole measurement of one replica: closed loop, open loop, findings, targets. Knows no command line and writes
nothing.
"""

import asyncio
import platform
import secrets
import socket
import time
from datetime import UTC, datetime

import msgspec
import psutil
from tqdm import tqdm

from loadtest.capacity import analysis, derive, explore, scrape, start
from loadtest.capacity.explore import MAX_REPEATS
from loadtest.capacity.measure import closed_step, open_step
from loadtest.capacity.schema import Options, Report, Run, Step
from loadtest.client import Client
from loadtest.connection import Target, TargetError
from loadtest.texts import sentences

TEXTS = 4096


async def run(
    target: Target, options: Options, body: bytes | None = None, metrics_url: str | None = None, *, quiet: bool = True
) -> Report:
    """Raises TargetError if nothing answers there, NoAnswer if nothing answers 200."""
    bodies = [body] if body is not None else [msgspec.json.encode({"text": t}) for t in sentences(TEXTS, seed=1)]
    await asyncio.to_thread(_reach, target)
    started, clock = datetime.now(UTC), time.perf_counter()
    client = Client(target, [target.post(each) for each in bodies])
    try:
        steps = await _closed(client, metrics_url, options, quiet=quiet)
        opened = await _open(client, metrics_url, steps, options, local=target.local, quiet=quiet)
        findings = analysis.find(steps, opened, options, local=target.local)
        reading = await scrape.read(metrics_url)
        ready = await asyncio.to_thread(start.start_seconds, target, reading, options.start_seconds)
        waits, at_trigger = derive.delays(options, *ready), None
        if findings.objective_rps is not None and findings.open_loop_rps != 0:
            rate = derive.trigger(findings, options, waits)
            with tqdm(disable=quiet, bar_format=f"open loop: {rate:.0f} rps, where scaling must begin"):
                most = analysis.most_unanswered(steps, options)
                at_trigger = await open_step(client, metrics_url, rate, options.max_step_seconds, most)
            opened.append(at_trigger)
            findings = analysis.find(steps, opened, options, local=target.local)  # its notes are about that load too
    finally:
        await client.close()
    info, memory = reading.labels("model_info"), psutil.virtual_memory().total / 2**30
    described = Run(
        id=f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        url=target.url,
        started=f"{started:%Y-%m-%d %H:%M} UTC",
        seconds=time.perf_counter() - clock,
        machine=f"client {psutil.cpu_count()} CPUs {platform.machine()}, {memory:.0f} GiB",
        load="one given body" if body is not None else f"{TEXTS} sentences of log-normal length, median 13 words",
        server={key: info[key] for key in ("name", "version", "provider", "precision") if key in info},
    )
    targets = derive.derive(steps, findings, options, waits, at_trigger)
    return Report(described, options, steps, opened, findings, targets)


def _reach(target: Target) -> None:
    """Raises TargetError unless something listens there."""
    try:
        socket.create_connection((target.host, target.port), timeout=5).close()
    except OSError as error:
        raise TargetError(f"{target.url}: nothing listens there: {error.strerror or error}") from None


async def _closed(client: Client, metrics_url: str | None, options: Options, *, quiet: bool) -> list[Step]:
    steps: list[Step] = []
    longest = options.max_step_seconds
    with tqdm(total=longest, unit="s", disable=quiet, bar_format="{desc} {bar} {n:.0f}/{total:.0f} s") as bar:

        def progress(seconds: float) -> None:
            bar.n = min(seconds, longest)
            bar.refresh()

        while (level := explore.next_in_flight(steps, options)) is not None:
            last = f"{steps[-1].rps.value:.0f} rps, p95 {steps[-1].p95_ms.value:.0f} ms" if steps else "warming up"
            bar.set_description_str(f"step {len(steps) + 1}: {level} in flight (last: {last})")
            bar.reset(longest)
            steps.append(await closed_step(client, metrics_url, level, options, progress))
            if steps[0].requests == 0:
                break
    client.hold(0)
    return list(analysis.usable(steps).values())


async def _open(
    client: Client, metrics_url: str | None, steps: list[Step], options: Options, *, local: bool, quiet: bool
) -> list[Step]:
    """Arrivals that do not wait, from the largest rate that the model promises downwards until one holds. A rate that
    failed while something else was busy gets another chance."""
    if not any(step.holds(options) for step in steps):
        return []
    opened: list[Step] = []
    rates, most = analysis.rates_to_try(steps, options), analysis.most_unanswered(steps, options)
    chances = MAX_REPEATS
    with tqdm(rates, disable=quiet, bar_format="{desc} {n}/{total}") as bar:
        for rate in bar:
            bar.set_description_str(f"open loop: {rate:.0f} rps")
            while True:
                opened.append(await open_step(client, metrics_url, rate, options.max_step_seconds, most))
                if analysis.confirmed(opened, options):
                    return opened
                if not (local and analysis.disturbed(opened[-1])) or chances == 0:
                    break
                chances -= 1
    return opened
