"""What the hardware gives without a web server: `python -m loadtest.benchmark.ceiling DIR` prints JSON.

One ONNX Runtime session, as many one-thread runners as CPUs, texts sorted by length, batches of the best size.
"""

import argparse
import json
import threading
import time
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from app.runtime.loading import load_model
from app.runtime.session import Model
from loadtest.benchmark.server import text_artifact
from loadtest.texts import sentences

SECONDS = 2.5
BATCHES = (4, 8, 16)
WINDOW = 256


def run(
    model: Model, requests: Sequence[Any], batch: int, seconds: float, *, runners: int, tokenise: bool
) -> dict[str, float]:
    """Rows per second and CPU milliseconds per row, each runner sorting a window of requests at a time. requests: of
    one row each, such as `["a text"]`."""
    task = model.task
    ready = [task.encode(request)[0] for request in requests]
    counts = []
    stop = time.monotonic() + seconds

    def runner(offset: int) -> None:
        done = 0
        position = offset
        while time.monotonic() < stop:
            chosen = [(position + i) % len(requests) for i in range(WINDOW)]
            position += WINDOW
            units = [task.encode(requests[i])[0] if tokenise else ready[i] for i in chosen]
            units.sort(key=attrgetter("length"))
            for start in range(0, WINDOW, batch):
                payloads = [unit.payload for unit in units[start : start + batch]]
                model.run(payloads)
                done += len(payloads)
                if time.monotonic() >= stop:
                    break
        counts.append(done)

    cpu, started = time.process_time(), time.monotonic()
    threads = [threading.Thread(target=runner, args=(i * len(requests) // 7,)) for i in range(runners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, done = time.monotonic() - started, sum(counts)
    return {"per_second": round(done / elapsed, 1), "cpu_ms": round((time.process_time() - cpu) / done * 1e3, 4)}


def measure(folder: Path, seconds: float = SECONDS) -> dict[str, object]:
    """The best batch size's figures with and without tokenisation, and what single rows take: their
    percentiles 0.5, 1.5, … 99.5 in milliseconds."""
    model = load_model(folder)
    requests = [[text] for text in sentences(2048)]
    measured = partial(run, model, requests, runners=model.runners)
    measured(8, 0.5, tokenise=True)
    bare = {batch: measured(batch, seconds, tokenise=False) for batch in BATCHES}
    best = max(bare, key=lambda batch: bare[batch]["per_second"])
    task = model.task
    singles = []
    for request in requests[:400]:
        started = time.perf_counter()
        model.run([task.encode(request)[0].payload])
        singles.append((time.perf_counter() - started) * 1e3)
    return {
        "batch_rows": best,
        "without_tokenising": bare[best],
        "with_tokenising": measured(best, seconds, tokenise=True),
        "single_ms": np.percentile(singles, np.arange(0.5, 100)).round(3).tolist(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.benchmark.ceiling",
        description=__doc__,
        epilog="example: python -m loadtest.benchmark.ceiling my-model",
    )
    parser.add_argument("artifact", type=text_artifact, help="a text model's folder")
    print(json.dumps(measure(parser.parse_args().artifact)))
