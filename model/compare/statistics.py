"""What so many rows can say of an accuracy, and of the difference of two on the same rows. Knows no model.

Wilson (1927) for one proportion; Bonett and Price (2012), "Adjusted Wald confidence intervals for a difference of
binomial proportions based on paired data", for the difference; McNemar's exact test beside it.
"""

from math import comb, sqrt
from statistics import NormalDist

from msgspec import Struct


class Interval(Struct, frozen=True):
    """An estimate with the bounds of its two-sided confidence interval."""

    estimate: float
    low: float
    high: float


def proportion(hits: int, rows: int, confidence: float) -> Interval:
    """Of hits among rows, 0 to 1: Wilson's score interval."""
    z, p = _z(confidence), hits / rows
    centre = (p + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z * sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows)) / (1 + z * z / rows)
    return _interval(p, centre - half, centre + half, least=0)


def paired_difference(gained: int, lost: int, rows: int, confidence: float) -> Interval:
    """Of two accuracies on the same rows, -1 to 1: the second is right alone on `gained` and the first on `lost`.

    Unlike a bootstrap's it has a width where the two never differ, which says what so few rows cannot exclude.
    """
    up, down = (gained + 1) / (rows + 2), (lost + 1) / (rows + 2)
    half = _z(confidence) * sqrt((up + down - (up - down) ** 2) / (rows + 2))
    return _interval((gained - lost) / rows, up - down - half, up - down + half, least=-1)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p value of as uneven a split of the rows on which just one of the two is right."""
    rows = gained + lost
    tail = sum(comb(rows, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << rows))


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _interval(estimate: float, low: float, high: float, least: int) -> Interval:
    return Interval(round(estimate, 6), round(max(least, low), 6), round(min(1, high), 6))
