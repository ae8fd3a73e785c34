"""Means and percentiles with confidence intervals from batch means. Arithmetic only.

Latencies that follow each other are alike, so the spread of single values would promise too much. The run is cut into
ten batches in order of time; the spread between batches has the likeness in it.
"""

import math
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


def rate(finished: Values, started: float) -> Estimate:
    """Completions per second. Batches have equal counts, not equal times, so that slow servers lose no precision to
    rounding; answers that come in bursts fall into the batch of their burst."""
    if len(finished) < BATCHES:
        return Estimate(0.0, float("inf"))
    times = np.sort(finished)
    overall = len(times) / (times[-1] - started) if times[-1] > started else 0.0
    size = len(times) // BATCHES
    widths = np.maximum(np.diff(np.concatenate(([started], times[size - 1 : size * BATCHES : size]))), 1e-9)
    # The mean of widths is the inverse of the rate; its relative error is the rate's.
    return Estimate(float(overall), float(_half_width(widths) / np.mean(widths) * overall))


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


def _half_width(of_batches: Values) -> float:
    return T_95 / math.sqrt(BATCHES) * float(np.std(of_batches, ddof=1))


def _estimate(values: Values, of: Callable[[Values], float], least: int) -> Estimate:
    if len(values) == 0:
        return Estimate(float("inf"), float("inf"))
    if len(values) < BATCHES * least:
        # Too few for batches; a server that always takes the same time has still said all there is to say.
        return Estimate(of(values), float(np.ptp(values)) / 2 if len(values) >= MIN_PER_BATCH else float("inf"))
    size = len(values) // BATCHES
    return Estimate(
        of(values), _half_width(np.array([of(part) for part in values[: size * BATCHES].reshape(-1, size)]))
    )
