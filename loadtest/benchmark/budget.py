"""Where the CPU time of one request goes: `python -m loadtest.benchmark.budget`, or `make profile`.

py-spy samples every thread of a real server under closed-loop load; each busy sample counts for the innermost file or
function that a row of the table names. Kernel time is the process's own system time.
"""

import argparse
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil

from loadtest.benchmark.load import closed
from loadtest.benchmark.server import SERVED, service, serving, text_artifact
from loadtest.texts import sentences

# Each sample stops the server for a moment, so that its stacks are whole.
RATE_HZ = 100
# Row → parts of what py-spy calls a frame, "function (file:line)": files where they say enough, since functions get new
# names more often. Of the innermost frame that matches, the first row counts.
ROWS = {
    "model run (ONNX Runtime)": ("(app/runtime/session.py",),
    "tokenise": ("encode (app/runtime/tasks/",),
    "assemble and split batches": ("(app/runtime/",),
    "queue, batches, admission": ("(app/batching/",),
    "predictor": ("(app/predictor.py",),
    "metrics and log line": ("(app/telemetry/", "(prometheus_client/"),
    "HTTP: request to answer": ("(app/http/",),
    "HTTP server": ("(uvicorn", "(starlette", "(fastapi"),
    "own code, other": ("(app/",),
    "event loop and sockets": ("run (asyncio/runners.py",),
}


def row_of(stack: Iterable[str]) -> str:
    """The row that a stack, outermost first, counts for."""
    for frame in reversed(list(stack)):
        for row, patterns in ROWS.items():
            if any(pattern in frame for pattern in patterns):
                return row
    return "event loop and rest"


def fold(raw: str) -> Counter[str]:
    """Samples by row, from py-spy's raw format: `frame;frame;frame count` on each line."""
    samples: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        samples[row_of(stack.split(";"))] += int(count)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark.budget",
        description=__doc__,
        epilog="example: python -m loadtest.benchmark.budget --connections 64",
    )
    parser.add_argument("--artifact", type=text_artifact, default=SERVED, help="a text model's folder")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=12)
    args = parser.parse_args()
    texts = sentences(4096, seed=1)
    with tempfile.TemporaryDirectory() as folder, serving(service(args.artifact)) as running:
        raw, process = Path(folder) / "raw", psutil.Process(running.pid)
        closed(running, texts, args.connections, args.seconds / 4)
        py_spy = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(process.pid), "--format", "raw"]
        options = ["--output", str(raw), "--rate", str(RATE_HZ), "--duration", str(args.seconds)]
        spy = subprocess.Popen([*py_spy, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = process.cpu_times()
        load = closed(running, texts, args.connections, args.seconds)
        after = process.cpu_times()
        spy.wait(60)
        samples = fold(raw.read_text())
    cpu = load["server_cpu_ms_per_request"] * 1e3
    kernel = cpu * (after.system - before.system) / (sum(after[:2]) - sum(before[:2]))
    print(f"{load['requests_per_second']:.0f} requests/s at {args.connections} connections, CPU per request:")
    for row, count in samples.most_common():
        print(f"  {row:<28}{cpu * count / samples.total():>9.1f} us")
    print(f"  {'sum':<28}{cpu:>9.1f} us, of which kernel {kernel:.1f} us")


if __name__ == "__main__":
    main()
