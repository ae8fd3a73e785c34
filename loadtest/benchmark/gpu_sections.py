"""What gpu_check measures. Each section runs in a process of its own, since CUDA gives memory back only when one ends,
and since a crash or a hang must cost one section: `python -m loadtest.benchmark.gpu_sections WORK` prints its figures
as JSON lines, as they come. Knows neither the order of the sections nor what becomes of their figures.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from app.artifact.datatypes import Tensors
from app.artifact.manifest import read_artifact
from app.errors import ProviderError, one_line
from app.runtime.loading import load_model
from app.runtime.session import PROVIDERS, Model, Provider
from app.runtime.tasks import Encoded, Task, open_task
from app.settings import cpu_quota
from loadtest.benchmark import ceiling
from loadtest.benchmark.gpu_use import Gpus, Unmeasured, create_context
from loadtest.benchmark.load import closed
from loadtest.benchmark.server import ROOT, Running, service, serving
from loadtest.benchmark.targets import client_cpu_ms
from loadtest.payloads import Payload, Served, values_bytes
from loadtest.texts import sentences

REQUESTS = 256
GRID_BATCHES, GRID_LENGTHS, BATCHES, RUNNERS = (1, 8, 32, 128), (16, 64, 256), (8, 32, 128), (1, 2, 4)
HTTP_PROCESSES = (1, 2, 4, 8)
# Of the label and other strings. An int8 file and an fp16 one of the same weights agree on 0.97 of random sentences.
EQUAL_SHARE = 0.9
# Less than any model can do with.
TOO_SMALL_BYTES = 1 << 20
START_TOGETHER_SECONDS = 0.5
# Of a server: less than what a section that is out of time gets for its own end.
END_SECONDS = 10
Figures = Iterator[tuple[str, Any]]


class Wrong(Exception):
    """What was measured is not as it must be."""


class Work(msgspec.Struct, frozen=True):
    """seconds: for the whole section. load_seconds: of one load, at most. batch, rows_per_second: the bare session's
    best, once it is known."""

    provider: Provider
    artifact: str
    cpu_artifact: str
    load_seconds: float
    section: str = ""
    seconds: float = 0.0
    batch: int = 0
    rows_per_second: float = 0.0

    def each(self, loads: int) -> float:
        """Seconds of one of so many loads; most of the time is for imports, starting and ending."""
        return min(self.load_seconds, self.seconds / 3 / loads)

    def require_cuda(self) -> None:
        if self.provider != "cuda":
            raise Unmeasured("needs CUDA")


def requests(task: Task, count: int) -> list[Tensors]:
    """Protocol requests of one row each: sentences, or random values in the golden rows' shape. Raises Unmeasured."""
    if all(spec.datatype == "BYTES" for spec in task.inputs):
        texts = iter(sentences(count * len(task.inputs), seed=1))
        return [{spec.name: np.array([next(texts)], np.object_) for spec in task.inputs} for _ in range(count)]
    golden, rng = task.golden()[0].units[0].payload, np.random.default_rng(1)
    if not isinstance(golden, dict) or any(array.dtype == np.object_ for array in golden.values()):
        raise Unmeasured("no inputs can be made for a model of this task")
    rows = [array.shape[1:] if task.batched else array.shape for array in golden.values()]
    shapes = [(1, *row) if task.batched else row for row in rows]

    def values(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        found = (
            rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2 if dtype.kind == "b" else 10, shape)
        )
        return found.astype(dtype)

    return [
        {name: values(shape, array.dtype) for (name, array), shape in zip(golden.items(), shapes, strict=True)}
        for _ in range(count)
    ]


def gate(work: Work) -> Figures:
    model = load_model(Path(work.artifact), provider=work.provider)
    manifest = model.artifact.manifest
    yield "model", f"{manifest.name} {manifest.version}, {manifest.precision}, on {model.provider}"
    yield "seconds", model.stage_seconds
    yield "golden outputs", {"off by": model.golden_error, "tolerance": manifest.golden.tolerance}
    yield "auto", {"runners": model.runners, "batch rows": model.batch_rows, "batch tokens": model.batch_tokens}


def provider(work: Work) -> Figures:
    """Where the nodes run, by ONNX Runtime's own profile."""
    import onnxruntime as ort

    artifact, wanted = read_artifact(Path(work.artifact)), PROVIDERS[work.provider]
    if work.provider == "cuda":
        ort.preload_dlls()
    task = open_task(artifact, 32)
    inputs = task.assemble([unit.payload for unit in task.warm_up(32, 32 * 64)[1]])
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = ort.InferenceSession(
            artifact.path(artifact.manifest.model_file), options, [wanted, PROVIDERS["cpu"]], enable_fallback=0
        )
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    yield "providers of the session", session.get_providers()
    nodes, elsewhere = placed(events, wanted)
    yield "nodes on each", nodes
    yield "operators elsewhere", [f"{count} {name}" for name, count in elsewhere.most_common(8)] or "none"
    if session.get_providers()[0] != wanted or nodes[wanted] < sum(nodes.values()) / 2:
        raise Wrong(f"expected most nodes on {wanted}; for CUDA the model should be fp16 or fp32")


def placed(events: Sequence[dict[str, Any]], wanted: str) -> tuple[Counter[str], Counter[str]]:
    """From a profile of ONNX Runtime: nodes by provider, and operators of nodes that are not on `wanted`."""
    ran = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    nodes = Counter(str(node["provider"]) for node in ran.values())
    return nodes, Counter(str(node["op_name"]) for node in ran.values() if node["provider"] != wanted)


def agreement(work: Work) -> Figures:
    """Of the answers, request by request."""
    sides: list[tuple[list[Tensors], float]] = []
    made: list[Tensors] = []
    for folder in (work.cpu_artifact, work.artifact):
        model = load_model(Path(folder), provider=work.provider if sides else "cpu")
        made = made or requests(model.task, REQUESTS)
        sides.append((answers(model, made), model.artifact.manifest.golden.tolerance))
    yield "requests", len(made)
    (others, its), (ours, tolerance) = sides
    wrong = []
    for name in ours[0]:
        pairs = [(one[name], other[name]) for one, other in zip(ours, others, strict=True)]
        if pairs[0][0].dtype.kind == "f":
            same = [(one, other) for one, other in pairs if one.shape == other.shape]
            off = [float(np.abs(one.astype(float) - other).max(initial=0.0)) for one, other in same] or [np.nan]
            yield f"{name}, difference", {"largest": max(off), "p99": np.percentile(off, 99), "mean": np.mean(off)}
            if not np.mean(off) <= max(tolerance, its):
                wrong.append(f"{name}: expected a mean difference within {max(tolerance, its):g}")
        else:
            equal = float(np.mean([np.array_equal(one, other) for one, other in pairs]))
            yield f"{name}, equal share", equal
            if equal < EQUAL_SHARE:
                wrong.append(f"{name}: expected at least {EQUAL_SHARE:g} of the answers to be equal")
    if wrong:
        raise Wrong("; ".join(wrong))


def answers(model: Model, made: Sequence[Tensors]) -> list[Tensors]:
    """Of each request, as a client gets them."""
    task, rows = model.task, model.batch_rows if model.artifact.manifest.batching else 1
    units = [task.encode(task.read(dict(each)))[0] for each in made]
    results: list[Any] = []
    for start in range(0, len(units), rows):
        results += model.run([unit.payload for unit in units[start : start + rows]])
    return [task.respond([unit], [result]) for unit, result in zip(units, results, strict=True)]


def session(work: Work) -> Figures:
    """Rows per second of the session alone: requests of natural length, then one size after another."""
    model = load_model(Path(work.artifact), provider=work.provider)
    task, shared = model.task, model.artifact.manifest.batching
    lengths = GRID_LENGTHS if task.counts_tokens else (1,)
    batches = [batch for batch in GRID_BATCHES if shared or batch == 1]
    seconds = work.each(len(batches) * len(lengths) + len(BATCHES) + len(RUNNERS))
    made = [task.read(dict(each)) for each in requests(task, REQUESTS)]
    found = {}
    measured = partial(ceiling.run, model, made, seconds=seconds, tokenise=False)
    for batch in BATCHES if shared else (1,):
        found[batch] = measured(batch=batch, runners=model.runners)["per_second"]
    best = max(found, key=lambda batch: found[batch])
    yield "natural lengths, rows/s", {f"batch {batch}": value for batch, value in found.items()}
    by_runners = {n: measured(batch=best, runners=n)["per_second"] for n in RUNNERS}
    yield f"batch {best}, rows/s", {f"runners {n}": value for n, value in by_runners.items()}
    yield "best batch", best
    yield "best rows/s", max(found[best], *by_runners.values())
    for batch in batches:
        row = {}
        for length in lengths:
            largest = task.warm_up(batch, batch * length)[1]
            # Where a model takes no more, this is shorter.
            row[f"length {largest[0].length}"] = rate(model, largest, seconds)
        yield f"rows/s, batch {batch}", row


def rate(model: Model, units: Sequence[Encoded], seconds: float) -> float:
    """Rows per second of one batch over and over, made once."""
    inputs, rows = model.task.assemble([unit.payload for unit in units]), sum(unit.rows for unit in units)
    started = time.perf_counter()
    model.infer(inputs)
    # The first makes buffers, and counts only where a run takes all the time.
    if time.perf_counter() - started < seconds:
        started = time.perf_counter()
        runs = 0
        while time.perf_counter() - started < seconds:
            model.infer(inputs)
            runs += 1
    else:
        runs = 1
    return runs * rows / (time.perf_counter() - started)


def server(work: Work) -> Figures:
    """Closed loops: one client, then enough for full batches, by APP_HTTP_PROCESSES and by APP_RUNNERS."""
    clients = max(1, min(4, cpu_quota() // 4))
    connections = min(1024, max(64, 4 * work.batch))
    seconds = work.each(len(HTTP_PROCESSES) + 3)
    # That refuse nothing.
    start = partial(
        service,
        Path(work.artifact),
        provider=work.provider,
        max_queue_rows=2 * connections,
        max_queue_wait_ms=60_000,
        request_timeout_ms=60_000,
    )
    found: dict[int, float] = {}
    yield "connections, client processes", [connections, clients]
    with ProcessPoolExecutor(clients, get_context("spawn")) as pool:
        measured = partial(load, work, pool, clients)
        for processes in HTTP_PROCESSES:
            with serving(start(http_processes=processes), END_SECONDS) as running:
                inputs = inputs_of(running, work)
                if processes == 1:
                    yield "one connection", load(work, pool, 1, running, inputs, 1, seconds)[0]
                row, metrics = measured(running, inputs, connections, seconds)
                found[processes] = row["req/s"]
                yield f"APP_HTTP_PROCESSES={processes}", row
                if processes == 1:
                    yield "gpu_* of /metrics, most", [f"{name} {value:g}" for name, value in metrics.items()] or "none"
                    if work.provider == "cuda" and not metrics:
                        raise Wrong("expected gpu_* in /metrics, found none: is nvidia-ml-py installed?")
        best = max(found, key=lambda processes: found[processes])
        for runners in (1, 2):
            with serving(start(http_processes=best, runners=runners), END_SECONDS) as running:
                row = measured(running, inputs, connections, seconds)[0]
                yield f"APP_RUNNERS={runners}, {best} HTTP", row


def inputs_of(running: Running, work: Work) -> Sequence[str | Payload]:
    """Texts for /predict where the model takes them there, else binary requests of the protocol."""
    served = Served.ask(running.url)
    if served.takes_text:
        return sentences(REQUESTS, seed=1)
    task = open_task(read_artifact(Path(work.artifact)), 1)
    return [
        served.payload(
            [
                (spec, each[spec["name"]].shape, values_bytes(spec, each[spec["name"]].ravel().tolist()))
                for spec in served.inputs
            ]
        )
        for each in requests(task, REQUESTS)
    ]


def load(
    work: Work,
    pool: Executor,
    clients: int,
    running: Running,
    inputs: Sequence[str | Payload],
    connections: int,
    seconds: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """A closed loop from several client processes: its figures, and the most that each gpu_* metric showed."""
    at, share = time.time() + START_TOGETHER_SECONDS, connections // clients
    loads = [pool.submit(client, at, running, inputs[i::clients], share, seconds) for i in range(clients)]
    metrics: dict[str, float] = {}
    while wait(loads, 0.5).not_done:
        with suppress(OSError), urllib.request.urlopen(f"{running.url}/metrics", timeout=2) as answer:  # noqa: S310
            for line in answer.read().decode().splitlines():
                if line.startswith("gpu_"):
                    name, _, value = line.rpartition(" ")
                    metrics[name] = max(float(value), metrics.get(name, 0.0))
    found = [each.result() for each in loads]
    total = sum(each["requests_per_second"] for each in found)
    if not total or any(bad in each for each in found for bad in ("status_0", "status_500")):
        raise Wrong(f"expected answers with status 200, found {found}")
    row = {"req/s": total} | ({"/session": total / work.rows_per_second} if work.rows_per_second else {})
    row |= {
        "p50 ms": float(np.median([each["p50_ms"] for each in found])),
        "p99 ms": max(each["p99_ms"] for each in found),
        "refused/s": sum(each["refused_per_second"] for each in found),
        # CPUs in use: by the process with the model, by the busiest client. One is all that either can use of Python.
        "engine CPUs": found[0]["engine_cpu_ms_per_request"] * found[0]["requests_per_second"] / 1e3,
        "client CPUs": max(client_cpu_ms(each) * each["requests_per_second"] / 1e3 for each in found),
    }
    return row, metrics


def client(
    at: float, running: Running, inputs: Sequence[str | Payload], connections: int, seconds: float
) -> dict[str, float]:
    """One of the client processes; all start at the same moment. Takes longer where nothing is answered in time."""
    time.sleep(max(0.0, at - time.time()))
    found = closed(running, inputs, connections, seconds)
    while not any(name.startswith("status_") for name in found):
        seconds *= 2
        found = closed(running, inputs, connections, seconds)
    return found


def gpu(work: Work) -> Figures:
    """As the driver sees it: memory of an empty CUDA context, of the model and its largest batch; busy or not."""
    work.require_cuda()
    gpus, artifact = Gpus(), read_artifact(Path(work.artifact))
    yield "GPUs, driver", gpus.names()
    before = gpus.used_bytes()
    create_context()
    yield "CUDA context, MB", (gpus.used_bytes() - before) / 1e6
    model = load_model(artifact.folder, provider=work.provider)
    taken = gpus.used_bytes() - before
    yield "with the model after its largest batch, MB", taken / 1e6
    yield "model file, MB", artifact.manifest.files[artifact.manifest.model_file].bytes / 1e6
    with gpus:
        rate(model, model.task.warm_up(model.batch_rows, model.batch_tokens)[1], work.each(1))
    yield "while it runs", {"MB": (gpus.peak_bytes - before) / 1e6, "busy %": gpus.peak_utilization_percent}
    if taken <= 0:
        raise Wrong("expected more GPU memory in use with a model than before, found none")
    if gpus.utilization_percent() is None:
        raise Unmeasured("this GPU does not tell its utilisation, as with MIG")
    if not gpus.peak_utilization_percent:
        raise Wrong("expected a busy GPU while the model runs, found one at 0 %")


def bound(work: Work) -> Figures:
    """Memory of a server that is ready, without and with APP_GPU_MEMORY_BYTES; and one that gets too little."""
    work.require_cuda()
    gpus, start = Gpus(), partial(service, Path(work.artifact), provider=work.provider)
    before = gpus.used_bytes()
    with serving(start(), END_SECONDS):
        free = gpus.used_bytes() - before
    yield "without a bound, MB", free / 1e6
    before, name = gpus.used_bytes(), f"APP_GPU_MEMORY_BYTES={free // 2}, MB"
    try:
        with serving(start(gpu_memory_bytes=free // 2), END_SECONDS):
            yield name, (gpus.used_bytes() - before) / 1e6
    except RuntimeError:
        yield name, "too small as well"
    command = start(port=0, gpu_memory_bytes=TOO_SMALL_BYTES)
    done = subprocess.run(
        command.arguments, cwd=ROOT, env={**os.environ, **command.environment}, capture_output=True, text=True,
        check=False, timeout=work.seconds / 2,
    )  # fmt: skip
    lines = done.stderr.strip().splitlines()
    yield f"APP_GPU_MEMORY_BYTES={TOO_SMALL_BYTES}", [f"exit code {done.returncode}", *lines]
    if done.returncode not in (2, 3, 4) or len(lines) != 1:
        raise Wrong("expected one line and an exit code of the gate for a bound that is too small")


SECTIONS: dict[str, Callable[[Work], Figures]] = {
    function.__name__: function for function in (gate, provider, agreement, gpu, bound, session, server)
}


def main() -> None:
    """Ends with one more line if the section did: why it is `wrong`, `unmeasured`, or CUDA `unavailable`."""
    work = msgspec.json.decode(sys.argv[1], type=Work)
    # What is out of time ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))

    def say(name: str, value: Any) -> None:
        print(json.dumps({name: value}, default=float), flush=True)

    try:
        for name, value in SECTIONS[work.section](work):
            say(name, value)
    except (ImportError, Unmeasured) as error:
        say("unmeasured", one_line(str(error)))
    except ProviderError as error:
        say("unavailable", str(error))
    # Whatever a section raises is its result, and the next one's turn.
    except Exception as error:
        kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
        say("wrong", one_line(f"{kind}{error}"))


if __name__ == "__main__":
    main()
