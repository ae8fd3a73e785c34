"""Predicted beside observed: the errors, and the figure that shows both."""

from dataclasses import dataclass, field

import msgspec
import numpy as np
from matplotlib.figure import Figure

from loadtest.shapes import Shape
from loadtest.simulate.fleet import Timeline

WINDOW_SECONDS = 2.0
# Middle of the window, p95 predicted and observed, replicas predicted and observed.
Row = tuple[float, float, float, float, float]


class Errors(msgspec.Struct, frozen=True):
    """How far the prediction is from what happened."""

    p95_median_relative: float
    p95_whole_run_relative: float
    replicas_mean_absolute: float
    replicas_relative: float
    seconds_compared: float


@dataclass
class Observed:
    """What happened, by second since the start."""

    at: list[float] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)


def windows(seconds: float) -> list[tuple[float, float]]:
    count = int(seconds / WINDOW_SECONDS)
    return [(i * WINDOW_SECONDS, (i + 1) * WINDOW_SECONDS) for i in range(count)]


def compare(lines: list[Timeline], seen: Observed, seconds: float) -> tuple[Errors, list[Row]]:
    """Errors, and for each window: middle, p95 predicted, observed, replicas predicted, observed."""
    at = np.array(lines[0].seconds)
    p95 = np.mean([line.p95_ms for line in lines], axis=0)
    ready = np.mean([line.ready for line in lines], axis=0)
    rps = np.array(lines[0].rps)
    due, latency = np.array(seen.due), np.array(seen.latency_ms)
    seen_at, seen_ready = np.array(seen.at), np.array(seen.ready)
    rows: list[Row] = []
    for low, high in windows(seconds):
        here, there = (at >= low) & (at < high), (due >= low) & (due < high)
        live = (seen_at >= low) & (seen_at < high)
        if there.sum() < 20 or not live.any():
            continue
        rows.append(
            (
                (low + high) / 2,
                float(np.average(p95[here], weights=rps[here])),
                float(np.percentile(latency[there], 95)),
                float(ready[here].mean()),
                float(seen_ready[live].mean()),
            )
        )
    table = np.array(rows)
    p95_error = np.abs(table[:, 1] - table[:, 2]) / table[:, 2]
    replica_error = np.abs(table[:, 3] - table[:, 4])
    errors = Errors(
        p95_median_relative=float(np.median(p95_error)),
        p95_whole_run_relative=float(abs(table[:, 1].mean() - table[:, 2].mean()) / table[:, 2].mean()),
        replicas_mean_absolute=float(replica_error.mean()),
        replicas_relative=float(replica_error.mean() / table[:, 4].mean()),
        seconds_compared=float(len(rows) * WINDOW_SECONDS),
    )
    return errors, rows


def words(errors: Errors) -> str:
    return (
        f"p95: median error {errors.p95_median_relative:.0%} of a window's, {errors.p95_whole_run_relative:.0%} of the "
        f"whole run's mean; replicas: {errors.replicas_mean_absolute:.2f} on average ({errors.replicas_relative:.0%})"
    )


def plot(traffic: Shape, rows: list[Row], errors: Errors) -> Figure:
    """Predicted and observed in one figure."""
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    figure.suptitle(words(errors), fontsize=8)
    rate, latency, replicas = figure.subplots(3, 1, sharex=True)
    at = [row[0] for row in rows]
    rate.plot(at, [traffic.rate(t) for t in at], color="tab:gray")
    rate.set(ylabel="offered, rps")
    for axis, first, unit in ((latency, 1, "p95, ms"), (replicas, 3, "ready replicas")):
        axis.plot(at, [row[first] for row in rows], "--", label="predicted")
        axis.plot(at, [row[first + 1] for row in rows], label="observed")
        axis.set(ylabel=unit, ylim=(0, None))
        axis.legend(fontsize=8)
    replicas.set(xlabel="seconds")
    return figure
