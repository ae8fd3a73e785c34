"""What the hardware gives without a web server: `python -m loadtest.benchmark.ceiling DIR` prints JSON.

One ONNX Runtime session, as many one-thread runners as CPUs, texts sorted by length, batches of the best size.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np

from app.runtime.loading import load_model
from app.runtime.session import Model
from app.settings import cpu_quota
from loadtest.benchmark.server import text_artifact
from loadtest.texts import sentences

SECONDS = 2.5
BATCHES = (4, 8, 16)
WINDOW = 256


def run(model: Model, texts: list[str], batch: int, seconds: float, *, tokenise: bool) -> dict[str, float]:
    """Sentences per second and CPU milliseconds per sentence, each runner sorting a window of texts at a time."""
    task = model.task
    ready = [unit.payload for unit in task.encode(texts)]
    counts = []
    stop = time.monotonic() + seconds

    def runner(offset: int) -> None:
        done = 0
        position = offset
        while time.monotonic() < stop:
            chosen = [(position + i) % len(texts) for i in range(WINDOW)]
            position += WINDOW
            rows = [task.encode([texts[i]])[0].payload for i in chosen] if tokenise else [ready[i] for i in chosen]
            rows.sort(key=len)
            for start in range(0, WINDOW, batch):
                model.run(rows[start : start + batch])
                done += len(rows[start : start + batch])
                if time.monotonic() >= stop:
                    break
        counts.append(done)

    cpu, started = time.process_time(), time.monotonic()
    threads = [threading.Thread(target=runner, args=(i * len(texts) // 7,)) for i in range(cpu_quota())]
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
    texts = sentences(2048)
    run(model, texts, 8, 0.5, tokenise=True)
    bare = {batch: run(model, texts, batch, seconds, tokenise=False) for batch in BATCHES}
    best = max(bare, key=lambda batch: bare[batch]["per_second"])
    task = model.task
    singles = []
    for text in texts[:400]:
        started = time.perf_counter()
        model.run([task.encode([text])[0].payload])
        singles.append((time.perf_counter() - started) * 1e3)
    return {
        "batch_rows": best,
        "without_tokenising": bare[best],
        "with_tokenising": run(model, texts, best, seconds, tokenise=True),
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
