"""The algorithm of the HorizontalPodAutoscaler (autoscaling/v2) as Kubernetes documents it. Knows no clock and no
fleet: times are arguments, metrics are numbers.

A sync computes a recommendation from each metric and takes the largest, keeps it between the extremes of the recent
ones (stabilisation windows), limits how fast replicas change (policies), then applies the bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

TOLERANCE = 0.1
SYNC_SECONDS = 15.0


@dataclass(frozen=True)
class Policy:
    """At most this many Pods, or percent of the replicas, in any `period_seconds`."""

    type: Literal["Pods", "Percent"]
    value: int
    period_seconds: float


@dataclass(frozen=True)
class Rules:
    """spec.behavior.scaleUp or scaleDown."""

    stabilization_seconds: float
    policies: tuple[Policy, ...]
    select: Literal["Max", "Min", "Disabled"] = "Max"
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Behavior:
    """spec.behavior, with Kubernetes' defaults."""

    up: Rules = field(default_factory=lambda: Rules(0.0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15))))
    down: Rules = field(default_factory=lambda: Rules(300.0, (Policy("Percent", 100, 15),)))


# What k8s/base/hpa.yaml says, and the generated components leave: up by the double or 4 Pods in 30 s, down slowly.
DEPLOYED = Behavior(
    up=Rules(0.0, (Policy("Percent", 100, 30), Policy("Pods", 4, 30))),
    down=Rules(300.0, (Policy("Percent", 10, 60), Policy("Pods", 1, 60))),
)


@dataclass(frozen=True)
class Pods:
    """What a sync sees. `values`: the metric of each Pod that counts; for CPU a share of the request.

    missing: running Pods without a sample. ignored: pending Pods; for CPU also those not ready yet, or ready for less
    than the metric's window.
    """

    values: Sequence[float] | npt.NDArray[np.float64]
    missing: int = 0
    ignored: int = 0


@dataclass(frozen=True)
class Metric:
    """One entry of spec.metrics, with what a sync sees of it."""

    target: float
    pods: Pods
    cpu: bool = False


def recommend_largest(current: int, metrics: Sequence[Metric], behavior: Behavior | None = None) -> int | None:
    """The largest answer of the metrics. One that cannot be had forbids to scale down, and not to scale up. None: the
    HPA reports an error and does nothing."""
    had = [each for each in metrics if len(each.pods.values)]
    wanted = max((recommend(current, m.pods, m.target, behavior, cpu=m.cpu) for m in had), default=None)
    return None if wanted is None or (len(had) < len(metrics) and wanted < current) else wanted


def recommend(current: int, pods: Pods, target: float, behavior: Behavior | None = None, *, cpu: bool = False) -> int:
    """The replicas that bring the mean of the metric to `target`, before windows, policies and bounds.

    Missing Pods count as at the target (CPU: as at the whole request, or at the target if that is more) when the others
    ask for fewer, and as zero when they ask for more; ignored Pods count as zero when the others ask for more. If that
    turns the answer around, nothing changes.
    """
    behavior = behavior or Behavior()
    values = np.asarray(pods.values, dtype=np.float64)
    if len(values) == 0:
        return current  # without any metric the HPA does nothing
    ratio = _ratio(float(values.mean()), target, cpu=cpu)
    rebalance = pods.ignored > 0 and ratio > 1
    if not rebalance and pods.missing == 0:
        return current if _within(ratio, behavior) else _ceil(ratio * len(values))
    total, count = float(values.sum()), len(values) + pods.missing
    if ratio < 1:
        total += pods.missing * (max(1.0, target) if cpu else target)
    if rebalance:
        count += pods.ignored
    corrected = _ratio(total / count, target, cpu=cpu)
    turned = (ratio < 1 < corrected) or (corrected < 1 < ratio)
    if _within(corrected, behavior) or turned:
        return current
    wanted = _ceil(corrected * count)
    if (corrected < 1 and wanted > current) or (corrected > 1 and wanted < current):
        return current
    return wanted


def _ratio(mean: float, target: float, *, cpu: bool) -> float:
    """The HPA counts in whole numbers, cut off: utilisation in percent, other metrics in thousandths."""
    scale = 100 if cpu else 1000
    return math.floor(round(mean * scale, 6)) / round(target * scale, 6)


def _within(ratio: float, behavior: Behavior) -> bool:
    return 1 - behavior.down.tolerance <= ratio <= 1 + behavior.up.tolerance


def _ceil(value: float) -> int:
    # Sums of floats must not add a replica: the HPA counts in thousandths.
    return math.ceil(round(value, 6))


@dataclass
class Autoscaler:
    """One HPA: bounds, behaviour, and what it remembers between syncs."""

    min_replicas: int
    max_replicas: int
    target: float
    behavior: Behavior = field(default_factory=Behavior)
    cpu: bool = False
    _recommendations: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now: float, current: int, pods: Pods, also: Sequence[Metric] = ()) -> int:
        """The replicas from now on. `also`: further metrics beside the one of `target`."""
        if not self._recommendations:
            self._recommendations = [(now, current)]  # what there is counts as recommended when the HPA first looks
        if current > self.max_replicas:
            wanted = self.max_replicas
        elif current < self.min_replicas:
            wanted = self.min_replicas
        else:
            metrics = [Metric(self.target, pods, self.cpu), *also]
            recommendation = recommend_largest(current, metrics, self.behavior)
            if recommendation is None:
                return current
            stable = self._stabilise(now, current, recommendation)
            wanted = min(max(self._limit(now, current, stable), self.min_replicas), self.max_replicas)
        if wanted != current:
            self._changes.append((now, wanted - current))
        return wanted

    def _stabilise(self, now: float, current: int, recommendation: int) -> int:
        """Up to no more than the least, down to no less than the most, that was recommended within each window."""
        up, down = self.behavior.up, self.behavior.down
        longest = max(up.stabilization_seconds, down.stabilization_seconds)
        self._recommendations = [(at, n) for at, n in self._recommendations if now - at < longest]
        least = min([recommendation, *(n for at, n in self._recommendations if now - at < up.stabilization_seconds)])
        most = max([recommendation, *(n for at, n in self._recommendations if now - at < down.stabilization_seconds)])
        self._recommendations.append((now, recommendation))
        return min(max(current, least), most)

    def _limit(self, now: float, current: int, wanted: int) -> int:
        """No faster than the policies allow."""
        if wanted > current:
            rules = self.behavior.up
            if rules.select == "Disabled":
                return current
            limits = [self._reach(now, current, policy, 1) for policy in rules.policies]
            return min(wanted, max(current, max(limits) if rules.select == "Max" else min(limits)))
        if wanted < current:
            rules = self.behavior.down
            if rules.select == "Disabled":
                return current
            limits = [self._reach(now, current, policy, -1) for policy in rules.policies]
            return max(wanted, min(current, min(limits) if rules.select == "Max" else max(limits)))
        return current

    def _reach(self, now: float, current: int, policy: Policy, sign: int) -> int:
        """How far a policy lets replicas go, from what they were at the start of its period."""
        start = current - sum(change for at, change in self._changes if now - at < policy.period_seconds)
        if policy.type == "Pods":
            return start + sign * policy.value
        share = start * (1 + sign * policy.value / 100)
        # Up is rounded up, or a small fleet could never grow; down is cut off.
        return _ceil(share) if sign > 0 else int(share + 1e-9)
