"""Command line of `python -m loadtest.capacity`."""

import argparse
import asyncio
import platform
import resource
import secrets
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import uvloop
from tqdm import tqdm

from loadtest.capacity import analysis, derive, explore, report, start
from loadtest.capacity.explore import MAX_REPEATS
from loadtest.capacity.load import Client, Target, TargetError
from loadtest.capacity.measure import Rules, closed_step, open_step
from loadtest.capacity.schema import Options, Report, Run, Step
from loadtest.capacity.scrape import Reading, Scraper
from loadtest.texts import sentences

TEXTS = 4096
EXIT_OBJECTIVE, EXIT_TARGET = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: targets derived; 1: no load is within the objective; 2: wrong use or no server."""
    args = _parser().parse_args(arguments)
    options = msgspec.convert({name: getattr(args, name) for name in Options.__struct_fields__}, Options)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))
    try:
        target = Target.of(args.url)
        body = args.body.read_bytes() if args.body else None
        found = uvloop.run(run(target, options, body, args.metrics_url, quiet=args.quiet))
        written = report.write(found, args.out)
    except (TargetError, analysis.NoAnswer, OSError) as error:
        print(f"loadtest.capacity: {error}", file=sys.stderr)
        return EXIT_TARGET
    for name, value in report.answer(found):
        print(f"{name + ':':<52} {value}")
    for warning in found.findings.warnings:
        print(f"note: {warning}", file=sys.stderr)
    print("written: " + " ".join(str(path) for path in written))
    return 0 if found.derivation is not None else EXIT_OBJECTIVE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.capacity",
        description="Finds what one replica carries within the objective; writes report and Kustomize components.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/predict", help="POST target of one replica")
    parser.add_argument("--body", type=Path, help="file with a JSON body for every request, in place of {'text': …}")
    parser.add_argument("--metrics-url", help="the server's /metrics, or 'none'; default: beside --url")
    parser.add_argument("--out", type=Path, default=Path("capacity"), help="folder for report, figures, component")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    helps = {
        "slo_p95_ms": "objective",
        "allowed_failure_percent": "requests that may be refused or fail",
        "max_in_flight": "never more than this",
        "precision_percent": "a step ends when the 95 %% interval of its rate is this narrow (p95: twice this)",
        "min_step_seconds": "a step takes at least this",
        "max_step_seconds": "a step ends after this even if not stable",
        "growth_percent_per_second": "how fast traffic may grow while new replicas start",
        "scrape_seconds": "how old the metric may be",
        "window_seconds": "the metric is a mean over this; it is half as old",
        "sync_seconds": "HPA sync period",
        "pull_seconds": "image pull on a new replica's node",
        "node_seconds": "provisioning of a new node; 0: there is room",
        "probe_seconds": "readiness probe period and routing",
        "start_seconds": "process start to ready; default: measured",
        "base_rps": "traffic of the whole service at its quietest; default: one replica's target",
        "peak_rps": "traffic of the whole service at its highest; default: 10 × base",
        "survive": "loss that must not break the objective: replica or zone",
        "zones": "zones the replicas are spread over",
    }
    defaults = Options()
    for name, text in helps.items():
        value = getattr(defaults, name)
        kind = type(value) if value is not None else float
        choices = ("replica", "zone") if name == "survive" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=text, choices=choices)
    return parser


async def run(target: Target, options: Options, body: bytes | None, metrics_url: str | None, *, quiet: bool) -> Report:
    """The whole measurement. Raises TargetError if nothing answers there, NoAnswer if nothing answers 200."""
    bodies = [body] if body is not None else [msgspec.json.encode({"text": t}) for t in sentences(TEXTS, seed=1)]
    metrics = None if metrics_url == "none" else metrics_url or Scraper.default_url(target.url)
    scraper = Scraper(metrics, target.url)
    await asyncio.to_thread(_reach, target)
    started, clock = datetime.now(UTC), time.perf_counter()
    reading = await scraper.read()
    client = Client(target, [target.post(each) for each in bodies])
    try:
        steps = await _closed(client, scraper, options, quiet=quiet)
        opened = await _open(client, scraper, steps, options, local=target.local, quiet=quiet)
        findings = analysis.find(steps, opened, options, local=target.local)
        waits = derive.delays(
            options, *await asyncio.to_thread(start.start_seconds, target, reading, options.start_seconds)
        )
        at_trigger = None
        if findings.objective_rps is not None and findings.open_loop_rps != 0:
            rate = derive.trigger(findings, options, waits)
            with tqdm(disable=quiet, bar_format=f"open loop: {rate:.0f} rps, where scaling must begin"):
                most = analysis.most_unanswered(steps, options)
                at_trigger = await open_step(client, scraper, rate, options.max_step_seconds, most)
            opened.append(at_trigger)
            findings = analysis.find(steps, opened, options, local=target.local)  # its notes are about that load too
    finally:
        await client.close()
    return Report(
        run=_describe(target, started, time.perf_counter() - clock, body, reading),
        options=options,
        steps=steps,
        open_loop=opened,
        findings=findings,
        derivation=derive.derive(steps, findings, options, waits, at_trigger),
    )


def _reach(target: Target) -> None:
    """Raises TargetError unless something listens there."""
    try:
        socket.create_connection((target.host, target.port), timeout=5).close()
    except OSError as error:
        raise TargetError(f"{target.url}: nothing listens there: {error.strerror or error}") from None


async def _closed(client: Client, scraper: Scraper, options: Options, *, quiet: bool) -> list[Step]:
    rules = Rules.of(options)
    steps: list[Step] = []
    with tqdm(total=rules.max_seconds, unit="s", disable=quiet, bar_format="{desc} {bar} {n:.0f}/{total:.0f} s") as bar:
        while (level := explore.next_in_flight(steps, options)) is not None:
            last = f"{steps[-1].rps.value:.0f} rps, p95 {steps[-1].p95_ms.value:.0f} ms" if steps else "warming up"
            bar.set_description_str(f"step {len(steps) + 1}: {level} in flight (last: {last})")
            bar.reset(rules.max_seconds)

            def progress(seconds: float) -> None:
                bar.n = min(seconds, rules.max_seconds)
                bar.refresh()

            steps.append(await closed_step(client, scraper, level, rules, progress))
            if steps[-1].requests == 0 and len(steps) == 1:
                break
    client.hold(0)
    return list(analysis.usable(steps).values())


async def _open(
    client: Client, scraper: Scraper, steps: list[Step], options: Options, *, local: bool, quiet: bool
) -> list[Step]:
    """Arrivals that do not wait, from the largest rate that the model promises downwards until one holds. A rate that
    failed while something else was busy gets another chance."""
    if not any(step.holds(options.slo_p95_ms, options.allowed_failure_percent / 100) for step in steps):
        return []
    opened: list[Step] = []
    rates, most = analysis.rates_to_try(steps, options), analysis.most_unanswered(steps, options)
    chances = MAX_REPEATS
    with tqdm(rates, disable=quiet, bar_format="{desc} {n}/{total}") as bar:
        for rate in bar:
            bar.set_description_str(f"open loop: {rate:.0f} rps")
            while True:
                opened.append(await open_step(client, scraper, rate, options.max_step_seconds, most))
                if analysis.confirmed(opened, options):
                    return opened
                if not (local and analysis.disturbed(opened[-1])) or chances == 0:
                    break
                chances -= 1
    return opened


def _describe(target: Target, started: datetime, seconds: float, body: bytes | None, reading: Reading) -> Run:
    info = reading.labels("model_info")
    memory = psutil.virtual_memory().total / 2**30
    return Run(
        id=f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
        url=target.url,
        started=f"{started:%Y-%m-%d %H:%M} UTC",
        seconds=seconds,
        machine=f"client {psutil.cpu_count()} CPUs {platform.machine()}, {memory:.0f} GiB",
        load="one given body" if body is not None else f"{TEXTS} sentences of log-normal length, median 13 words",
        server={key: info[key] for key in ("name", "version", "provider", "precision") if key in info},
    )


if __name__ == "__main__":
    sys.exit(main())
