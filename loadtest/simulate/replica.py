"""What one replica does with a load, from a capacity report: tables that many replicas look up at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loadtest.capacity import sizes
from loadtest.capacity.openloop import Array, Curve, steady
from loadtest.capacity.schema import Report

Flags = npt.NDArray[np.bool_]

# Rates of the tables, as shares of the peak: fine where queues begin to grow.
_GRID = np.concatenate((np.linspace(0.0, 0.8, 41), np.linspace(0.81, 1.0, 39)))
# Requests that one replica holds before it refuses, where the report does not show it: the server's default.
BOUND = 512


@dataclass(frozen=True)
class Replica:
    """Tables over the arrival rate (steady state) and over what is in flight (while a queue grows or drains)."""

    slo_ms: float
    bound: int
    peak_rps: float
    peak_at: float
    rates: Array
    in_flight: Array
    p95_ms: Array
    cpu_cores: Array
    levels: Array
    throughput: Array
    p95_at: Array

    @staticmethod
    def of(report: Report, bound: int = BOUND) -> "Replica":
        """From the closed-loop steps of a report."""
        steps = report.steps
        curve = Curve.of(steps, max(bound, int(max(step.in_flight for step in steps))))
        rates = _GRID * curve.peak_rps
        states = [steady(curve, rate) for rate in rates]
        cores = [sizes.at_rate(steps, rate, lambda s: s.server.cpu_cores, proportional=True) or 0.0 for rate in rates]
        return Replica(
            slo_ms=report.options.slo_p95_ms,
            bound=curve.bound,
            peak_rps=curve.peak_rps,
            peak_at=float(np.argmax(curve.throughput) + 1),
            rates=rates,
            in_flight=np.array([state.in_flight for state in states]),
            p95_ms=np.array([state.p95_ms for state in states]),
            cpu_cores=np.array(cores),
            levels=np.arange(curve.bound + 1, dtype=np.float64),
            throughput=np.concatenate(([0.0], curve.throughput)),
            p95_at=np.concatenate((curve.p95_ms[:1], curve.p95_ms)),
        )

    def step(self, n: Array, rps: float, seconds: float) -> tuple[Array, Array, Array, Flags]:
        """Replicas with `n` in flight each, that get `rps` each for `seconds`: what is in flight then, served per
        second, refused per second, and whether each is in steady state (else its queue grows or drains)."""
        # An empty replica fills within a moment, not within a step of time.
        filled = np.maximum(n, np.minimum(n + rps * seconds, self.peak_at))
        leaves = np.interp(filled, self.levels, self.throughput)
        settled = float(np.interp(rps, self.rates, self.in_flight))
        # Over the peak, or past it on a curve that falls again: the queue grows by what does not leave.
        over = (rps > self.peak_rps) | ((n > self.peak_at) & (leaves < rps))
        grown = n + (rps - leaves) * seconds
        eased = np.where(n <= settled, np.minimum(settled, n + rps * seconds), np.maximum(settled, grown))
        later = np.clip(np.where(over, grown, eased), 0.0, self.bound)
        refused = np.where(over, np.maximum(0.0, (grown - self.bound) / seconds), 0.0)
        is_steady = ~over & (later <= settled * 1.02 + 0.5)
        served = np.where(is_steady, rps, np.interp(later, self.levels, self.throughput))
        return later, served, refused, is_steady

    def latency(self, n: Array, rps: float, is_steady: Flags) -> Array:
        """95th percentile in ms."""
        return np.where(is_steady, np.interp(rps, self.rates, self.p95_ms), np.interp(n, self.levels, self.p95_at))
