"""What one track's clients saw in a time: counts of this service's metrics, wherever they were read."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

# Answers that are the server's fault. 503 is a refusal.
ERRORS = ("500", "504")
# Refusals for want of capacity; the others are the client's doing, or of a Pod on its way out.
REFUSALS = ("queue_full", "late", "memory")
# Metric, the label that counts apart, and the part of Traffic. The last is no counter.
COUNTED = (
    ("inference_requests_total", "code", "answers"),
    ("inference_rejected_total", "reason", "rejected"),
    ("inference_request_duration_seconds_bucket", "le", "within"),
    ("inference_predictions_total", "label", "predictions"),
)
REFERENCE = "model_reference_prediction_ratio"
# A label that one side never had: what the logarithm gets instead of nothing.
LEAST_RATIO = 0.0001


class EvidenceError(Exception):
    """The metrics cannot be read. One line."""


def _counts() -> dict[str, float]:
    return defaultdict(float)


@dataclass
class Traffic:
    """Counts by status, by reason, by upper bound of seconds (cumulative) and by label; the reference as ratios."""

    answers: dict[str, float] = field(default_factory=_counts)
    rejected: dict[str, float] = field(default_factory=_counts)
    within: dict[str, float] = field(default_factory=_counts)
    predictions: dict[str, float] = field(default_factory=_counts)
    reference: dict[str, float] = field(default_factory=_counts)

    @property
    def requests(self) -> int:
        return round(sum(self.answers.values()))

    @property
    def errors(self) -> int:
        return round(sum(self.answers.get(code, 0) for code in ERRORS))

    @property
    def refused(self) -> int:
        return round(sum(self.rejected.get(reason, 0) for reason in REFUSALS))

    def _buckets(self) -> list[tuple[float, float]]:
        return sorted((float(bound), count) for bound, count in self.within.items())

    @property
    def timed(self) -> int:
        """Answers whose time was taken."""
        buckets = self._buckets()
        return round(buckets[-1][1]) if buckets else 0

    def quantile(self, share: float) -> float:
        """Seconds, as Prometheus' histogram_quantile: straight within a bucket. NaN if nothing was timed."""
        buckets = self._buckets()
        if not self.timed:
            return math.nan
        wanted, lower, before = share * buckets[-1][1], 0.0, 0.0
        for bound, count in buckets:
            if count >= wanted:
                if math.isinf(bound) or count == before:
                    return lower
                return lower + (bound - lower) * (wanted - before) / (count - before)
            lower, before = bound, count
        return lower

    def slower(self, seconds: float) -> int:
        """How many took longer; within a bucket, as if spread evenly."""
        lower, before = 0.0, 0.0
        for bound, count in self._buckets():
            if bound >= seconds:
                part = 0.0 if math.isinf(bound) else (seconds - lower) / (bound - lower)
                return round(max(self.timed - before - part * (count - before), 0))
            lower, before = bound, count
        return 0

    def edge(self, share: float) -> float:
        """The smallest bound of a bucket within which this share was answered: infinite if none."""
        return next((bound for bound, count in self._buckets() if count >= share * self.timed), math.inf)


def stability_index(counts: dict[str, float], reference: dict[str, float]) -> float:
    """Population stability index of counts against ratios (or other counts); NaN if either is empty."""
    total, whole = sum(counts.values()), sum(reference.values())
    if not total or not whole:
        return math.nan
    index = 0.0
    for label in counts.keys() | reference.keys():
        found = max(counts.get(label, 0) / total, LEAST_RATIO)
        expected = max(reference.get(label, 0) / whole, LEAST_RATIO)
        index += (found - expected) * math.log(found / expected)
    return index
