"""Ceiling, web floor, this server and the plain script in one run: `python -m loadtest.benchmark`, or `make bench`.

Everything runs on this machine, client included, one server at a time; figures of merit are ratios within the run.
Prints a table and writes JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtest.benchmark import free_model
from loadtest.benchmark.load import allow_connections, closed, opened
from loadtest.benchmark.server import ROOT, SERVED, floor, plain, service, serving, text_artifact
from loadtest.benchmark.targets import CONNECTIONS, HTTP_PROCESSES, OVERLOADS, table, targets
from loadtest.texts import sentences

STARTS = 3


def ceiling(artifact: Path) -> dict[str, Any]:
    """In a process of its own, so that its threads and memory are not the client's."""
    command = [sys.executable, "-m", "loadtest.benchmark.ceiling", str(artifact)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    texts = sentences(4096, seed=1)
    seconds, artifact = args.seconds, args.artifact
    report: dict[str, Any] = {"cpus": os.cpu_count(), "seconds_per_load": seconds}

    def say(name: str, value: Any) -> Any:
        print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)
        return value

    with serving(floor()) as running:
        report["floor"] = {n: say(f"floor {n}", closed(running, texts, n, seconds / 2)) for n in (1, 64)}
    report["free_model"] = {}
    with tempfile.TemporaryDirectory() as folder:
        free = free_model.write(Path(folder))
        for n in HTTP_PROCESSES:
            with serving(service(free, http_processes=n)) as running:
                report["free_model"][n] = say(f"free model, {n}", closed(running, texts, 64, seconds / 2))
    starts = []
    for _ in range(STARTS):
        with serving(service(artifact)) as running:
            starts.append(running.ready_seconds)
    report["start_seconds"] = say("start", round(statistics.median(starts), 3))
    # Just before and after what is compared with it: a machine shared with others changes within minutes. No bound on
    # the queue but the deadline, so that a slow model is not measured by what it refuses.
    report["ceiling_before"] = say("ceiling", ceiling(artifact))
    with serving(service(artifact, max_queue_wait_ms=5000)) as running:
        report["closed"] = {n: say(f"closed {n}", closed(running, texts, n, seconds)) for n in CONNECTIONS}
        capacity = report["closed"][64]["requests_per_second"]
        report["half_load"] = say("open 0.5", opened(running, texts, 0.5 * capacity, seconds))
        report["peak_bytes"] = say("peak bytes", running.peak_bytes())
    report["ceiling_after"] = say("ceiling", ceiling(artifact))
    # For each objective the bound on the queue that suits it, as an operator would set it.
    for name, wait_ms, factors in (("open", args.wait_ms_250, OVERLOADS), ("open_100", args.wait_ms_100, (2.0,))):
        with serving(service(artifact, max_queue_wait_ms=wait_ms)) as running:
            capacity = closed(running, texts, 64, seconds / 2)["requests_per_second"]
            report[f"{name}_capacity"] = round(capacity, 1)
            report[name] = {f: say(f"{name} {f}", opened(running, texts, f * capacity, seconds)) for f in factors}
            report[f"{name}_max_queue_wait_ms"] = wait_ms
    for workers in (1, 2):
        with serving(plain(artifact, workers)) as running:
            report[f"plain_{workers}"] = say(f"plain {workers}", closed(running, texts, 64, seconds))
            report[f"plain_{workers}"]["start_seconds"] = round(running.ready_seconds, 3)
    report["targets"] = [
        {**asdict(target), "value": round(target.value, 3), "met": target.met} for target in targets(report)
    ]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark",
        description=__doc__,
        epilog="example: python -m loadtest.benchmark --artifact my-model --seconds 4",
    )
    parser.add_argument("--artifact", type=text_artifact, default=SERVED, help="a text model's folder")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--wait-ms-250", type=float, default=160, help="APP_MAX_QUEUE_WAIT_MS for goodput in 250 ms")
    parser.add_argument("--wait-ms-100", type=float, default=50, help="APP_MAX_QUEUE_WAIT_MS for goodput in 100 ms")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for bench.json")
    args = parser.parse_args()
    allow_connections()
    report = run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
