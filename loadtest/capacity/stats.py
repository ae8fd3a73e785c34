"""Means and percentiles with confidence intervals from batch means. Arithmetic only.

Latencies that follow each other are alike, so the spread of single values would promise too much. The run is cut into
ten batches in order of time; the spread between batches has the likeness in it.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loadtest.capacity.schema import Estimate

Values = npt.NDArray[np.float64]

BATCHES = 10
# Student's t for 9 degrees of freedom, two-sided 95 %.
T_95 = 2.262
# A 95th percentile of fewer values is their maximum.
MIN_PER_BATCH = 20


def interval(of_batches: Values, overall: float) -> Estimate:
    """`overall`, with an interval from the spread between batches."""
    spread = float(np.std(of_batches, ddof=1)) / np.sqrt(len(of_batches))
    return Estimate(overall, T_95 * float(spread))


def _sections(values: Values) -> list[Values]:
    size = len(values) // BATCHES
    return [values[i * size : (i + 1) * size] for i in range(BATCHES)]


def rate(finished: Values, started: float) -> Estimate:
    """Completions per second. Batches have equal counts, not equal times, so that slow servers lose no precision to
    rounding; answers that come in bursts fall into the batch of their burst."""
    if len(finished) < BATCHES:
        return Estimate(0.0, float("inf"))
    times = np.sort(finished)
    overall = len(times) / (times[-1] - started) if times[-1] > started else 0.0
    size = len(times) // BATCHES
    edges = np.concatenate(([started], times[size - 1 : size * BATCHES : size]))
    widths = np.maximum(np.diff(edges), 1e-9)
    # The mean of widths is the inverse of the rate; its relative error is the rate's.
    relative = float(np.std(widths, ddof=1) / np.mean(widths)) / np.sqrt(BATCHES)
    return Estimate(float(overall), T_95 * float(relative) * float(overall))


def rate_of(latencies: Values, in_flight: float) -> Estimate:
    """Completions per second of a closed loop without failures, by Little's law: what is in flight divided by how long
    it takes. Unlike a count it does not depend on where in a burst the window ends, nor on a silence at its end."""
    mean = _estimate(latencies, lambda part: float(np.mean(part)), 1)
    if not 0 < mean.value < float("inf"):
        return Estimate(0.0, float("inf"))
    return Estimate(in_flight / mean.value, mean.relative * in_flight / mean.value)


def percentile(values: Values, percent: float) -> Estimate:
    """A percentile of values in order of time."""
    return _estimate(values, lambda part: float(np.percentile(part, percent)), MIN_PER_BATCH)


def _estimate(values: Values, of: Callable[[Values], float], least: int) -> Estimate:
    if len(values) == 0:
        return Estimate(float("inf"), float("inf"))
    if len(values) < BATCHES * least:
        # Too few for batches; a server that always takes the same time has still said all there is to say.
        low, high = float(np.min(values)), float(np.max(values))
        return Estimate(of(values), (high - low) / 2 if len(values) >= MIN_PER_BATCH else float("inf"))
    return interval(np.array([of(part) for part in _sections(values)]), of(values))
