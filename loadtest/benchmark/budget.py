"""Where the CPU time of one request goes: `python -m loadtest.benchmark.budget`, the output of `make profile`.

py-spy samples every thread of a real server under closed-loop load; each busy sample counts for the innermost function
that a row of the table names. Kernel time is the process's own system time.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import uvloop

from loadtest.benchmark.bench import HOST, ROOT, answers, free_port, service
from loadtest.client import closed_loop, post
from loadtest.texts import sentences

# Each sample stops the server for a moment, so that its stacks are whole.
RATE_HZ = 100
# Row → functions as py-spy names them, "name (file". The innermost match in a stack decides.
ROWS = {
    "model run (ONNX Runtime)": ("run (app/runtime/session.py",),
    "assemble batch": ("assemble (app/runtime/tasks/task.py",),
    "split results": ("split (app/runtime/tasks/task.py",),
    "tokenise": ("encode (app/runtime/tasks/task.py",),
    "queue: admit, sort, take": (
        "submit (app/batching/batcher.py",
        "_take (app/batching/batcher.py",
        "(app/batching/queue.py",
    ),
    "runner: hand over": (
        "_turn (app/batching/batcher.py",
        "_try (app/batching/batcher.py",
        "describe (app/batching/admission.py",
    ),
    "deliver results": ("_deliver (app/batching/batcher.py", "_observe (app/predictor.py"),
    "read body, watch client": ("(app/http/request.py",),
    "decode JSON": ("decode_json (app/http/predict.py",),
    "encode JSON": ("json_answer (app/http/request.py",),
    "metrics and log line": ("_record (app/http/middleware.py",),
    "HTTP parse": ("data_received (uvicorn", "on_headers_complete (uvicorn"),
    "HTTP send": ("answer (app/http/connection.py", "send (uvicorn"),
    "event loop and sockets": ("run (asyncio/runners.py",),
    "own glue": ("(app/",),
    "server glue": ("(uvicorn", "(starlette", "(fastapi"),
}


def row_of(stack: list[str]) -> str:
    """The row that a stack, outermost first, counts for."""
    for frame in reversed(stack):
        for row, patterns in ROWS.items():
            if any(pattern in frame for pattern in patterns):
                return row
    return "event loop and rest"


def fold(raw: str) -> dict[str, int]:
    """Samples by row, from py-spy's raw format: `frame;frame;frame count` on each line."""
    samples: dict[str, int] = {}
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        row = row_of(stack.split(";"))
        samples[row] = samples.get(row, 0) + int(count)
    return samples


def profile(artifact: Path, connections: int, seconds: float) -> dict[str, Any]:
    """Microseconds of CPU per request by row, and the kernel's share."""
    port = free_port()
    command, ready, env = service(artifact)
    settings = {name: value.replace("{port}", str(port)) for name, value in env.items()}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
        try:
            while not answers(f"http://{HOST}:{port}{ready}"):
                time.sleep(0.02)
            url = f"http://{HOST}:{port}/predict"
            requests = [post(url, json.dumps({"text": text}).encode()) for text in sentences(4096, seed=1)]
            uvloop.run(closed_loop(HOST, port, requests, connections, seconds / 4))
            py_spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(server.pid)]
            options = ["--format", "raw", "--output", str(raw), "--rate", str(RATE_HZ), "--duration", str(int(seconds))]
            spy = subprocess.Popen([*py_spy, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            process = psutil.Process(server.pid)
            before = process.cpu_times()
            outcome = uvloop.run(closed_loop(HOST, port, requests, connections, seconds))
            after = process.cpu_times()
            spy.wait(60)
            samples = fold(raw.read_text())
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    answered = len(outcome.statuses) * seconds / outcome.seconds
    cpu = (after.user - before.user + after.system - before.system) / answered * 1e6
    total = sum(samples.values())
    return {
        "requests_per_second": round(answered / seconds, 1),
        "cpu_us_per_request": round(cpu, 1),
        "kernel_us_per_request": round((after.system - before.system) / answered * 1e6, 1),
        "rows": {row: round(cpu * count / total, 1) for row, count in sorted(samples.items(), key=lambda i: -i[1])},
    }


def main() -> None:
    """Command line of `python -m loadtest.benchmark.budget`."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.benchmark.budget", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=ROOT / "model" / "sentiment")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=12)
    args = parser.parse_args()
    report = profile(args.artifact, args.connections, args.seconds)
    print(f"{report['requests_per_second']:.0f} requests/s at {args.connections} connections, CPU per request:")
    for row, spent in report["rows"].items():
        print(f"  {row:<28}{spent:>9.1f} us")
    kernel = report["kernel_us_per_request"]
    print(f"  {'sum':<28}{report['cpu_us_per_request']:>9.1f} us, of which kernel {kernel:.1f} us")


if __name__ == "__main__":
    main()
