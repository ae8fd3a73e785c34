"""Traffic over time: step, ramp, spike, diurnal, or a trace from CSV. Rates per second (or users) at a second.

Standard library only: the simulator, the locustfile and its containers share it.
"""

import csv
import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NAMES = ("constant", "step", "ramp", "spike", "diurnal", "csv")
Rate = Callable[[float], float]


class ShapeError(Exception):
    """A shape or trace that cannot be used; the message is one line for people."""


@dataclass(frozen=True)
class Shape:
    """A rate over time, how long it lasts, and the highest it gets."""

    name: str
    seconds: float
    rate: Rate
    highest: float

    def next_arrival(self, t: float, rng: random.Random, share: float = 1.0) -> float:
        """When the next of Poisson arrivals after `t` is due, of a `share` of the rate; past the end if none is. By
        thinning: a gap drawn from the rate at its start would miss that the rate changes meanwhile."""
        while t <= self.seconds and self.highest > 0:
            t += rng.expovariate(self.highest * share)
            if rng.random() * self.highest < self.rate(t):
                return t
        return float("inf")


def shape(name: str, base: float, peak: float, seconds: float, trace: Path | None = None) -> Shape:
    """One of NAMES between `base` and `peak`.

    constant: peak. step: base, from a quarter to three quarters peak. ramp: base to peak in the middle half, then peak.
    spike: base, with a tenth of the time at peak. diurnal: one day from night (base) to noon (peak) and back, squeezed
    into `seconds`. csv: `trace`, two columns `seconds,rate`, straight lines between its rows; base and peak do nothing.
    """
    if name == "csv":
        if trace is None:
            raise ShapeError("the shape csv needs a trace file with the columns seconds,rate")
        return read_trace(trace)
    if seconds <= 0 or base < 0 or peak < base:
        raise ShapeError(f"{name}: needs seconds > 0 and 0 <= base <= peak, not {seconds:g}, {base:g}, {peak:g}")

    def ramp(t: float) -> float:
        return base + (peak - base) * min(1.0, max(0.0, (t / seconds - 0.25) * 2))

    rates: dict[str, Rate] = {
        "constant": lambda _: peak,
        "step": lambda t: peak if 0.25 <= t / seconds < 0.75 else base,
        "ramp": ramp,
        "spike": lambda t: peak if 0.45 <= t / seconds < 0.55 else base,
        "diurnal": lambda t: base + (peak - base) * (1 - math.cos(2 * math.pi * t / seconds)) / 2,
    }
    if name not in rates:
        raise ShapeError(f"{name!r} is not a shape: {', '.join(NAMES)}")
    return Shape(name, seconds, rates[name], peak)


def growth(base: float, peak: float, seconds: float, percent_per_second: float) -> Shape:
    """Base for a tenth of the time, then growth by so many percent in each second until the peak."""

    def rate(t: float) -> float:
        exponent = max(0.0, t - seconds / 10) * math.log1p(percent_per_second / 100)
        return base * math.exp(min(exponent, math.log(peak / base)))

    return Shape(f"growth {percent_per_second:g} %/s", seconds, rate, peak)


def read_trace(path: Path) -> Shape:
    """A trace from CSV. Raises ShapeError naming file and row."""
    times: list[float] = []
    rates: list[float] = []
    try:
        with path.open(newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or (number == 1 and row[0].strip() == "seconds"):
                    continue
                try:
                    at, rate = (float(cell) for cell in row)
                except ValueError:
                    raise ShapeError(f"{path}, row {number}: {','.join(row)!r} is not seconds,rate") from None
                if not (math.isfinite(at) and math.isfinite(rate)) or rate < 0 or (times and at <= times[-1]):
                    raise ShapeError(f"{path}, row {number}: seconds must rise and rates be 0 or more")
                times.append(at)
                rates.append(rate)
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(times) < 2:
        raise ShapeError(f"{path}: a trace needs two rows at least")

    def at_second(t: float) -> float:
        right = min(max(1, bisect_right(times, t + times[0])), len(times) - 1)
        share = (t + times[0] - times[right - 1]) / (times[right] - times[right - 1])
        return rates[right - 1] + (rates[right] - rates[right - 1]) * min(1.0, share)

    return Shape(path.stem, times[-1] - times[0], at_second, max(rates))
