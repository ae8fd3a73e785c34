"""The simulator beside reality: `python -m tests.tools.reality`. About two minutes on two CPUs.

Measures one real replica process with loadtest.capacity, simulates a fleet of them under the HPA, then runs that fleet
as processes behind a balancer with the same HPA deciding. One plot has both, with the error. Times are a tenth of a
cluster's, so that a run takes a minute: sync and scrape 1.5 s, and so on.
"""

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import uvloop
from matplotlib.figure import Figure

from loadtest.capacity import run as capacity
from loadtest.capacity.schema import Options, Report
from loadtest.client import Client
from loadtest.connection import Answers, Target
from loadtest.payloads import Payload
from loadtest.shapes import Shape, shape
from loadtest.simulate.fleet import Timeline, World, simulate
from loadtest.simulate.hpa import Autoscaler, Behavior, Pods, Policy, Rules
from loadtest.simulate.replica import Replica
from tests.tools.balancer import Balancer, standin
from tests.tools.compare import Errors, Observed, compare, plot, words

SERVERS, SERVICE_SECONDS = 4, 0.08
SCALE = 10.0
SEEDS = 8
STEP_SECONDS = 0.1


def options(seconds_to_ready: float | None = None) -> Options:
    """A cluster's delays at a tenth, and traffic that grows ten times as fast."""
    return Options(
        slo_p95_ms=250.0,
        max_in_flight=32,
        min_step_seconds=0.8,
        max_step_seconds=2.5,
        growth_percent_per_second=5.0,
        scrape_seconds=15 / SCALE,
        window_seconds=30 / SCALE,
        sync_seconds=15 / SCALE,
        pull_seconds=10 / SCALE,
        probe_seconds=0.0,
        start_seconds=seconds_to_ready,
    )


def behavior() -> Behavior:
    """Kubernetes' defaults at a tenth of the time, with a short wait before scaling down so that a run shows it."""
    up = Rules(0.0, (Policy("Percent", 100, 15 / SCALE), Policy("Pods", 4, 15 / SCALE)))
    return Behavior(up, Rules(60 / SCALE, (Policy("Percent", 100, 15 / SCALE),)))


async def measure() -> tuple[Report, float]:
    """One replica's report, and how long its process takes to be ready."""
    command = standin(SERVERS, SERVICE_SECONDS)
    started = time.perf_counter()
    async with Balancer(command, 0.0) as balancer:
        balancer.resize(1)
        await balancer.until_ready(1)
        seconds = time.perf_counter() - started
        # Through the balancer, because its own time is part of every latency that will be observed.
        target = Target.of(f"http://127.0.0.1:{balancer.port}/")
        nothing = capacity.Load([Payload("/predict", b"{}")], "nothing")
        return await capacity.run(target, options(seconds), nothing), seconds


def autoscaler(report: Report) -> Autoscaler:
    assert report.derivation is not None
    return Autoscaler(2, 12, report.derivation.target_in_flight, behavior())


async def observe(report: Report, traffic: Shape, world: World) -> Observed:
    """The same fleet as processes."""
    seen, scaler = Observed(), autoscaler(report)
    async with Balancer(standin(SERVERS, SERVICE_SECONDS), world.pending_seconds) as balancer:
        balancer.resize(scaler.min_replicas)
        await balancer.until_ready(scaler.min_replicas)
        target = Target.of(f"http://127.0.0.1:{balancer.port}/")
        client = Client(target, [target.post(b"{}")])
        start = time.perf_counter()
        control = asyncio.create_task(_control(balancer, scaler, world, seen, start))
        samples = Answers()
        await client.arrive(traffic, samples)
        control.cancel()
        await asyncio.gather(control, return_exceptions=True)
        await client.close()
    seen.due = [at - waited - start for at, waited in zip(samples.finished, samples.latencies, strict=True)]
    seen.latency_ms = [waited * 1e3 for waited in samples.latencies]
    return seen


async def _control(balancer: Balancer, scaler: Autoscaler, world: World, seen: Observed, start: float) -> None:
    """Scrapes and syncs on their periods, as the simulator does."""
    wanted = scaler.min_replicas
    keep = max(1, round(world.window_seconds / world.scrape_seconds))
    next_scrape, next_sync = 0.0, world.sync_seconds
    while True:
        now = time.perf_counter() - start
        seen.at.append(now)
        seen.ready.append(len(balancer.ready))
        if now >= next_scrape:
            balancer.scrape()
            next_scrape += world.scrape_seconds
        if now >= next_sync:
            sampled = [backend for backend in balancer.ready if backend.samples]
            values = [float(np.mean(list(backend.samples)[-keep:])) for backend in sampled]
            starting = len(balancer.backends) - len(balancer.ready)
            pods = Pods(values, missing=len(balancer.ready) - len(sampled), ignored=starting)
            wanted = scaler.sync(now, wanted, pods)
            balancer.resize(wanted)
            next_sync += world.sync_seconds
        await asyncio.sleep(STEP_SECONDS)


def predict(report: Report, traffic: Shape, world: World) -> list[Timeline]:
    """The simulator's answer, once for each seed of the metric's noise."""
    replica = Replica.of(report)
    return [
        simulate(
            replica,
            autoscaler(report),
            dataclasses.replace(world, seed=seed),
            traffic.rate,
            traffic.seconds,
            step_seconds=STEP_SECONDS,
        )
        for seed in range(SEEDS)
    ]


async def run(seconds: float, base: float, peak: float) -> tuple[Errors, Figure]:
    """Measures, predicts, observes, compares."""
    report, start = await measure()
    print(f"one replica: peak {report.findings.peak_rps:.1f} rps, starts in {start:.2f} s", file=sys.stderr)
    if report.derivation is None:
        raise SystemExit("reality: the stand-in met no objective on this machine; nothing to compare")
    world = World(
        scrape_seconds=15 / SCALE,
        window_seconds=30 / SCALE,
        sync_seconds=15 / SCALE,
        pending_seconds=10 / SCALE,
        start_seconds=start,
    )
    traffic = shape("diurnal", base, peak, seconds)
    lines = predict(report, traffic, world)
    seen = await observe(report, traffic, world)
    errors, rows = compare(lines, seen, seconds)
    return errors, plot(traffic, rows, errors)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the error; writes reality.png and reality.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.reality", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--base-rps", type=float, default=40.0)
    parser.add_argument("--peak-rps", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=Path("capacity/reality"))
    args = parser.parse_args(arguments)
    errors, figure = uvloop.run(run(args.seconds, args.base_rps, args.peak_rps))
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "reality.png", dpi=130)
    (args.out / "reality.json").write_bytes(msgspec.json.format(msgspec.json.encode(errors)) + b"\n")
    print(words(errors))
    print(f"written: {args.out / 'reality.json'} {args.out / 'reality.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
