"""From a closed-loop curve to open-loop behaviour: the replica as a load-dependent server under Poisson arrivals.

The throughput X(k) measured with k requests in flight is taken as the rate at which k requests leave. With arrivals at
rate a, the number in flight is then a birth-death chain: p(k) = p(k-1) · a / X(k). The latency of a request that makes
it k in flight is that measured at k. Exact for exponential service; steadier servers wait less, so it errs on the
safe side. Knows numpy and the measured curve only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.capacity.schema import Step

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What one replica does with k requests in flight, for k = 1 … bound; index 0 is k = 1."""

    throughput: Array
    mean_ms: Array
    p50_ms: Array
    p95_ms: Array
    p99_ms: Array
    measured_to: int

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
        bound = bound or last * 4
        k = np.arange(1, bound + 1, dtype=np.float64)
        at = np.array([s.in_flight for s in chosen])
        stretch = np.maximum(1.0, k / last)

        def interpolated(values: list[float]) -> Array:
            return np.asarray(np.interp(k, at, values), dtype=np.float64)

        return Curve(
            interpolated([s.rps.value for s in chosen]),
            interpolated([s.mean_ms for s in chosen]) * stretch,
            interpolated([s.p50_ms for s in chosen]) * stretch,
            interpolated([s.p95_ms.value for s in chosen]) * stretch,
            interpolated([s.p99_ms for s in chosen]) * stretch,
            last,
        )

    def late_share(self, slo_ms: float) -> Array:
        """For each k, the share of requests slower than `slo_ms`, from the measured quantiles."""
        return 1.0 - _below(slo_ms, self.p50_ms, self.p95_ms, self.p99_ms)

    def probabilities(self, rps: float) -> Array:
        """p(0 … bound) in flight under Poisson arrivals; what would exceed the bound is refused."""
        if rps <= 0:
            return np.concatenate(([1.0], np.zeros(self.bound)))
        logs = np.concatenate(([0.0], np.cumsum(np.log(rps / self.throughput))))
        weights = np.exp(logs - logs.max())
        return np.asarray(weights / weights.sum(), dtype=np.float64)


@dataclass(frozen=True)
class Steady:
    """A replica's steady state at one arrival rate."""

    in_flight: float
    p95_ms: float
    late_share: float
    refused_share: float
    served_rps: float


def steady(curve: Curve, rps: float, slo_ms: float, late: Array | None = None) -> Steady:
    """In-flight, latency and refusals at `rps`. `late`: curve.late_share(slo_ms), if it is at hand."""
    p = curve.probabilities(rps)
    late = curve.late_share(slo_ms) if late is None else late
    accepted = p[:-1].sum()
    # An arrival sees what is there (Poisson arrivals see time averages) and makes it one more.
    seen = p[:-1] / max(accepted, 1e-12)
    return Steady(
        in_flight=float(p @ np.arange(curve.bound + 1)),
        p95_ms=_mixture_p95(curve, seen),
        late_share=float(seen @ late),
        refused_share=float(p[-1]),
        served_rps=float(rps * accepted),
    )


def _mixture_p95(curve: Curve, seen: Array) -> float:
    """95th percentile over the mixture of the latencies at each k, each a piecewise-linear distribution."""
    keep = seen > 1e-9
    weights, p50, p95, p99 = seen[keep], curve.p50_ms[keep], curve.p95_ms[keep], curve.p99_ms[keep]
    low, high = 0.0, float(np.max(p99)) * 1.5
    for _ in range(48):
        middle = (low + high) / 2
        if float(weights @ _below(middle, p50, p95, p99)) < 0.95:
            low = middle
        else:
            high = middle
    return high


def _below(ms: float, p50: Array, p95: Array, p99: Array) -> Array:
    """For each k, the share of requests that take at most `ms`."""
    p50 = np.maximum(p50, 1e-9)
    p95 = np.maximum(p95, p50 * (1 + 1e-9))
    p99 = np.maximum(p99, p95 * (1 + 1e-9))
    # Nothing is known below the median but that latencies rarely start at nothing: from half of it.
    start = p50 / 2
    part = np.where(
        ms < p50,
        0.5 * (ms - start) / (p50 - start),
        np.where(
            ms < p95,
            0.5 + 0.45 * (ms - p50) / (p95 - p50),
            np.where(ms < p99, 0.95 + 0.04 * (ms - p95) / (p99 - p95), 0.99 + 0.01 * (ms - p99) / (0.5 * p99)),
        ),
    )
    return np.asarray(np.clip(part, 0.0, 1.0), dtype=np.float64)


def largest_rate(curve: Curve, slo_ms: float) -> float:
    """The largest Poisson rate whose 95th percentile stays within `slo_ms`; 0 if none does."""
    low, high = 0.0, curve.peak_rps
    for _ in range(24):
        middle = (low + high) / 2
        state = steady(curve, middle, slo_ms, np.zeros(curve.bound))
        if state.p95_ms <= slo_ms and state.refused_share < 0.001:
            low = middle
        else:
            high = middle
    return low
