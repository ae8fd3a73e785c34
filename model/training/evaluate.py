"""Accuracy through the serving code path, and speed beside the fp32 export.

`python -m model.training.evaluate DIR --data DATA`

Writes JSON. Accuracy runs the artifact as the server does: tokenizer, sorted batches, session, split.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from app.artifact.datatypes import Tensors
from app.errors import StartupError
from app.runtime.loading import load_model
from app.runtime.session import Model, Session
from model.compare.measure import predict
from model.training.corpus import evaluation_sets
from model.training.graph import build, weights_of

LENGTHS = (8, 16, 32, 64, 128)
ROWS = 8
ROUNDS = 15


def accuracies(model: Model, data: Path) -> dict[str, dict[str, float]]:
    """Accuracy (0 to 1) and rows of each evaluation set."""
    result = {}
    for name, rows in evaluation_sets(data).items():
        found = predict(model, [text for _, text in rows])
        labels = model.artifact.manifest.labels
        hits = sum(answer.label == labels[label] for answer, (label, _) in zip(found, rows, strict=True))
        result[name] = {"accuracy": round(hits / len(rows), 4), "rows": len(rows)}
    return result


def rows_per_second(sessions: dict[str, Callable[[Tensors], Tensors]], length: int) -> dict[str, float]:
    """Median over rounds of each session's speed at `ROWS` rows of `length` tokens, one thread, taken in turns so that
    a noisy machine disturbs all alike."""
    ids = np.random.default_rng(0).integers(1000, 20000, (ROWS, length))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, run in sessions.items():
            run(inputs)
            started = time.perf_counter()
            run(inputs)
            run(inputs)
            seconds[name].append((time.perf_counter() - started) / 2)
    return {name: ROWS / float(np.median(taken)) for name, taken in seconds.items()}


def speeds(model: Model) -> dict[str, dict[str, float]]:
    """Rows per second by length, this file beside the fp32 export of the same weights, and their ratio."""
    path = model.artifact.path(model.artifact.manifest.model_file)
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "fp32.onnx"
        onnx.save(build(weights_of(onnx.load(path)), "fp32"), reference)
        sessions = {"rows_per_second": model.infer, "fp32_rows_per_second": Session.open(reference, "cpu").run}
        result = {}
        for length in LENGTHS:
            taken = rows_per_second(sessions, length)
            ratio = taken["rows_per_second"] / taken["fp32_rows_per_second"]
            result[str(length)] = {
                **{name: round(value, 1) for name, value in taken.items()},
                "ratio": round(ratio, 2),
                "row_latency_ms": round(1e3 / taken["rows_per_second"], 3),
            }
    return result


def main() -> None:
    """Command line of `python -m model.training.evaluate`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.training.evaluate",
        description=__doc__,
        epilog="example: python -m model.training.evaluate model/sentiment --data DATA",
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, help="folder with the rated TSV files; without it only speed is measured")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: standard output)")
    args = parser.parse_args()
    try:
        model = load_model(args.artifact)
    except StartupError as error:
        print(f"model.training.evaluate: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    report = {
        "artifact": f"{model.artifact.manifest.name} {model.artifact.manifest.version}",
        "accuracy": accuracies(model, args.data) if args.data else {},
        "speed_by_tokens": speeds(model),
        "threads": 1,
        "batch_rows": ROWS,
        "cpus": os.cpu_count(),
    }
    text = json.dumps(report, indent=2) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
