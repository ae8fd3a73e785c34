"""From a closed-loop curve to open-loop behaviour: the replica as a load-dependent server under Poisson arrivals.

The throughput X(k) measured with k requests in flight is taken as the rate at which k requests leave. With arrivals at
rate a, the number in flight is then a birth-death chain: p(k) = p(k-1) · a / X(k). The latency of a request that makes
it k in flight is that measured at k. Exact for exponential service; steadier servers wait less, so it errs on the
safe side. Knows numpy and the measured curve only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.capacity.schema import Step

Array = npt.NDArray[np.float64]
# The latencies at each k are known at these shares of requests; the first and last are guesses: nothing is known below
# the median but that latencies rarely start at nothing, and nothing above the 99th percentile.
SHARES = (0.0, 0.5, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Curve:
    """What one replica does with k requests in flight, for k = 1 … bound; index 0 is k = 1."""

    throughput: Array
    p95_ms: Array
    # A row for each of SHARES, rising.
    quantiles_ms: Array

    @property
    def bound(self) -> int:
        return len(self.throughput)

    @property
    def peak_rps(self) -> float:
        return float(self.throughput.max())

    @staticmethod
    def of(steps: Sequence[Step], bound: int | None = None) -> "Curve":
        """Interpolated between measured steps. Beyond the last, throughput stays what it was there, and latency grows
        with what is in flight (Little's law). `bound`: more than this the replica refuses."""
        chosen = sorted(
            (s for s in steps if s.loop == "closed" and s.requests > 0 and s.rps.value > 0), key=lambda s: s.in_flight
        )
        if not chosen:
            raise ValueError("no step got an answer")
        last = int(chosen[-1].in_flight)
        k = np.arange(1, (bound or last * 4) + 1, dtype=np.float64)
        at, stretch = [s.in_flight for s in chosen], np.maximum(1.0, k / last)

        def interpolated(of: Callable[[Step], float]) -> Array:
            return np.asarray(np.interp(k, at, [of(s) for s in chosen]), dtype=np.float64)

        p50, p95, p99 = (
            interpolated(of) * stretch for of in (lambda s: s.p50_ms, lambda s: s.p95_ms.value, lambda s: s.p99_ms)
        )
        rising = np.maximum.accumulate([p50 / 2, p50, p95, p99, p99 * 1.5])
        return Curve(interpolated(lambda s: s.rps.value), p95, rising)

    def within(self, ms: float) -> Array:
        """For each k, the share of requests that take at most `ms`."""
        low, high = self.quantiles_ms[:-1], self.quantiles_ms[1:]
        parts = np.clip((ms - low) / np.maximum(high - low, 1e-9), 0.0, 1.0)
        return np.asarray(np.diff(SHARES) @ parts, dtype=np.float64)

    def probabilities(self, rps: float) -> Array:
        """p(0 … bound) in flight under Poisson arrivals; what would exceed the bound is refused."""
        if rps <= 0:
            return np.asarray([1.0] + [0.0] * self.bound)
        logs = np.concatenate(([0.0], np.cumsum(np.log(rps / self.throughput))))
        weights = np.exp(logs - logs.max())
        return np.asarray(weights / weights.sum(), dtype=np.float64)


@dataclass(frozen=True)
class Steady:
    """A replica's steady state at one arrival rate."""

    in_flight: float
    p95_ms: float
    refused_share: float


def steady(curve: Curve, rps: float) -> Steady:
    """In-flight, latency and refusals at `rps`."""
    p = curve.probabilities(rps)
    # An arrival sees what is there (Poisson arrivals see time averages) and makes it one more.
    seen = p[:-1] / max(p[:-1].sum(), 1e-12)
    low, high = 0.0, float(curve.quantiles_ms[-1][seen > 1e-9].max(initial=0.0))
    # The 95th percentile over the mixture of the latencies at each k.
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if seen @ curve.within(middle) < 0.95 else (low, middle)
    return Steady(float(p @ np.arange(curve.bound + 1)), high, float(p[-1]))


def largest_rate(curve: Curve, slo_ms: float) -> float:
    """The largest Poisson rate whose 95th percentile stays within `slo_ms`; 0 if none does."""
    low, high = 0.0, curve.peak_rps
    for _ in range(24):
        middle = (low + high) / 2
        state = steady(curve, middle)
        low, high = (middle, high) if state.p95_ms <= slo_ms and state.refused_share < 0.001 else (low, middle)
    return low
