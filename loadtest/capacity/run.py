"""The whole measurement of one replica: closed loop, open loop, findings, targets. Knows no command line and writes
nothing.
"""

import asyncio
import platform
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
from tqdm import tqdm

from app.errors import ArtifactError
from app.runtime.tasks.tensors import load_arrays
from loadtest.capacity import analysis, derive, explore, scrape, start
from loadtest.capacity.explore import MAX_REPEATS
from loadtest.capacity.measure import closed_step, open_step
from loadtest.capacity.schema import Options, Report, Run, Step
from loadtest.client import Client
from loadtest.connection import Target, TargetError
from loadtest.payloads import Payload, PayloadError, Served, post, values_bytes
from loadtest.texts import sentences

TEXTS = 4096
# Fewer, because they may be large.
TENSORS = 256


class Load(NamedTuple):
    """What is sent: requests that take turns, all to one path."""

    payloads: list[Payload]
    described: str
    # What to do if the server does not take them.
    advice: str = ""


async def run(
    target: Target, options: Options, load: Load | None = None, metrics_url: str | None = None, *, quiet: bool = True
) -> Report:
    """Raises TargetError if nothing answers 200 there, NoAnswer if that is so later."""
    load = load or texts(target)
    target = Target.of(target.root + load.payloads[0].path)
    await asyncio.to_thread(_reach, target, load)
    started, clock = datetime.now(UTC), time.perf_counter()
    client = Client(target, [target.post(each.body, each.headers) for each in load.payloads])
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
        load=load.described,
        server={key: info[key] for key in ("name", "version", "provider", "precision") if key in info},
    )
    targets = derive.derive(steps, findings, options, waits, at_trigger)
    return Report(described, options, steps, opened, findings, targets)


def texts(target: Target) -> Load:
    """Sentences for /predict, or for the path that the target has."""
    bodies = [msgspec.json.encode({"text": text}) for text in sentences(TEXTS, seed=1)]
    payloads = [Payload(target.path or "/predict", body) for body in bodies]
    return Load(payloads, f"{TEXTS} sentences of log-normal length, median 13 words")


def tensors(served: Served, size: int) -> Load:
    """Random tensors for a model that takes no text."""
    return Load(
        served.payloads(TENSORS, size),
        f"{TENSORS} requests of one row of random tensors, other axes that vary from 1 to {size}",
        "; give fitting ones with --inputs FILE.npz, or another --size",
    )


def given(served: Served, file: Path) -> Load:
    """The one request that a .npz file holds, in arrays called NAME or, as in an artifact's golden.npz, input.NAME.
    Raises PayloadError."""
    try:
        arrays = load_arrays(file)
    except ArtifactError as error:
        raise PayloadError(f"--inputs {error}") from None
    found = {name.removeprefix("input."): array for name, array in arrays.items() if not name.startswith("output.")}
    names = [spec["name"] for spec in served.inputs]
    if sorted(found) != sorted(names):
        raise PayloadError(f"--inputs {file}: expected arrays {sorted(names)}, found {sorted(found)}")
    pairs = [(spec, found[spec["name"]]) for spec in served.inputs]
    tensors = [(spec, array.shape, values_bytes(spec, array.ravel().tolist())) for spec, array in pairs]
    return Load([served.payload(tensors)], "one request of given inputs")


def _reach(target: Target, load: Load) -> None:
    """Raises TargetError unless the first request is answered with 200, saying what was answered."""
    try:
        status, body = post(target.root, load.payloads[0])
    except PayloadError as error:
        raise TargetError(str(error)) from None
    if status != 200:
        raise TargetError(
            f"{target.url}: no request was answered with 200: the first got {status}: {body}{load.advice}"
        )


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
