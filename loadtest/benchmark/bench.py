"""The benchmark: `python -m loadtest.benchmark.bench`. Ceiling, web floor, this server and the plain script in one run.

Everything runs on this machine, client included, one server at a time; figures of merit are ratios within the run.
Prints a table and writes JSON.
"""

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop

from loadtest.benchmark.targets import table, targets
from loadtest.client import Outcome, closed_loop, open_loop, post
from loadtest.texts import sentences

ROOT = Path(__file__).parent.parent.parent
HOST = "127.0.0.1"
CONNECTIONS = (1, 8, 64, 256)
OVERLOADS = (0.5, 0.8, 1.2, 2.0, 5.0)
HTTP_PROCESSES = (1, 2)
FREE_TOKENS = 1 << 10


class Running:
    """A server process and its workers: their CPU seconds and peak memory."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, ready_seconds: float) -> None:
        self.port = port
        self.ready_seconds = ready_seconds
        self._root = psutil.Process(process.pid)

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def requests(self, texts: list[str]) -> list[bytes]:
        """Ready-made bytes of one /predict for each text."""
        return [post(f"http://{HOST}:{self.port}/predict", msgspec.json.encode({"text": text})) for text in texts]

    def cpu_seconds(self) -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in self._all()))

    def engine_cpu_seconds(self) -> float:
        """Of the process that has the model: the first."""
        return float(sum(self._root.cpu_times()[:2]))

    def resident_bytes(self) -> int:
        """Now, summed over processes."""
        return sum(process.memory_info().rss for process in self._all())

    def peak_bytes(self) -> int:
        """Largest resident size so far, summed over processes."""
        total = 0
        for process in self._all():
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
        return total


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(command: list[str], ready_path: str, env: dict[str, str]) -> Iterator[Running]:
    """Starts a server, waits until `ready_path` answers 200 or 405, ends it."""
    port = free_port()
    filled = [part.replace("{port}", str(port)) for part in command]
    settings = {name: value.replace("{port}", str(port)) for name, value in env.items()}
    started = time.perf_counter()
    process = subprocess.Popen(
        filled, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not answers(f"http://{HOST}:{port}{ready_path}"):
            if process.poll() is not None:
                raise RuntimeError(f"{filled} ended with {process.returncode}")
            time.sleep(0.005)
        yield Running(process, port, time.perf_counter() - started)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answers(url: str) -> bool:
    """Whether something serves there: a 404 or 405 will do for a server without a readiness route."""
    try:
        urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - a loopback address made above
    except urllib.error.HTTPError as error:
        return error.code in (404, 405)
    except OSError:
        return False
    return True


def allow_connections() -> None:
    """An open loop holds thousands of connections; many shells allow a thousand files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 16384)), hard))


def measure(running: Running, requests: list[bytes], load: Any) -> dict[str, float]:
    """One load's summary with the server's CPU per answered request and the client's share of all CPU time."""
    before, engine, own = running.cpu_seconds(), running.engine_cpu_seconds(), time.process_time()
    started = time.perf_counter()
    outcome: Outcome = uvloop.run(load)
    elapsed = time.perf_counter() - started
    server, client = running.cpu_seconds() - before, time.process_time() - own
    counted = max(1, len(outcome.statuses)) * elapsed / outcome.seconds
    return {
        **outcome.summary(),
        "server_cpu_ms_per_request": round(server / counted * 1e3, 4),
        "engine_cpu_ms_per_request": round((running.engine_cpu_seconds() - engine) / counted * 1e3, 4),
        "client_cpu_share": round(client / max(1e-9, client + server), 3),
    }


def closed(running: Running, requests: list[bytes], connections: int, seconds: float) -> dict[str, float]:
    return measure(running, requests, closed_loop(HOST, running.port, requests, connections, seconds))


def opened(running: Running, requests: list[bytes], rate: float, seconds: float) -> dict[str, float]:
    return measure(running, requests, open_loop(HOST, running.port, requests, rate, seconds))


def ceiling(artifact: Path) -> dict[str, Any]:
    """In a process of its own, so that its threads and memory are not the client's."""
    command = [sys.executable, "-m", "loadtest.benchmark.ceiling", str(artifact)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def free_model(folder: Path) -> Path:
    """An artifact whose model costs nothing: a lookup of the first token. What is left is the web side."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer, models, pre_tokenizers

    from model.package import GOLDEN_TEXTS, package_text

    table = numpy_helper.from_array(np.tile(np.array([[0.1, 0.9]], np.float32), (FREE_TOKENS, 1)), "table")
    first = numpy_helper.from_array(np.array(0, np.int64), "first")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["input_ids", "first"], ["token"], axis=1),
            helper.make_node("Gather", ["table", "token"], ["probabilities"]),
        ],
        "free",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["rows", "tokens"])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 2])],
        [table, first],
    )
    source = folder / "free.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    artifact = folder / "free"
    artifact.mkdir()
    package_text(
        source,
        folder / "tokenizer.json",
        artifact,
        name="free",
        version="1",
        labels=["negative", "positive"],
        max_tokens=256,
        scores="probabilities",
        tolerance=0.0,
        texts=list(GOLDEN_TEXTS),
    )
    return artifact


def service(artifact: Path, **settings: object) -> tuple[list[str], str, dict[str, str]]:
    """Arguments of `serving` for this server."""
    env = {"APP_MODEL_DIR": str(artifact), "APP_PROVIDER": "cpu", "APP_HOST": HOST, "APP_PORT": "{port}"}
    return [sys.executable, "-m", "app"], "/ready", env | {f"APP_{k.upper()}": str(v) for k, v in settings.items()}


def uvicorn_command(target: str, workers: int, *extra: str) -> list[str]:
    base = [sys.executable, "-m", "uvicorn", target, "--host", HOST, "--port", "{port}", "--workers", str(workers)]
    return [*base, "--log-level", "warning", "--no-access-log", *extra]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    texts = sentences(4096, seed=1)
    seconds, artifact = args.seconds, args.artifact
    report: dict[str, Any] = {"cpus": os.cpu_count(), "seconds_per_load": seconds}

    def step(name: str, value: Any) -> Any:
        print(f"{name}: {json.dumps(value)}", file=sys.stderr, flush=True)
        return value

    floor = uvicorn_command(
        "loadtest.benchmark.floor:app", 1, "--loop", "uvloop", "--http", "httptools", "--no-server-header"
    )
    with serving(floor, "/", {}) as running:
        requests = running.requests(texts)
        report["floor"] = {n: step(f"floor {n}", closed(running, requests, n, seconds / 2)) for n in (1, 64)}
    report["free_model"] = {}
    with tempfile.TemporaryDirectory() as folder:
        free = free_model(Path(folder))
        for processes in HTTP_PROCESSES:
            with serving(*service(free, http_processes=processes)) as running:
                requests = running.requests(texts)
                found = step(f"free model, {processes}", closed(running, requests, 64, seconds / 2))
                report["free_model"][processes] = found

    starts = []
    for _ in range(3):
        with serving(*service(artifact)) as running:
            starts.append(running.ready_seconds)
    report["start_seconds"] = step("start", round(sorted(starts)[1], 3))
    # Just before and after what is compared with it: a machine shared with others changes within minutes. No bound on
    # the queue but the deadline, so that a slow model is not measured by what it refuses.
    report["ceiling_before"] = step("ceiling", ceiling(artifact))
    with serving(*service(artifact, max_queue_wait_ms=5000)) as running:
        requests = running.requests(texts)
        report["closed"] = {n: step(f"closed {n}", closed(running, requests, n, seconds)) for n in CONNECTIONS}
        capacity = report["closed"][64]["requests_per_second"]
        report["half_load"] = step("open 0.5", opened(running, requests, 0.5 * capacity, seconds))
        report["peak_bytes"] = step("peak bytes", running.peak_bytes())
    report["ceiling_after"] = step("ceiling", ceiling(artifact))
    # For each objective the bound on the queue that suits it, as an operator would set it.
    for name, wait_ms, factors in (("open", args.wait_ms_250, OVERLOADS), ("open_100", args.wait_ms_100, (2.0,))):
        with serving(*service(artifact, max_queue_wait_ms=wait_ms)) as running:
            requests = running.requests(texts)
            capacity = closed(running, requests, 64, seconds / 2)["requests_per_second"]
            report[f"{name}_capacity"] = round(capacity, 1)
            report[name] = {
                factor: step(f"{name} {factor}", opened(running, requests, factor * capacity, seconds))
                for factor in factors
            }
            report[f"{name}_max_queue_wait_ms"] = wait_ms
    for workers in (1, 2):
        plain = uvicorn_command("loadtest.benchmark.plain:app", workers)
        with serving(plain, "/docs", {"PLAIN_MODEL_DIR": str(artifact)}) as running:
            requests = running.requests(texts)
            report[f"plain_{workers}"] = step(f"plain {workers}", closed(running, requests, 64, seconds))
            report[f"plain_{workers}"]["start_seconds"] = round(running.ready_seconds, 3)
    return report


def main() -> None:
    """Command line of `python -m loadtest.benchmark.bench`."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.benchmark.bench", description=__doc__)
    parser.add_argument("--artifact", type=Path, default=ROOT / "model" / "sentiment")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--wait-ms-250", type=float, default=100, help="APP_MAX_QUEUE_WAIT_MS for goodput in 250 ms")
    parser.add_argument("--wait-ms-100", type=float, default=40, help="APP_MAX_QUEUE_WAIT_MS for goodput in 100 ms")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    args = parser.parse_args()
    allow_connections()
    report = run(args)
    report["targets"] = [
        {**asdict(target), "value": round(target.value, 3), "met": target.met} for target in targets(report)
    ]
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
