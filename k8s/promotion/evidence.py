"""What is known of a release, the bounds it is held to, and the form of an answer. It judges nothing."""

import math
from dataclasses import dataclass, field
from typing import Any

from diagnosis.cluster import Cluster
from diagnosis.finding import Finding

from .tracks import Track
from .traffic import Traffic

OK, WAIT, BAD, SHOWN = "ok", "wait", "bad", "-"


@dataclass(frozen=True)
class Bounds:
    """What clients were promised; as the alerts have it."""

    error_ratio: float = 0.01
    refused_ratio: float = 0.01
    p95_seconds: float = 0.25
    stability_index: float = 0.25

    @property
    def requests(self) -> int:
        """The fewest to judge by: of fewer than 3 / bound, even none that fails would not show, at 95 %, that less than
        the bound do (the rule of three)."""
        return math.ceil(3 / self.error_ratio)

    def predictions(self, labels: int) -> int:
        """The fewest to judge by: by chance alone the index is about (labels - 1) / predictions, here a tenth of the
        bound."""
        return math.ceil(10 * max(labels - 1, 1) / self.stability_index)


@dataclass
class Check:
    name: str
    values: dict[str, Any]
    bound: str = ""
    state: str = SHOWN
    reason: str = ""


@dataclass
class Evidence:
    """What there is of each track, by its name; the last is the one to judge."""

    cluster: Cluster
    tracks: list[Track]
    traffic: dict[str, Traffic]
    findings: list[Finding] = field(default_factory=list)

    @property
    def judged(self) -> Track:
        return self.tracks[-1]

    @property
    def stable(self) -> Track | None:
        """What to compare with: none where the stable Pods are the ones to judge."""
        return self.tracks[0] if len(self.tracks) > 1 else None

    def of_judged(self) -> Traffic:
        return self.traffic[self.judged.name]

    def of_stable(self) -> Traffic:
        return self.traffic[self.stable.name] if self.stable else Traffic()
