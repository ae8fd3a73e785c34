"""Which window of the queue serves best: a simulation on the real queue, whose runs cost what padding makes them cost.

`python -m tests.tools.policies`: throughput, padding and latency of each window, at several loads and speeds. There are
two runners, and admission is as the server's: by what waits, divided by the measured speed.
"""

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np

from app.batching.batcher import RATE_WEIGHT, WINDOW_RATIO
from app.batching.queue import PendingRequest, QueueEntry, RowQueue
from app.runtime.tasks import Encoded
from loadtest.texts import sentences

BATCH_ROWS, BATCH_TOKENS, OVERHEAD_TOKENS, RUNNERS = 8, 512, 24.0, 2
LOADS = (0.8, 1.2, 2.0, 5.0)


class Waiter:
    """The part of a future that the queue asks."""

    def done(self) -> bool:
        return False


WAITER = Waiter()
# window_tokens of a batch, from the measured speed of all runners together and the longest wait.
Policy = Callable[[float, float], float]
POLICIES: dict[str, Policy] = {
    "first come, first served": lambda speed, wait: 0.0,
    "the oldest 24 rows": lambda speed, wait: 24 * MEAN_TOKENS,
    "the oldest 64 rows": lambda speed, wait: 64 * MEAN_TOKENS,
    "an eighth of the longest wait": lambda speed, wait: speed * wait / 8,
    "the server's": lambda speed, wait: speed * wait * WINDOW_RATIO,
    "half of the longest wait": lambda speed, wait: speed * wait / 2,
    "all that wait": lambda speed, wait: inf,
}
MEAN_TOKENS = 20.0


@dataclass
class Outcome:
    """Of one load; times in milliseconds, `goodput` per second within the objective."""

    throughput: float
    padding: float
    p50: float
    p99: float
    most: float
    goodput: float


def simulate(
    policy: Policy, lengths: list[int], *, speed: float, wait_seconds: float, objective_ms: float,
    per_second: float = 0.0, clients: int = 0, seconds: float = 20.0,
) -> Outcome:  # fmt: skip
    """speed: of one runner, tokens a second. An open loop of `per_second` requests, or a closed one of `clients`."""
    rng = random.Random(1)
    queue = RowQueue(BATCH_ROWS, BATCH_TOKENS, OVERHEAD_TOKENS)
    events: list[tuple[float, int, list[QueueEntry] | None]] = []
    count, now, free, measured, real, padded = 0, 0.0, RUNNERS, speed, 0, 0
    latencies: list[float] = []

    def arrive() -> None:
        if queue.rows and queue.tokens / (measured * RUNNERS) > wait_seconds:
            return
        unit = Encoded(None, rng.choice(lengths))
        queue.push(QueueEntry(unit, PendingRequest([unit], WAITER, inf, submitted=now), 0))  # type: ignore[arg-type]

    def later(delay: float, batch: list[QueueEntry] | None) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (now + delay, count, batch))

    for _ in range(clients):
        arrive()
    if per_second:
        later(rng.expovariate(per_second), None)
    while now < seconds:
        while free and (batch := queue.take(0, policy(measured * RUNNERS, wait_seconds))):
            free -= 1
            tokens = len(batch) * max(entry.unit.length for entry in batch)
            without = sum(entry.unit.length for entry in batch)
            real, padded = real + without, padded + tokens
            run = (tokens + OVERHEAD_TOKENS) / speed * rng.uniform(0.9, 1.1)
            measured += RATE_WEIGHT * (without / run - measured)
            later(run, batch)
        now, _, finished = heapq.heappop(events)
        if finished is None:
            arrive()
            later(rng.expovariate(per_second), None)
            continue
        free += 1
        latencies += [now - entry.submitted for entry in finished]
        for _ in finished if clients else ():
            arrive()
    settled = 1000 * np.array(latencies[len(latencies) // 10 :])
    done = len(latencies) / seconds
    p50, p99 = np.percentile(settled, [50, 99])
    within = float((settled <= objective_ms).mean())
    return Outcome(done, 1 - real / padded, p50, p99, settled.max(), done * within)


def lengths_of(texts: list[str]) -> list[int]:
    """In tokens, of a tokenizer that knows every word."""
    return [len(text.split()) + 2 for text in texts]


def compared(
    lengths: list[int], speeds: list[float], wait_seconds: float, objective_ms: float
) -> Iterator[tuple[float, float, str, Outcome, float]]:
    """Speed, load, policy, outcome, and the throughput of 64 connections that all figures are measured by."""
    for speed in speeds:
        how = {"speed": speed, "wait_seconds": wait_seconds, "objective_ms": objective_ms}
        capacity = simulate(POLICIES["all that wait"], lengths, clients=64, **{**how, "wait_seconds": inf}).throughput
        for load in LOADS:
            for name, policy in POLICIES.items():
                yield speed, load, name, simulate(policy, lengths, per_second=load * capacity, **how), capacity


def main() -> None:
    """Command line of `python -m tests.tools.policies`."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.policies", description=__doc__)
    parser.add_argument("--texts", type=Path, help="one text a line (default: made up)")
    parser.add_argument("--wait-ms", type=float, default=160, help="APP_MAX_QUEUE_WAIT_MS (default %(default)s)")
    parser.add_argument("--objective-ms", type=float, default=250, help="of an answer (default %(default)s)")
    parser.add_argument(
        "--speeds", type=float, nargs="+", default=[12_000, 24_000], help="of a runner, tokens a second"
    )
    args = parser.parse_args()
    lengths = lengths_of(args.texts.read_text().splitlines() if args.texts else sentences(2000, seed=1))
    print(json.dumps({"rows": len(lengths), "mean_tokens": round(float(np.mean(lengths)), 1)}), file=sys.stderr)
    print("| tokens/s | load | window | throughput | padding | p50 ms | p99 ms | max ms | p99 ÷ p50 | goodput |")
    print("| --- " * 10 + "|")
    for speed, load, name, found, capacity in compared(lengths, args.speeds, args.wait_ms / 1000, args.objective_ms):
        print(
            f"| {speed:.0f} | {load} | {name} | {found.throughput / capacity:.2f} | {found.padding:.3f} | "
            f"{found.p50:.0f} | {found.p99:.0f} | {found.most:.0f} | {found.p99 / found.p50:.2f} | "
            f"{found.goodput / capacity:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
